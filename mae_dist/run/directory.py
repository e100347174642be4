"""RunDir: the folder of a run. What it holds is enough to resume the run, to report on it and to start others from it.

`layout` lists the files. Rank 0 writes them; a kill at any moment leaves a folder from which the same command resumes.
A damaged checkpoint is skipped with a warning, and the one before is used.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mae_dist import atomic, devices, dist, errors, watchdog
from mae_dist import config as configuration
from mae_dist.run import checkpoint, events, identity, jsonl, layout, lock
from mae_dist.run.layout import step_of
from mae_dist.schema import RunConfig
from mae_dist.signals import Stopped

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "einops")
"""Packages whose versions a start records."""


class RunDir:
    """A run's folder. Methods that write are called on every rank, and rank 0 writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @staticmethod
    def existing(path: str | Path, field: str) -> RunDir:
        """The run at `path`, or ValueError naming the field that pointed there."""
        run = RunDir(path)
        if not (run.path / layout.CONFIG).is_file():
            what = "holds no config.yaml, so it is no run of mae-dist" if run.path.is_dir() else "no such folder"
            raise ValueError(f"{field}={path}: {what}; give the out= folder of an earlier run")
        return run

    def open(
        self, verb: str, config: RunConfig, data_fingerprint: str, total_steps: int = 0, start: Path | None = None
    ) -> bool:
        """Start or resume a run with these settings in this folder; False where the run is already finished.

        ``total_steps``: 0 for a verb that trains nothing; ``start``: the checkpoint of init_from. Raises ValueError, on
        every rank alike, where the folder holds another run or other files, another process writes to it, or it cannot
        be written.
        """
        dist.run_on_rank0(lambda: identity.refuse_others(self.path, verb, config, data_fingerprint))
        if dist.run_on_rank0(self.result):
            return False
        head = {"format": layout.FORMAT, "verb": verb, "data_fingerprint": data_fingerprint, "total_steps": total_steps}
        if start is not None:
            began = identity.started_from(self.path) if self.checkpoints() else None
            head[layout.STARTED_FROM] = began or identity.of_checkpoint(start)
        dist.run_on_rank0(lambda: lock.acquire(self.path))
        dist.run_on_rank0(lambda: self._prepare(head, config))
        return True

    def _prepare(self, head: dict[str, Any], config: RunConfig) -> None:
        """Write config.yaml, make the folders, and remove what an unfinished save left."""
        text = yaml.safe_dump(head, sort_keys=False) + configuration.dump(config)
        jsonl.write_atomic(self.path / layout.CONFIG, text)
        for name in ("checkpoints", "pictures"):
            (self.path / name).mkdir(exist_ok=True)
        for leftover in (self.path / "checkpoints").iterdir():
            if layout.LEFTOVER.match(leftover.name):
                atomic.remove(leftover)

    def settings(self) -> tuple[str, str, Any]:
        """(verb, fingerprint of the data, config) in config.yaml."""
        return layout.settings(self.path)

    def record_launch(self, step: int, device: torch.device) -> None:
        """Append the event `start` at `step`: the settings of the run, the software and the machine; after an earlier
        start also the last step that was recorded (`reached`) and the seconds since then (`away`).
        """
        if not dist.is_main():
            return
        config, metrics = layout.read_config(self.path), self.path / layout.METRICS
        facts = {"step": step, "total_steps": config["total_steps"], "data_fingerprint": config["data_fingerprint"]}
        if reached := jsonl.last_step(metrics):
            facts |= {"reached": reached, "away": round(time.time() - metrics.stat().st_mtime, 1)}
        events.append(self.path, "start", **facts, **provenance(device))

    @contextmanager
    def record_end(self) -> Iterator[None]:
        """Context manager: appends the event `stop` or `fail` where an exception ends its block."""
        with watchdog.recorded_by(self._record_exception):
            try:
                yield
            except BaseException as error:
                with suppress(OSError):  # the disk may be full
                    self._record_exception(error)
                raise

    def _record_exception(self, error: BaseException) -> None:
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Stopped | KeyboardInterrupt):
            reason = "signal" if isinstance(error, Stopped) else "keyboard"
            if dist.is_main():
                step = jsonl.last_step(self.path / layout.METRICS)
                events.append(self.path, "stop", reason=reason, step=step, message=message)
        elif errors.is_reported_by(dist.rank(), error):
            events.append(self.path, "fail", reason=errors.reason(error), rank=dist.rank(), message=message)

    def launch_before(self, step: int) -> dict[str, Any]:
        """The last event `start` before the run made `step`; {} where there is none."""
        starts = events.of(self.path, "start")
        return next((start for start in reversed(starts) if start["step"] < step), {})

    def record_classes(self, names: list[str] | None) -> None:
        """Write the names of the classes of a run that is trained on labels, where they are known."""
        if dist.is_main() and names:
            jsonl.write_atomic(self.path / layout.CLASSES, json.dumps({"classes": names}) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which marks the run as finished, and append the event `finish`."""
        if dist.is_main():
            jsonl.write_atomic(self.path / layout.RESULT, json.dumps(result, indent=1) + "\n")
            events.append(self.path, "finish", step=layout.read_config(self.path)["total_steps"])

    def result(self) -> dict[str, Any] | None:
        """The final numbers, or None while the run is incomplete."""
        return layout.result(self.path)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return layout.checkpoints(self.path)

    def save(
        self, step: int, parts: dict[str, checkpoint.Part], keep: int, keep_every: int | None = None,
        group: Any = None, keep_best: str | None = None,
    ) -> None:  # fmt: skip
        """Save the checkpoint of `step`, all ranks together (of `group`, if given), each its own `parts`; then remove
        all but this one, the newest `keep`, those whose step is a multiple of `keep_every`, and the best by `keep_best`
        (see `layout.best`). Newer ones than this are damaged: a run goes on from the newest that is not.

        Raises MachineFault on every rank where it cannot be written; the earlier checkpoints are then still there.
        """

        def prune() -> None:
            best = layout.best(self.path, keep_best) if keep_best else None
            wanted = {step, *([] if best is None else [best.step])}
            for old in self.checkpoints()[:-keep]:
                if step_of(old) not in wanted and (keep_every is None or step_of(old) % keep_every):
                    atomic.remove(old)

        checkpoint.save(self.path / "checkpoints" / f"step-{step:09d}", step, parts, group)
        dist.run_on_rank0(prune, group)

    def restore(self, state: dict[str, Tensor]) -> int:
        """Fill `state` in place from the newest undamaged checkpoint, and return its step; 0 where there is none."""
        found = dist.run_on_rank0(lambda: str(self.newest() or ""))
        if not found:
            return 0
        checkpoint.load(Path(found), state)
        return step_of(Path(found))

    def at(self, step: int, field: str) -> Path:
        """The checkpoint of a step; ValueError, which begins with `field`, where there is none or it is damaged."""
        path = layout.checkpoint_at(self.path, step, field)
        if (damage := checkpoint.verify(path)) is not None:
            raise ValueError(f"{field}: {path} is damaged ({damage}); choose another step")
        return path

    def forget(self, step: int) -> None:
        """Remove the checkpoints of `step` and later, which a run that rewinds to an earlier step will make again.
        Raises MachineFault where one stays.
        """
        for path in self.checkpoints():
            if step_of(path) >= step:
                atomic.remove(path)
                if path.exists():
                    raise errors.MachineFault(f"{path}: can neither be removed nor renamed, so the run cannot rewind")

    def newest(self, before: int | None = None) -> Path | None:
        """The newest undamaged checkpoint, of those before a step where one is given; None where there is none.

        Warns of each damaged one that it skips, and raises ValueError where all are damaged.
        """
        paths = [path for path in self.checkpoints() if before is None or step_of(path) < before]
        for path in reversed(paths):
            damage = checkpoint.verify(path)
            if damage is None:
                return path
            log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, damage)
        if paths:
            raise ValueError(
                f"{self.path}: all {len(paths)} checkpoints are damaged; put one back, or remove the folder"
            )
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """The software and the machine of this process, and the time."""
    from importlib.metadata import version

    return {
        "time": events.now(),
        "git": layout.revision(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "hostname": platform.node(),
        "device": devices.name_of(device),
        "ranks": dist.world(),
        "command": shlex.join(sys.argv),
    }
