"""A run under torchrun as its owner sees it from outside: typed, watched in its files, found in /proc, and ended whole.

For `mae-dist chaos`, which harms such runs. Every process carries a mark in its environment, so that ranks and loader
workers are found in whatever session and under whatever parent a launcher or a kill has left them. Linux only.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mae_dist.run import tracker
from mae_dist.run.directory import RunDir
from mae_dist.verify import processes

T = TypeVar("T")

PATIENCE = 180.0
"""Seconds in which a fault must be survived."""
POLL = 0.01
MARK = "MAE_DIST_CHAOS"
RESTARTS = 1000
"""What torchrun may restart: more than any plan needs."""


class NotRecovered(Exception):
    """The run did not do what it had to do after a fault."""


@dataclass(frozen=True)
class Recovery:
    """How a run survived: the last step before it went back, and the step it went back to (the same: it did not)."""

    reached: int
    resumed: int


@dataclass(frozen=True)
class Process:
    """A process of a job; `rank` is what its environment says (None: a launcher)."""

    pid: int
    parent: int
    rank: int | None
    command: bytes


class TorchrunRun:
    """`torchrun ... -m MODULE WORDS` with its output in `log`; `run` is the folder that it works in."""

    def __init__(
        self, run: Path, module: str, words: list[str], processes: int, log: Path, environment: dict[str, str]
    ):  # fmt: skip
        self.run, self.module, self.words, self.processes, self.log = RunDir(run), module, words, processes, log
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | environment | {MARK: self.mark}
        self.launcher: subprocess.Popen[bytes] | None = None
        self.note()

    # what is done to it

    def start(self) -> None:
        """Type the command."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(RESTARTS)]
        torchrun += ["--nproc-per-node", str(self.processes)]
        command = [sys.executable, *torchrun, "-m", self.module, *self.words]
        with self.log.open("ab") as stream:
            stream.write(f"\n$ {shlex.join(command)}\n".encode())
            stream.flush()
            self.launcher = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """SIGTERM to the launcher, and wait until all have left."""
        assert self.launcher is not None
        self.launcher.terminate()
        deadline = time.monotonic() + PATIENCE
        while self.launcher.poll() is None or self.found():
            self.watch()
            if time.monotonic() > deadline:
                raise NotRecovered(f"told to stop, and still there after {PATIENCE:.0f} s")
            time.sleep(POLL)

    def kill(self) -> None:
        """SIGKILL to the launcher, all ranks and all their helpers, until none is left."""
        if self.launcher is not None:
            self.launcher.kill()
        while found := self.found():
            for process in found:
                self.signal(process.pid, signal.SIGKILL)
            if self.launcher is not None:
                self.launcher.poll()

    def signal(self, pid: int, number: signal.Signals) -> None:
        """A signal to one process, which may be gone."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    # what is seen of it

    def found(self) -> list[Process]:
        """All its processes that live, launchers first."""
        processes = [process for path in Path("/proc").glob("[0-9]*") if (process := read_process(path, self.mark))]
        return sorted(processes, key=lambda process: (process.rank is not None, process.pid))

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        assert self.launcher is not None
        children = [process for process in self.found() if process.parent == self.launcher.pid]
        return [c.pid for c in sorted(children, key=lambda c: -1 if c.rank is None else c.rank) if c.rank is not None]

    def workers(self, rank: int) -> list[int]:
        """Process ids of a rank's loader workers: forks of it."""
        found = self.found()
        pid = self.ranks()[rank]
        command = next(process.command for process in found if process.pid == pid)
        return [process.pid for process in found if process.parent == pid and process.command == command]

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return processes.reached(self.run.path)

    def starts(self) -> list[int]:
        """The step of each start so far."""
        return [line["step"] for line in self.lines("provenance.jsonl")]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the run's .jsonl files."""
        return tracker.read(self.run.path / name)

    def said(self) -> str:
        """Its output since the last `note`."""
        with self.log.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read().decode(errors="replace")

    # what is waited for

    def note(self) -> None:
        """Remember where its files stand, before a fault."""
        self.num_starts = len(self.starts())
        self.num_rewinds = len(self.lines("rewinds.jsonl"))
        self.offset = self.log.stat().st_size if self.log.is_file() else 0
        self.reached = self.step()

    def watch(self) -> None:
        """Remember how far it has come since the last `note`."""
        self.reached = max(self.reached, self.step())

    def wait(self, condition: Callable[[], T], what: str, poll: float = POLL) -> T:
        """Watch until `condition` gives something; NotRecovered when torchrun ends or patience does."""
        assert self.launcher is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            self.watch()
            if found := condition():
                return found
            if (status := self.launcher.poll()) is not None:
                raise NotRecovered(f"torchrun ended with status {status}, before {what}")
            if time.monotonic() > deadline:
                raise NotRecovered(f"not within {PATIENCE:.0f} s: {what}")
            time.sleep(poll)

    def resumed(self, words: str = "", most: int | None = None) -> Recovery:
        """Wait until it has started again and come further than before.

        NotRecovered unless its output has `words` and at most `most` steps were done again.
        """
        self.wait(lambda: len(self.starts()) > self.num_starts, "the ranks start again")
        reached = self.reached
        self.wait(lambda: self.step() > reached, f"step {reached + 1} is done")
        resumed = self.starts()[-1]
        if words not in self.said():
            raise NotRecovered(f"went on, but its output has no word of {words}")
        if most is not None and reached - resumed > most:
            raise NotRecovered(f"resumed at step {resumed}, having reached {reached}: at most {most} may be done again")
        return Recovery(reached, resumed)

    def finish(self) -> None:
        """Wait until it is finished, without hurry as long as steps are made."""
        assert self.launcher is not None
        reached, deadline = -1, time.monotonic() + PATIENCE
        while (status := self.launcher.poll()) is None:
            if self.step() > reached:
                reached, deadline = self.step(), time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise NotRecovered(f"no step in {PATIENCE:.0f} s")
            time.sleep(0.1)
        if status or self.run.result() is None:
            raise NotRecovered(f"torchrun ended with status {status}, and the run is not finished")


def read_process(path: Path, mark: str) -> Process | None:
    """What /proc/PID says of a process with the mark; None for others, and for one that is gone or a zombie."""
    try:
        words = (path / "environ").read_bytes().split(b"\0")
        if f"{MARK}={mark}".encode() not in words:
            return None
        parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
        return Process(int(path.name), parent, rank, (path / "cmdline").read_bytes())
    except (OSError, IndexError):
        return None
