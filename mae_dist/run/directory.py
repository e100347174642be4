"""RunDir: the folder of a run, and its checkpoints. What it holds is enough to go on, to report and to start from.

    RUN/
      config.yaml        verb, fingerprint of the data, and every resolved setting
      provenance.jsonl   one line a start: time, git, versions, device, world, command, step
      ends.jsonl         one line an end before the run was finished, where there was time to say why
      metrics.jsonl      written by `track`
      pictures/          reconstructions
      checkpoints/
        step-000001000/  manifest.json (step, files with sizes and sha256) and safetensors shards
        .saving-...      a save that has not finished; never read
      result.json        final numbers; only a finished run has it
      jobs/, code/       what a launcher puts there, see `jobs`

Promises: a checkpoint is complete or not there (torch.distributed.checkpoint writes into a temporary folder, which is
renamed last; when that fails, the disk being full say, it is removed and the others stay); a damaged one is skipped,
loudly, in favour of the one before; it loads on any number of ranks, whatever shared the tensors when it was written.
State is tensors only, in safetensors, so that reading one never executes anything. Knows no model and no loop.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from mae_dist import config as configuration
from mae_dist import dist
from mae_dist.run import checkpoint, events, layout
from mae_dist.run.layout import step_of, write_text
from mae_dist.schema import RunConfig
from mae_dist.signals import Stopped

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "webdataset", "einops")
PATIENCE = 100.0
"""Seconds to wait for the end of a process that is at work in a run; NFS forgets a dead machine's locks after 90."""
_claims: dict[Path, IO[str]] = {}
"""Locked files of the runs that this process is at work in; closing one would give its run away."""


class RunDir:
    """A run's folder; methods that write are called on every rank and write on rank 0."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @staticmethod
    def existing(path: str | Path, field: str) -> RunDir:
        """The run at `path`, or ValueError naming the field that pointed there."""
        run = RunDir(path)
        if not (run.path / "config.yaml").is_file():
            what = "holds no config.yaml, so it is no run of mae-dist" if run.path.is_dir() else "no such folder"
            raise ValueError(f"{field}={path}: {what}; give the out= folder of an earlier run")
        return run

    def open(self, verb: str, config: RunConfig, data_fingerprint: str) -> bool:
        """Start, or go on in, this folder with these settings; False when the run is finished already.

        Raises ValueError, on every rank alike, when the folder holds another run or something else, when another
        process is at work in it, or when it cannot be written.
        """
        dist.run_on_rank0(lambda: layout.refuse_others(self.path, verb, config, data_fingerprint))
        if dist.run_on_rank0(self.result):
            return False
        dist.run_on_rank0(self._claim)
        dist.run_on_rank0(lambda: self._prepare(verb, config, data_fingerprint))
        return True

    def _claim(self) -> None:
        """Be the only process that writes here, until this one ends. One that has just been killed may still be ending,
        and a network file system remembers the locks of a dead machine for a while: so this waits, and says so.
        """
        if self.path.absolute() in _claims:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / layout.LOCK).open("a+")
        except OSError as error:
            raise ValueError(f"out={self.path}: cannot be written ({error.strerror}); choose another folder") from error
        deadline, told = time.monotonic() + PATIENCE, False
        while not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            if time.monotonic() > deadline:
                raise ValueError(f"out={self.path}: {holder} is at work in this run; end it, or choose another folder")
            if not told:
                log.warning("%s: %s is at work in this run; waiting for its end for %g s", self.path, holder, PATIENCE)
                told = True
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        _claims[self.path.absolute()] = lock

    def _prepare(self, verb: str, config: RunConfig, data_fingerprint: str) -> None:
        """Make the folder, config.yaml before all else, and clear what an unfinished save left."""
        self.path.mkdir(parents=True, exist_ok=True)
        head = yaml.safe_dump({"verb": verb, "data_fingerprint": data_fingerprint}, sort_keys=False)
        write_text(self.path / "config.yaml", head + configuration.dump(config))
        for name in ("checkpoints", "pictures"):
            (self.path / name).mkdir(exist_ok=True)
        for leftover in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(leftover)

    def settings(self) -> tuple[str, str, Any]:
        """(verb, fingerprint of the data, config) as config.yaml has them."""
        return layout.settings(self.path)

    def record_launch(self, step: int, device: torch.device) -> None:
        """Append a line of provenance, where there was a start before with the step that it reached (`reached`) and the
        seconds since it wrote that down (`away`).
        """
        if dist.is_main():
            metrics = self.path / "metrics.jsonl"
            steps = [record["step"] for record in layout.recent(metrics) if "lr" in record]
            before = {"reached": steps[-1], "away": round(time.time() - metrics.stat().st_mtime, 1)} if steps else {}
            line = {"step": step, "data_fingerprint": self.settings()[1]} | before | provenance(device)
            with (self.path / "provenance.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    @contextmanager
    def record_end(self) -> Iterator[None]:
        """Note what ends the block early: told to stop, or failed, and in which words."""
        try:
            yield
        except BaseException as error:
            if dist.is_main():
                state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
                why = " ".join(str(error).split()) or type(error).__name__
                with suppress(OSError), (self.path / layout.ENDS).open("a") as stream:  # the disk may be full
                    stream.write(json.dumps({"time": events.now(), "state": state, "why": why}) + "\n")
            raise

    def started(self, before: int) -> dict[str, Any]:
        """The line of provenance of the start that made the step `before`; {} when there is none."""
        path = self.path / "provenance.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return next((line for line in reversed(lines) if line["step"] < before), {})

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which ends the run."""
        if dist.is_main():
            write_text(self.path / "result.json", json.dumps(result, indent=1) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The final numbers, or None while the run is incomplete."""
        return layout.result(self.path)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return layout.checkpoints(self.path)

    def save(
        self, step: int, state: dict[str, Tensor], keep: int, keep_every: int | None = None,
        group: Any = None,
    ) -> None:  # fmt: skip
        """Save `state` (tensors or DTensors by name) as step `step`, all ranks together (of `group`, if given).

        Removes all but the newest `keep` and those whose step is a multiple of `keep_every`. Raises ValueError, on
        every rank, when it cannot be written; nothing of it is left then.
        """
        final = self.path / "checkpoints" / f"step-{step:09d}"
        temporary = final.with_name(f".saving-{step:09d}")

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def publish() -> None:
            files = {file.name: checkpoint.measure(file, sync=True) for file in sorted(temporary.iterdir())}
            manifest = {"step": step, "world": dist.world(), "num_tensors": len(state), "files": files}
            write_text(temporary / checkpoint.MANIFEST, json.dumps(manifest, indent=1) + "\n")
            replaced = final.with_name(f".replaced-{step:09d}")
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            checkpoint.sync_directory(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            for old in self.checkpoints()[:-keep]:
                if keep_every is None or step_of(old) % keep_every:
                    shutil.rmtree(old)

        writer = dcp.HuggingFaceStorageWriter(str(temporary), checkpoint.pieces(state), save_distributed=True)
        try:
            dist.run_on_rank0(prepare, group)
            dcp.save(state, storage_writer=writer, process_group=group)
            dist.run_on_rank0(publish, group)
        except (ValueError, OSError, dcp.CheckpointException) as error:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, dcp.CheckpointException):
                error = next(iter(error.failures.values()))[0]
            raise ValueError(
                f"the checkpoint of step {step} could not be written to {final.parent}: {error}; is the disk full?"
            ) from None

    def restore(self, state: dict[str, Tensor]) -> int:
        """Fill `state` in place from the newest undamaged checkpoint; its step, or 0 when there is none."""
        found = dist.run_on_rank0(self.newest)
        if found is None:
            return 0
        checkpoint.load(found, state)
        return step_of(found)

    def forget(self, step: int) -> None:
        """Remove the checkpoints of `step` and later, which a run that goes back to before it will make again."""
        for path in self.checkpoints():
            if step_of(path) >= step:
                shutil.rmtree(path)

    def newest(self, before: int | None = None) -> Path | None:
        """The newest undamaged checkpoint (of those before a step), warning of each damaged one that is passed over.
        None: there is none.

        Raises ValueError when there are checkpoints and all are damaged.
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


def _locked(stream: IO[str]) -> bool:
    """Lock the file for this process, which no child of it inherits; whether that was possible. True as well where the
    file system knows no locks.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def provenance(device: torch.device) -> dict[str, Any]:
    """Where this process runs and what it is made of."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": layout.revision(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "hostname": platform.node(),
        "device": name,
        "world": dist.world(),
        "command": shlex.join(sys.argv),
    }
