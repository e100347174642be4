"""Runs as processes of their own: the command that a user would type, watched from outside and told to stop.

What a run has reached is read from its metrics.jsonl: nothing is measured or compared that a user could not see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mae_dist.data.index import FILE
from mae_dist.data.pack import from_synthetic, pack

TAIL = 4096
"""Bytes at the end of a file that hold its last line."""


def start(words: Sequence[str], said: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start `mae-dist WORDS`; what it says is appended to the file `said`."""
    with said.open("ab") as stream:
        command = [sys.executable, "-m", "mae_dist", *words]
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | environment)


def last_line(path: Path) -> str:
    """The last line of a file that says something."""
    lines = [line for line in _tail(path).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def reached(run: Path) -> int:
    """The last step in a run's metrics.jsonl; 0 before the first."""
    for line in reversed(_tail(run / "metrics.jsonl").splitlines()):
        try:
            return json.loads(line)["step"]
        except ValueError:  # not written to its end, or cut by the tail
            continue
    return 0


def watch(process: subprocess.Popen[bytes], run: Path, step: int) -> bool:
    """Wait until the run has reached `step`; False when the process ended before."""
    while process.poll() is None:
        if reached(run) >= step:
            return True
        time.sleep(0.005)
    return False


def embedded_data(folder: Path, num_train: int) -> None:
    """Make the embedded data set in `folder` if it is not there."""
    if not (folder / FILE).is_file():
        pack(from_synthetic(num_train, max(1, num_train // 4)), folder, shard_size=max(1, num_train // 8))


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL))
        return stream.read().decode(errors="replace")
