"""A run under torchrun as a user sees it: started by its command, followed in its files and in /proc, and killed.

For `mae-dist chaos`, which injects faults into such runs. Each process has a mark in its environment, so that ranks and
loader workers are found in whatever session and under whatever parent a launcher or a kill has left them. Linux only.
"""

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

from mae_dist import watchdog
from mae_dist.run import events
from mae_dist.run.directory import RunDir
from mae_dist.run.events import Event, Kind
from mae_dist.verify import processes

RECOVERY_TIME = 180.0
"""Seconds in which a run must recover from a fault."""
POLL = 0.01
MARK = "MAE_DIST_CHAOS"
RESTARTS = 1000
"""torchrun's --max-restarts: more than any plan needs."""


class NotRecovered(Exception):
    """The run did not do what it must do after a fault."""


@dataclass(frozen=True)
class Recovery:
    """How a run recovered: the last step before it went back, and the step that it went back to (equal: it did not)."""

    reached: int
    resumed: int


@dataclass(frozen=True)
class Process:
    """A process of a run; `rank` is the RANK of its environment (None: a launcher), `name` that of the kernel."""

    pid: int
    parent: int
    rank: int | None
    command: bytes
    name: str


class TorchrunRun:
    """`torchrun ... -m MODULE ARGV` with its output appended to `log`; `run` is the folder of the run.

    `remember` marks a moment; `output`, `new_events` and `wait_until_resumed` are about what came after it.
    """

    def __init__(
        self, run: Path, module: str, argv: list[str], num_ranks: int, log: Path, environment: dict[str, str]
    ):  # fmt: skip
        self.run, self.module, self.argv, self.num_ranks, self.log = RunDir(run), module, argv, num_ranks, log
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | environment | {MARK: self.mark}
        self.launcher: subprocess.Popen[bytes] | None = None
        self.remember()

    def start(self) -> None:
        """Start the command."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(RESTARTS)]
        torchrun += ["--nproc-per-node", str(self.num_ranks)]
        command = [sys.executable, *torchrun, "-m", self.module, *self.argv]
        with self.log.open("ab") as stream:
            stream.write(f"\n$ {shlex.join(command)}\n".encode())
            stream.flush()
            self.launcher = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """Send SIGTERM to the launcher and wait until all processes have ended."""
        assert self.launcher is not None
        self.launcher.terminate()
        self._poll(lambda: self.status() is not None and not self.processes(), "all processes end after SIGTERM")

    def kill(self) -> None:
        """Send SIGKILL to the launcher, all ranks and all their helpers, until none is left."""
        if self.launcher is not None:
            self.launcher.kill()
        while found := self.processes():
            for process in found:
                self.signal(process.pid, signal.SIGKILL)
            if self.launcher is not None:
                self.launcher.poll()

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process, which may have ended."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def processes(self) -> list[Process]:
        """All living processes of the run, launchers first."""
        found = [process for path in Path("/proc").glob("[0-9]*") if (process := read_process(path, self.mark))]
        return sorted(found, key=lambda process: (process.rank is not None, process.pid))

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in the order of the ranks."""
        assert self.launcher is not None
        children = [process for process in self.processes() if process.parent == self.launcher.pid]
        return [c.pid for c in sorted(children, key=lambda c: -1 if c.rank is None else c.rank) if c.rank is not None]

    def workers(self, rank: int) -> list[int]:
        """Process ids of a rank's loader workers, which are forks of the rank."""
        found = self.processes()
        pid = self.ranks()[rank]
        command = next(process.command for process in found if process.pid == pid)
        forks = [process for process in found if process.parent == pid and process.command == command]
        return [fork.pid for fork in forks if fork.name != watchdog.NAME]

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return processes.reached(self.run.path)

    def remember(self) -> None:
        """Mark this moment, before a fault."""
        self.num_events = len(events.read(self.run.path))
        self.offset = self.log.stat().st_size if self.log.is_file() else 0
        self.reached = self.step()

    def output(self) -> str:
        """The run's output since `remember`."""
        with self.log.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read().decode(errors="replace")

    def new_events(self, kind: Kind) -> list[Event]:
        """The run's events of this kind since `remember`, oldest first."""
        return [event for event in events.read(self.run.path)[self.num_events :] if event["event"] == kind]

    def status(self) -> int | None:
        """The exit status of the launcher; None while it runs."""
        assert self.launcher is not None
        return self.launcher.poll()

    def wait(self, condition: Callable[[], object], what: str, poll: float = POLL) -> None:
        """Wait until `condition()` is true; NotRecovered, naming `what`, if torchrun ends or RECOVERY_TIME is over."""

        def met() -> bool:
            if condition():
                return True
            if (status := self.status()) is not None:
                raise NotRecovered(f"torchrun ended with status {status}, before {what}")
            return False

        self._poll(met, what, poll)

    def _poll(self, condition: Callable[[], bool], what: str, interval: float = POLL) -> None:
        """Wait RECOVERY_TIME at most for `condition()`, and keep the largest step since `remember` in `reached`."""
        deadline = time.monotonic() + RECOVERY_TIME
        while True:
            self.reached = max(self.reached, self.step())
            if condition():
                return
            if time.monotonic() > deadline:
                raise NotRecovered(f"not within {RECOVERY_TIME:.0f} s: {what}")
            time.sleep(interval)

    def wait_until_resumed(self, max_redone: int | None = None) -> Recovery:
        """Wait until the ranks have started again and made a step further than before.

        Raises NotRecovered if they do not, or if more than `max_redone` steps were done again.
        """
        self.wait(lambda: self.new_events("start"), "the ranks start again")
        reached = self.reached
        self.wait(lambda: self.step() > reached, f"step {reached + 1} is done")
        resumed = self.new_events("start")[-1]["step"]
        if max_redone is not None and reached - resumed > max_redone:
            redone = f"at most {max_redone} may be done again"
            raise NotRecovered(f"resumed at step {resumed}, having reached {reached}: {redone}")
        return Recovery(reached, resumed)

    def finish(self) -> None:
        """Wait until the run is finished; NotRecovered if it ends otherwise or makes no step in RECOVERY_TIME."""
        while self.status() is None:
            step = self.step()
            self._poll(lambda step=step: self.status() is not None or self.step() > step, "a step is done", 0.1)
        if self.status() or self.run.result() is None:
            raise NotRecovered(f"torchrun ended with status {self.status()}, and the run is not finished")


def read_process(path: Path, mark: str) -> Process | None:
    """The process at /proc/PID if its environment has the mark; None for others, ended processes and zombies."""
    try:
        environ = (path / "environ").read_bytes().split(b"\0")
        if f"{MARK}={mark}".encode() not in environ:
            return None
        parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        rank = next((int(entry[5:]) for entry in environ if entry.startswith(b"RANK=")), None)
        name = (path / "comm").read_text().strip()
        return Process(int(path.name), parent, rank, (path / "cmdline").read_bytes(), name)
    except (OSError, IndexError):
        return None
