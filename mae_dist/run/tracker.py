"""Records a run: metrics.jsonl first, then wandb as an optional mirror, and a progress bar or lines in a log.

metrics.jsonl has exactly one line for each step ("kind": "step"), also after kills and resumes, and one for each
evaluation ("kind": "evaluation"). With `track.ids`, ids.jsonl has one line for each step with the samples it was
trained on. Losses stay on the device until `flush`, so a step costs no synchronisation; all ranks flush together.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mae_dist import dist, printed
from mae_dist.errors import MachineFault
from mae_dist.run import events, jsonl, layout
from mae_dist.run.mirror import Mirror
from mae_dist.schema import RunConfig

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Least time between two lines of progress in a log, where there is no terminal for a bar."""
WATCHED_SECONDS, MOST_WAITING = 30.0, 0.1
"""Time, from the first flush of a start on, after which a warning says that more than this share went into waiting for
data.
"""


class Tracker:
    """Context manager that records a run from `step` on. ``num_bad``: unreadable samples since the data last changed,
    at step ``data_since``; ``skipped``: steps so far whose gradient was not finite, overflows that a loss scale mends
    left out.
    """

    def __init__(self, path: Path, config: RunConfig, verb: str, step: int, total: int, num_samples: int):
        self.path, self.total, self.num_samples = path / layout.METRICS, total, num_samples
        self.ids = path / "ids.jsonl" if config.track.ids else None
        self.unit, self.scaled = config.train.global_batch, config.train.precision == "fp16"
        self.waiting: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.flushed, self.last_line = time.perf_counter(), -math.inf
        self.watched: tuple[float, float] | None = None
        self.workers = config.machine.workers
        self.progress, self.mirror = None, None
        self.rewind(step)
        if dist.is_main():
            self.progress = _bar(verb, step, total)
            self.mirror = Mirror(path, config, verb)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        if self.mirror:
            self.mirror.finish()

    def rewind(self, step: int) -> None:
        """Drop the records of later steps, which will be made again, and count ``num_bad`` and ``skipped`` anew."""
        self.waiting = []

        def cut() -> tuple[int, int, list[int]]:
            if self.ids:
                jsonl.cut_after(self.ids, step)
            jsonl.cut_after(self.path, step)
            since = events.data_since(self.path.parent)
            bad = sum(record["bad"] for record in jsonl.records_with(self.path, "bad") if record["step"] > since)
            return since, bad, [r["step"] for r in jsonl.records_with(self.path, "skipped") if is_fault(r)]

        self.data_since, self.num_bad, self.skipped = dist.run_on_rank0(cut)
        if self.mirror:
            self.mirror.rewind(len(jsonl.read(self.path)))
        self.restart_clock()

    def step(self, step: int, lr: float, seconds: dict[str, float], saving: bool, tensors: dict[str, Tensor]) -> None:
        """Record a step at the next flush. ``seconds``: by what they were spent on; ``saving``: a checkpoint is being
        written; ``tensors``: on the device `bad`, `ids`, `epochs` (this rank's), `loss`, `grad_norm`, `loss_scale`
        (all ranks').
        """
        plain = {"kind": jsonl.STEP, "step": step, "epoch": self._epoch(step), "lr": lr}
        plain |= {name: round(value, 5) for name, value in seconds.items()} | ({"saving": True} if saving else {})
        self.waiting.append((plain, tensors))

    def _epoch(self, step: int) -> float:
        return round(step * self.unit / self.num_samples, 4)

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
        self._watch(sum(record["data_wait"] for record in plain), now - self.flushed, plain[-1]["step"])
        self.flushed = now
        records = []
        for known, bad, (loss, norm, scale) in zip(plain, bads, shared.tolist(), strict=True):
            record = known | {"images_per_second": float(f"{rate:.6g}")}
            record |= {k: v for k, v in (("loss", loss), ("grad_norm", norm)) if math.isfinite(v)}
            record |= {"loss_scale": scale} if self.scaled else {}
            record |= {} if math.isfinite(norm) else {"skipped": True}
            records.append(record | ({"bad": int(bad)} if bad else {}))
        self.num_bad += sum(record.get("bad", 0) for record in records)
        self.skipped += [record["step"] for record in records if is_fault(record)]
        self._write(self.path, records)
        self._mirror(*records)
        if self.ids:
            self._write(self.ids, [self._ids(known["step"], t) for known, t in zip(plain, tensors, strict=True)])
        self._show(records[-1])

    def _ids(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Epochs and ids of a step's samples over all ranks, in the order of the global batch."""
        return {"step": step} | {name: dist.gather(tensors[name]).tolist() for name in ("epochs", "ids")}

    def _watch(self, waited: float, seconds: float, step: int) -> None:
        """Warn, once a start, when the loop waits much for data; ``waited`` of the ``seconds`` since the last flush."""
        if self.watched is None:  # the first flush waited for the loader to start
            self.watched = 0.0, 0.0
            return
        before = self.watched[1]
        self.watched = waited, seconds = self.watched[0] + waited, before + seconds
        if before < WATCHED_SECONDS <= seconds and waited > MOST_WAITING * seconds and dist.is_main():
            log.warning(
                "step %d: %.0f %% of the time went into waiting for data (machine.workers=%d); `mae-dist bench data` "
                "with this run's settings says what to change", step, 100 * waited / seconds, self.workers,
            )  # fmt: skip

    def restart_clock(self) -> None:
        """Leave the time since the last flush (an evaluation, a save) out of images_per_second."""
        self.flushed = time.perf_counter()

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Record an evaluation, unless it has no numbers."""
        if not numbers:
            return
        record = {"kind": jsonl.EVALUATION, "step": step, "epoch": self._epoch(step)} | numbers
        self._write(self.path, [record])
        self._mirror(record)
        text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        self._print(f"step {step}: {text}")

    def picture(self, file: Path) -> None:
        """Send a picture in the run's folder to wandb."""
        if self.mirror:
            self.mirror.picture(file)

    def _write(self, path: Path, records: list[dict[str, Any]]) -> None:
        if not dist.is_main():
            return
        try:
            jsonl.append(path, *records)
        except OSError as error:
            raise MachineFault(
                f"{path}: cannot be written ({error.strerror}); make room, the same command resumes"
            ) from error

    def _mirror(self, *records: dict[str, Any]) -> None:
        for record in records if self.mirror else ():
            self.mirror.log(record)  # pyright: ignore[reportOptionalMemberAccess]

    def _show(self, last: dict[str, Any]) -> None:
        if not self.progress:
            return
        share = last["data_wait"] * last["images_per_second"] / self.unit
        loss, rate = last.get("loss", math.nan), last["images_per_second"]
        text = f"loss {loss:.4f}  {printed.rate(rate)} images/s  data {min(share, 1):.0%}"
        self.progress.update(self.progress.task_ids[0], completed=last["step"], text=text)
        if self.progress.disable and time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = timedelta(seconds=round((self.total - last["step"]) * self.unit / max(rate, 1e-3)))
            log.info("step %d/%d  %s  %s left", last["step"], self.total, text, left)

    def _print(self, text: str) -> None:
        if self.progress and not self.progress.disable:
            self.progress.console.print(text)
        elif self.progress:
            log.info(text)


def is_fault(record: dict[str, Any]) -> bool:
    """Whether a step was skipped, unless its loss scale was above 1: that one is halved, and the next step fits."""
    return record.get("skipped", False) and record.get("loss_scale", 1.0) <= 1.0


def summary(path: Path) -> dict[str, float]:
    """Final numbers of a metrics.jsonl: mean training loss of the last steps, bad samples, and the last evaluation."""
    records = jsonl.read(path)
    steps = [r for r in records if r["kind"] == jsonl.STEP]
    evaluations = [r for r in records if r["kind"] == jsonl.EVALUATION]
    recent = [r["loss"] for r in steps if "loss" in r][-layout.RECENT :]
    found = {"loss": sum(recent) / len(recent), "bad": sum(r.get("bad", 0) for r in steps)}
    if skipped := sum(r.get("skipped", False) for r in steps):
        found["skipped"] = skipped
    if evaluations:
        found |= {k: v for k, v in evaluations[-1].items() if k not in ("kind", "step", "epoch")}
    return found


def mirror_result(path: Path, config: RunConfig, verb: str, result: dict[str, Any]) -> None:
    """Mirror the final numbers of a run that no tracker has recorded, or not all."""
    if dist.is_main():
        mirror = Mirror(path, config, verb)
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        step = jsonl.last_step(path / layout.METRICS) if (path / layout.METRICS).is_file() else 0
        mirror.log({"kind": jsonl.EVALUATION, "step": step} | numbers)
        mirror.finish()


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
