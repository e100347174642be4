"""Tracking: metrics.jsonl first; wandb as a mirror that may be absent or fail; a progress bar, or lines in a log.

Every step has exactly one line with a learning rate in metrics.jsonl, also over kills and resumes; an evaluation adds
one without. With `track.ids`, ids.jsonl says in the same way which samples a step was trained on. Losses stay on the
device until `flush`, so that a step that is only counted costs no synchronisation; all ranks flush together. Knows no
model and no data.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mae_dist import config as configuration
from mae_dist import dist
from mae_dist.dist import RankError
from mae_dist.schema import RunConfig

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often a log gets a line where there is no terminal for a bar."""
RECENT = 100
"""Steps over which the final training loss is averaged."""


class Tracker:
    """The record of a run from `step` on; a context manager. `unit` is images a step."""

    def __init__(self, path: Path, config: RunConfig, verb: str, step: int, total: int, num_samples: int):
        self.path, self.total, self.num_samples = path / "metrics.jsonl", total, num_samples
        self.ids = path / "ids.jsonl" if config.track.ids else None
        self.unit, self.scaled = config.train.global_batch, config.train.precision == "fp16"
        self.waiting: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.flushed = self.last_line = time.perf_counter()
        self.progress = self.mirror = None
        self.rewind(step)
        if dist.is_main():
            self.progress = _bar(verb, step, total)
            self.mirror = _wandb(path, config, verb)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        self._mirrored(lambda mirror: mirror.finish())

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`, as those steps will be made again. Sets ``num_bad``, the unreadable
        samples of the steps that remain, and ``skipped``, those of them whose gradient was not finite.
        """
        self.waiting = []

        def cut() -> tuple[int, list[int]]:
            if self.ids:
                rewind(self.ids, step)
            rewind(self.path, step)
            bad = sum(record["bad"] for record in records_with(self.path, "bad"))
            return bad, [r["step"] for r in records_with(self.path, "skipped") if self._is_fault(r)]

        self.num_bad, self.skipped = dist.run_on_rank0(cut)
        self.restart_clock()

    def step(self, step: int, lr: float, seconds: dict[str, float], saving: bool, tensors: dict[str, Tensor]) -> None:
        """Note a step: `seconds` by what they were spent on; whether a checkpoint was being written; on the device
        `bad`, `ids`, `epochs` (this rank's), and `loss`, `grad_norm`, `loss_scale` (all ranks').
        """
        plain = {"step": step, "epoch": round(step * self.unit / self.num_samples, 4), "lr": lr}
        plain |= {name: round(value, 5) for name, value in seconds.items()} | ({"saving": True} if saving else {})
        self.waiting.append((plain, tensors))

    def flush(self) -> None:
        """Write the steps since the last flush."""
        if not self.waiting:
            return
        plain, tensors = zip(*self.waiting, strict=True)
        self.waiting = []
        bads = dist.all_reduce_sum(torch.stack([t["bad"] for t in tensors])).tolist()
        shared = torch.stack([torch.stack([t[k] for k in ("loss", "grad_norm", "loss_scale")]) for t in tensors])
        now = time.perf_counter()
        rate = len(plain) * self.unit / (now - self.flushed)
        self.flushed = now
        records = []
        for known, bad, (loss, norm, scale) in zip(plain, bads, shared.tolist(), strict=True):
            record = known | {"images_per_second": round(rate, 1)}
            record |= {k: v for k, v in (("loss", loss), ("grad_norm", norm)) if math.isfinite(v)}
            record |= {"loss_scale": scale} if self.scaled else {}
            record |= {} if math.isfinite(norm) else {"skipped": True}
            records.append(record | ({"bad": int(bad)} if bad else {}))
        self.num_bad += sum(record.get("bad", 0) for record in records)
        self.skipped += [record["step"] for record in records if self._is_fault(record)]
        self._write(self.path, records)
        for record in records:
            self._mirrored(lambda mirror, record=record: mirror.log(record))
        if self.ids:
            self._write(self.ids, [self._ids(known["step"], t) for known, t in zip(plain, tensors, strict=True)])
        self._show(records[-1])

    def _ids(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Epochs and ids of a step over all ranks, in the order of the global batch."""
        return {"step": step} | {name: dist.gather(tensors[name]).tolist() for name in ("epochs", "ids")}

    @staticmethod
    def _is_fault(record: dict[str, Any]) -> bool:
        """Whether the step was not finite for no good reason: a loss scale above 1 is one, since it will be halved."""
        return record.get("skipped", False) and record.get("loss_scale", 1.0) <= 1.0

    def restart_clock(self) -> None:
        """Leave what happened since the last flush (an evaluation, a save) out of images_per_second."""
        self.flushed = time.perf_counter()

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Write an evaluation (nothing, when it has no numbers)."""
        if not numbers:
            return
        record = {"step": step, "epoch": round(step * self.unit / self.num_samples, 4)} | numbers
        self._write(self.path, [record])
        self._mirrored(lambda mirror: mirror.log(record))
        text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        self._say(f"step {step}: {text}")

    def picture(self, file: Path) -> None:
        """Mirror a picture that lies in the run's folder."""

        def log_picture(mirror: Any) -> None:
            import wandb

            mirror.log({file.stem.split("-")[0]: wandb.Image(str(file))})

        self._mirrored(log_picture)

    def _write(self, path: Path, records: list[dict[str, Any]]) -> None:
        if not dist.is_main():
            return
        try:
            with path.open("a") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            raise RankError(
                f"{path}: cannot be written ({error.strerror}); make room, the same command goes on"
            ) from None

    def _mirrored(self, action: Callable[[Any], None]) -> None:
        """Do something with the mirror; when it fails, go on without it."""
        if self.mirror:
            try:
                action(self.mirror)
            except Exception as error:  # the mirror must never end a run
                log.warning("wandb failed (%s): going on without it; metrics.jsonl has everything", error)
                self.mirror = None

    def _show(self, last: dict[str, Any]) -> None:
        if not self.progress:
            return
        share = last["data_wait"] * last["images_per_second"] / self.unit
        loss, rate = last.get("loss", math.nan), last["images_per_second"]
        text = f"loss {loss:.4f}  {rate:,.0f} images/s  data {min(share, 1):.0%}"
        self.progress.update(self.progress.task_ids[0], completed=last["step"], text=text)
        if self.progress.disable and time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = (self.total - last["step"]) * self.unit / max(last["images_per_second"], 1e-9)
            log.info(
                "step %d/%d  %s  %s left", last["step"], self.total, text, time.strftime("%H:%M:%S", time.gmtime(left))
            )

    def _say(self, text: str) -> None:
        if self.progress and not self.progress.disable:
            self.progress.console.print(text)
        elif self.progress:
            log.info(text)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl up to the first line that is not whole, as a kill leaves it."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`, and a line that a kill has cut. Reads back from the end, as far as needed."""
    path.touch()
    if not path.stat().st_size:
        return
    evaluations, cut = [], 0
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = len(content)
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            line, end_of_line, end = content[start:end], end, start
            record = _parsed(line)
            if record is None or record["step"] > step:
                continue
            if "lr" in record or "ids" in record:  # a step: what lies before it is older
                cut = end_of_line
                break
            evaluations.append(line)
    with path.open("r+b") as stream:
        stream.truncate(cut)
        stream.seek(cut)
        stream.writelines(reversed(evaluations))


def records_with(path: Path, key: str) -> list[dict[str, Any]]:
    """The records that have this key; only those are parsed."""
    if not path.stat().st_size:
        return []
    found, word, place = [], f'"{key}": '.encode(), 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while (place := content.find(word, place)) >= 0:
            start, end = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
            found.append(json.loads(content[start:end]))
            place = end
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def summary(path: Path) -> dict[str, float]:
    """Final numbers of a run: mean training loss of the last steps, bad samples, and the last evaluation."""
    records = read(path)
    steps = [r for r in records if "lr" in r]
    evaluations = [r for r in records if "lr" not in r]
    recent = [r["loss"] for r in steps if "loss" in r][-RECENT:]
    found = {"loss": sum(recent) / len(recent), "bad": sum(r.get("bad", 0) for r in steps)}
    if skipped := sum(r.get("skipped", False) for r in steps):
        found["skipped"] = skipped
    if evaluations:
        found |= {k: v for k, v in evaluations[-1].items() if k not in ("step", "epoch")}
    return found


def _bar(verb: str, step: int, total: int) -> Progress:
    terminal = sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True), disable=not terminal)
    progress.add_task(verb, total=total, completed=step, text="")
    progress.start()
    return progress


def _wandb(path: Path, config: RunConfig, verb: str) -> Any:
    """The mirror, or None. Its run id lives in the run's folder, so a resumed run is one wandb run."""
    if config.track.wandb == "off":
        return None
    try:
        import wandb

        file = path / "wandb_id"
        if not file.is_file():
            file.write_text(secrets.token_hex(4))
        mirror = wandb.init(
            project=config.track.project, id=file.read_text().strip(), resume="allow", dir=str(path), name=path.name,
            job_type=verb, mode=config.track.wandb, config=configuration.to_dict(config),
        )  # fmt: skip
        mirror.define_metric("step")
        mirror.define_metric("*", step_metric="step")
        return mirror
    except Exception as error:  # the mirror must never end a run
        log.warning("wandb is not available (%s): going on without it; metrics.jsonl has everything", error)
        return None
