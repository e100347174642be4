"""Records a run: metrics.jsonl first, then wandb as an optional mirror, and a progress bar or lines in a log.

metrics.jsonl has exactly one line for each step ("kind": "step"), also after kills and resumes, one for each evaluation
("kind": "evaluation"), and one for each flush but the first of a start with what limited it ("kind": "interval"). With
`track.ids`, ids.jsonl has one line for each step with the samples it was trained on. Losses stay on the device until
`flush`, so a step costs no synchronisation; all ranks flush together.
"""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mae_dist import clock, cost, devices, dist, printed
from mae_dist.errors import MachineFault
from mae_dist.run import events, interval, jsonl, layout, warned
from mae_dist.run.interval import RankTime
from mae_dist.run.log_file import unprinted
from mae_dist.run.mirror import Mirror
from mae_dist.schema import RunConfig, TrainingConfig

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES, SILENCE = 10.0, 30.0
"""Least time between two lines of progress in a log; time after which a step has one before its loss is read."""
WATCHED_SECONDS = 30.0
"""Seconds over which what limits the run is judged for the log, which has a line where that has changed."""


class Tracker:
    """Context manager that records a run from `step` on. ``num_bad``: unreadable samples since the data last changed,
    at step ``data_since``; ``skipped``: steps so far whose gradient was not finite, overflows that a loss scale mends
    left out. The ``peak`` of all devices together, in operations a second, gives the MFU; 0: not known.
    """

    def __init__(
        self, path: Path, config: TrainingConfig, verb: str, step: int, total: int, num_samples: int, peak: float = 0.0
    ):
        self.path, self.total, self.num_samples = path / layout.METRICS, total, num_samples
        self.config = config
        self.ids = path / "ids.jsonl" if config.track.ids else None
        self.unit, self.scaled = config.train.global_batch, config.train.precision == "fp16"
        self.waiting: list[tuple[dict[str, Any], Mapping[str, float | clock.Spans], dict[str, Tensor]]] = []
        self.flushed, self.last_line, self.spoke, self.begun = time.perf_counter(), -math.inf, -math.inf, False
        self.peak = peak
        self.hosts: list[str] = dist.gather_objects(socket.gethostname())
        self.watched: list[RankTime] = []
        self.said = "compute", 0
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

    def step(
        self, step: int, lr: float, seconds: Mapping[str, float | clock.Spans], saving: bool, tensors: dict[str, Tensor]
    ) -> None:
        """Record a step at the next flush. ``seconds``: `data_wait`, `communication` (not recorded for each step) and,
        after a save, `stall`; ``saving``: a checkpoint is being written; ``tensors``: on the device `bad`, `ids`,
        `epochs` (this rank's), `loss`, `grad_norm`, `loss_scale` (all ranks').
        """
        plain = {"kind": jsonl.STEP, "step": step, "epoch": self._epoch(step), "lr": lr}
        self.waiting.append((plain | ({"saving": True} if saving else {}), seconds, tensors))
        if self.progress and time.perf_counter() - max(self.last_line, self.flushed, self.spoke) > SILENCE:
            self.spoke = time.perf_counter()
            self.progress.update(self.progress.task_ids[0], completed=step)
            self._print(
                f"step {step}/{self.total}; the loss is shown every {self.config.track.every} steps (track.every)"
            )

    def _epoch(self, step: int) -> float:
        return round(step * self.unit / self.num_samples, 4)

    def flush(self) -> None:
        """Write the steps since the last flush, and what limited them."""
        if not self.waiting:
            return
        plain, seconds, tensors = zip(*self.waiting, strict=True)
        self.waiting = []
        shared = torch.stack([torch.stack([t[k] for k in ("loss", "grad_norm", "loss_scale")]) for t in tensors])
        values, now = shared.tolist(), time.perf_counter()  # the device has done all steps
        waits = [{name: clock.seconds(spans) for name, spans in row.items()} for row in seconds]
        bads = torch.stack([t["bad"] for t in tensors]).tolist()
        rows = self._of_ranks(shared, [*bads, *self._time(waits, now - self.flushed)])
        rate = len(plain) * self.unit / (now - self.flushed)
        self.flushed = now
        records = []
        for number, (known, wait, (loss, norm, scale)) in enumerate(zip(plain, waits, values, strict=True)):
            record = known | {name: round(s, 5) for name, s in wait.items() if name in ("data_wait", "stall")}
            record |= {"images_per_second": float(f"{rate:.6g}")}
            record |= {k: v for k, v in (("loss", loss), ("grad_norm", norm)) if math.isfinite(v)}
            record |= {"loss_scale": scale} if self.scaled else {}
            record |= {} if math.isfinite(norm) else {"skipped": True}
            bad = int(sum(row[number] for row in rows))
            records.append(record | ({"bad": bad} if bad else {}))
        self.num_bad += sum(record.get("bad", 0) for record in records)
        self.skipped += [record["step"] for record in records if is_fault(record)]
        ranks = [RankTime(*row[len(plain) :]) for row in rows]
        steps = range(records[0]["step"] - 1, records[-1]["step"])
        flops = cost.training_flops(self.config, steps, self.total)
        mfu = rate * flops / self.peak if self.peak else 0.0
        summed = interval.record(records[-1]["step"], ranks, self.hosts, mfu)
        self._write(self.path, records + [summed] * self.begun)
        self._mirror(*records, *[summed] * self.begun)
        if dist.is_main():
            before, now_at = self._epoch(records[0]["step"] - 1), records[-1]
            found = warned.outside_band(self.path.parent, self.config, before, now_at["epoch"])
            warned.warn(self.path.parent, now_at["step"], found)
        if self.ids:
            self._write(self.ids, [self._ids(known["step"], t) for known, t in zip(plain, tensors, strict=True)])
        self._show(records, summed)
        if self.begun:  # the first flush of a start waited for the loader to start
            self._watch(ranks, records[-1]["step"], mfu)
        self.begun = True

    def _time(self, waits: list[dict[str, float]], seconds: float) -> RankTime:
        """This rank's time since the last flush; a save has restarted the clock, so its stall comes on top."""
        data, communication, stall = (
            sum(wait.get(name, 0.0) for wait in waits) for name in ("data_wait", "communication", "stall")
        )
        return RankTime(seconds + stall, data, communication, stall, devices.memory_used())

    def _of_ranks(self, like: Tensor, own: list[float]) -> list[list[float]]:
        """The numbers of each rank, in rank order; the device of `like` sends them."""
        table = torch.zeros(dist.world(), len(own), dtype=torch.float64, device=like.device)
        table[dist.rank()] = torch.tensor(own, dtype=torch.float64)
        return dist.all_reduce_sum(table).tolist()

    def _ids(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Epochs and ids of a step's samples over all ranks, in the order of the global batch."""
        return {"step": step} | {name: dist.gather(tensors[name]).tolist() for name in ("epochs", "ids")}

    def _watch(self, ranks: list[RankTime], step: int, mfu: float) -> None:
        """Log what has limited the last WATCHED_SECONDS, where that is another thing, or rank, than the last time."""
        self.watched = interval.added(ranks, self.watched)
        if self.watched[0].seconds < WATCHED_SECONDS:
            return
        found = interval.record(step, self.watched, self.hosts, mfu)
        self.watched, before = [], self.said
        noticeable = found["waited"] >= interval.NOTICEABLE
        self.said = found["limit"], found["rank"] if noticeable else 0
        if dist.is_main() and self.said != before:
            log.log(
                logging.WARNING if noticeable else logging.INFO, "step %d: %s%s", step,
                interval.describe(found, len(ranks)), interval.advice(found["limit"], self.workers),
            )  # fmt: skip

    def restart_clock(self) -> None:
        """Leave the time since the last flush (an evaluation, a save) out of images_per_second."""
        self.flushed = time.perf_counter()

    def numbers(self, step: int, numbers: dict[str, Any]) -> None:
        """Record an evaluation, unless it has no numbers. What is none, as a list of them, is not shown."""
        if not numbers:
            return
        record = {"kind": jsonl.EVALUATION, "step": step, "epoch": self._epoch(step)} | numbers
        self._write(self.path, [record])
        self._mirror(record)
        text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, int | float))
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

    def _show(self, records: list[dict[str, Any]], summed: dict[str, Any]) -> None:
        if not self.progress:
            return
        losses, last = [record["loss"] for record in records if "loss" in record], records[-1]
        loss, rate = sum(losses) / len(losses) if losses else math.nan, last["images_per_second"]
        mfu = f"  MFU {summed['mfu']:.0%}" if "mfu" in summed else ""
        text = f"loss {loss:.4f}  lr {last['lr']:.3g}  {printed.rate(rate)} images/s  data {summed['data']:.0%}{mfu}"
        text += f"  {summed['memory']:.3g} GB"
        self.progress.update(self.progress.task_ids[0], completed=last["step"], text=text)
        ended = last["step"] == self.total
        if ended or time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = timedelta(seconds=round(cost.seconds_left(self.config, last["step"], self.total, max(rate, 1e-3))))
            logger = log if self.progress.disable else unprinted
            logger.info("step %d/%d  %s  %s left", last["step"], self.total, text, left)

    def _print(self, text: str) -> None:
        if self.progress and not self.progress.disable:
            self.progress.console.print(text)
            unprinted.info("%s", text)
        elif self.progress:
            log.info("%s", text)


def last_speed(run: Path) -> float:
    """Images a second of the last flush of a run; 0 where there is none."""
    speeds = (record.get("images_per_second", 0.0) for record in jsonl.backwards(run / layout.METRICS))
    return next(filter(None, speeds), 0.0)


def is_fault(record: dict[str, Any]) -> bool:
    """Whether a step was skipped, unless its loss scale was above 1: that one is halved, and the next step fits."""
    return record.get("skipped", False) and record.get("loss_scale", 1.0) <= 1.0


def summary(path: Path) -> dict[str, float]:
    """Final numbers of a metrics.jsonl: mean training loss of the last steps, bad samples, and the last evaluation."""
    records = jsonl.read(path)
    steps, evaluations = ([r for r in records if r.get("kind") == kind] for kind in (jsonl.STEP, jsonl.EVALUATION))
    recent = [r["loss"] for r in steps if "loss" in r][-layout.recent(len(steps)) :]
    found = {"loss": sum(recent) / len(recent), "bad": sum(r.get("bad", 0) for r in steps)}
    if skipped := sum(r.get("skipped", False) for r in steps):
        found["skipped"] = skipped
    if evaluations:
        found |= {k: v for k, v in evaluations[-1].items() if isinstance(v, int | float) and k not in ("step", "epoch")}
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
        TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True), disable=not terminal)
    progress.add_task(verb, total=total, completed=step, text="")
    progress.start()
    return progress
