"""Runs as processes, started with the command that a user would type and followed in their metrics.jsonl."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from mae_dist import environment
from mae_dist.data.index import FILE
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.run import jsonl


def start(argv: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start `mae-dist ARGV` with more environment variables; append its output to the file `log`."""
    with log.open("ab") as stream:
        command = [*environment.python(), *argv]
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | variables)


def last_line(path: Path) -> str:
    """The last line of a file that is not blank; "" if there is none."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def reached(run: Path) -> int:
    """The last step in a run's metrics.jsonl; 0 before the first."""
    return jsonl.last_step(run / "metrics.jsonl")


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> bool:
    """Wait until the run has reached `step`; False if the process ended before."""
    while process.poll() is None:
        if reached(run) >= step:
            return True
        time.sleep(0.005)
    return False


def embedded_data(folder: Path, num_train: int) -> None:
    """Pack the embedded data set into `folder` unless it is there."""
    if not (folder / FILE).is_file():
        pack(from_synthetic(num_train, max(1, num_train // 4)), folder, shard_size=max(1, num_train // 8))
