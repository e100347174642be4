"""What a SLURM task does: start a rank (or a node's torchrun), pass on what it is told, and hand over to a requeue.

The run itself is `mae-dist VERB ...`, a process of its own, which knows no SLURM: it saves when it is signalled and
says by its exit status what became of it. This process only watches. It imports no torch, holds no state that a
requeue could lose, and notes what happens in `mae_dist.run.jobs`' files.

A stop begins with a signal of SLURM (preemption, time limit) or with the clock, which knows the end of the job. When
the ranks have saved and left, task 0 hands over to submitit's own handler, which requeues the job, unless SLURM has
done so already. Where that fails, as in a container without SLURM's commands, it leaves a word for the job's script,
which tries again. Tasks other than 0 leave quietly, so that no result of theirs says that the job has failed.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

from launch.cluster import EARLY
from launch.slurm_task import SlurmTask, end_of_job, meet, state_of
from mae_dist.run import jobs, layout
from mae_dist.signals import REQUEUE

SIGNAL = "USR2"
"""What SLURM is asked to send; submitit's choice."""
TOLD = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
PATIENCE = 0.8
"""Share of the time before the end in which the ranks must have saved; after it they are killed, and requeued."""
MISTAKE = 2
"""Exit status of mae-dist after a user's mistake, which starting again would repeat."""
FAREWELL = 5.0
"""Seconds in which the other tasks must have noted how they ended."""
LOST, TOO_SHORT = "a rank was lost", "the time limit came before anything new was saved"
"""Why a job is requeued, and after how many times without a new checkpoint it is not: `restarts`, and once."""


@dataclass(frozen=True)
class JobSpec:
    """``words`` of mae-dist, run by each task as a rank; or, with ``torchrun``, by one task a node for its ranks; or,
    if not ``ranked``, by a single task. What is noted lies in ``logs``; ``run`` is the folder of the run, if it makes
    one. Done, it writes its ``receipt``, (file, text).
    """

    words: tuple[str, ...]
    logs: str
    ranks_per_node: int
    stop_before_end: float
    run: str | None = None
    restarts: int = 0
    ranked: bool = True
    torchrun: bool = False
    receipt: tuple[str, str] | None = None

    @property
    def tasks_per_node(self) -> int:
        """Tasks that SLURM starts on each node."""
        return self.ranks_per_node if self.ranked and not self.torchrun else 1

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        return max((layout.step_of(path) for path in layout.checkpoints(Path(self.run))), default=0) if self.run else 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same, as everything else is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Run in a task. Returns when the run is finished; else leaves with the exit status of the rank."""
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it calls every requeue a time-out
        submitit_handler = signal.getsignal(getattr(signal, f"SIG{SIGNAL}"))
        assert callable(submitit_handler)
        watch = TaskRunner(self, SlurmTask.here())
        status = watch.run()
        if status == 0:
            if self.receipt and watch.place.task == 0:
                file, text = Path(self.receipt[0]), self.receipt[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            return
        if watch.place.task == 0:
            again, why = watch.judge(status)
            if again:
                watch.requeue(why, submitit_handler)
            if why:
                print(f"mae-dist: {why}", flush=True)
        elif status == REQUEUE or watch.told:
            sys.exit(0)
        sys.exit(status if status > 0 else 128 - status)


def requeue_marker(logs: str | Path, job: str) -> Path:
    """The file by which task 0 asks the job's script to requeue it."""
    return Path(logs) / f"{job}.requeue"


def script_end(logs: str) -> list[str]:
    """Shell lines of a job after its tasks, outside of any container: a requeue that the tasks could not do, tried for
    some minutes; else the tasks' exit status. ``$job`` is its name (`place.SCRIPT_SETUP`).
    """
    asked = f"{shlex.quote(logs)}/$job.requeue"
    return [
        "status=$?",
        f"if [ -e {asked} ]; then",
        f"  rm -f {asked}",
        '  for pause in 5 15 30 60 60 60; do scontrol requeue "$job" && sleep 60; sleep $pause; done',
        '  echo "mae-dist: $job could not be requeued; submit the same command again, it goes on"',
        "fi",
        "exit $status",
    ]


def should_requeue(
    status: int, told: bool, late: bool, ends: Sequence[int], before: Sequence[str], restarts: int
) -> tuple[bool, str]:
    """Whether a job is to start again, and why; or why not, where that is not what a rank has said itself.

    ``status`` is how task 0 ended, ``ends`` how all tasks did; ``told``: it was told to stop, ``late``: by its time
    limit; ``before``: why it was requeued earlier, since its newest checkpoint.
    """
    if MISTAKE in (status, *ends):
        return False, ""
    if status == REQUEUE:
        return True, "stopped and saved"
    if told and late:
        if TOO_SHORT in before:
            return False, f"{TOO_SHORT}, twice in a row: ask for more time (--time), or a larger stop_before_end"
        return True, TOO_SHORT
    if told:
        return True, "stopped"
    crashes = sum(why.startswith(LOST) for why in before)
    if crashes >= restarts:
        return False, f"{LOST} {crashes + 1} times since the last new checkpoint" if crashes else ""
    return True, f"{LOST}, restart {crashes + 1} of {restarts} since the last new checkpoint"


class TaskRunner:
    """One task of one start: its process, and whether it was told to stop."""

    def __init__(self, job: JobSpec, place: SlurmTask):
        self.job, self.place, self.end = job, place, end_of_job()
        self.told = self.late = False
        self.logs = Path(job.logs)
        self.child: subprocess.Popen[bytes] | None = None

    def note(self, event: str, **facts: object) -> None:
        """For everybody to see; a full disk must not end what watches."""
        try:
            jobs.note(self.logs, self.place.job, self.place.task, event, self.place.start, **facts)
        except OSError as error:
            print(f"cannot be noted ({error}): {event}", file=sys.stderr, flush=True)

    def run(self) -> int:
        """Start the process and wait for it; its exit status, -n if signal n ended it."""
        place = self.place
        for number in TOLD:
            signal.signal(number, self.tell)
        print(f"== start {place.start} of job {place.job}, task {place.task} of {place.num_tasks}", flush=True)
        self.note("start", host=socket.gethostname(), tasks=place.num_tasks, nodes=len(place.hosts))
        environment, reserved_socket = os.environ | self.environment(), None
        if self.job.ranked:
            address, reserved_socket = meet(place, self.logs)
            environment |= dict(zip(("MASTER_ADDR", "MASTER_PORT"), address, strict=True))
        if place.task == 0:
            requeue_marker(self.logs, place.job).unlink(missing_ok=True)
            self.log_environment()
            self.set_clock()
        if not self.told:
            self.child = subprocess.Popen(self.command(environment), env=environment)
            if self.told:  # just now, when there was nobody to pass it on to
                self.stop("", signal.SIGTERM)
        status = self.child.wait() if self.child else -signal.SIGTERM
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in TOLD:  # from here on it is known what will happen
            signal.signal(number, signal.SIG_IGN)
        if reserved_socket:
            reserved_socket.close()
        self.note("end", status=status)
        return status

    def environment(self) -> dict[str, str]:
        """What makes a process a rank; torchrun makes its own."""
        place, variables = self.place, {}
        if self.job.ranked and not self.job.torchrun:
            variables = {
                "RANK": place.task, "WORLD_SIZE": place.num_tasks, "LOCAL_RANK": place.local_task,
                "LOCAL_WORLD_SIZE": self.job.ranks_per_node,
            }  # fmt: skip
        if (cpus := os.environ.get("SLURM_CPUS_PER_TASK")) and "OMP_NUM_THREADS" not in os.environ:
            ranks = self.job.ranks_per_node // self.job.tasks_per_node
            variables["OMP_NUM_THREADS"] = max(1, int(cpus) // ranks)
        return {name: str(value) for name, value in variables.items()}

    def command(self, environment: dict[str, str]) -> list[str]:
        """What this task runs."""
        module = ["-m", "mae_dist", *self.job.words]
        if not (self.job.ranked and self.job.torchrun):
            return [sys.executable, "-u", *module]
        shape = [len(self.place.hosts), self.place.node, self.job.ranks_per_node]
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        agent = [sys.executable, "-u", "-m", "launch.agent", *map(str, shape), address, *self.job.words]
        return ["sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh", *agent]  # its ranks listen, it would die

    def log_environment(self) -> None:
        """Say once what runs where."""
        place, code = self.place, Path(__file__).parents[1]
        ranks = self.job.ranks_per_node * len(place.hosts) if self.job.ranked else 1
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "submitit"))
        print(
            f"{ranks} ranks on {', '.join(place.hosts)}; python {sys.version.split()[0]}, {packages}; {code}",
            flush=True,
        )

    # stopping

    def tell(self, number: int, _: FrameType | None) -> None:
        """Handler of signals: pass on. SLURM sends to all processes of a task, but not every proxy does."""
        self.stop(signal.Signals(number).name, number)

    def stop(self, by: str, number: int) -> None:
        """Tell the ranks to save and leave."""
        if not self.told:
            self.told = True
            self.late = self.end is not None and time.time() > self.end - self.job.stop_before_end - EARLY
            self.note("told", by=by)
        for pid in self.ranks():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def ranks(self) -> list[int]:
        """Processes that save when they are told; under torchrun its children."""
        if self.child is None or self.child.returncode is not None:
            return []
        if not self.job.torchrun:
            return [self.child.pid]
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children")
        return [int(word) for word in children.read_text().split()] if children.exists() else []

    def set_clock(self) -> None:
        """Stop in time before the job's end, whoever has told the ranks before; and once more, harder, when PATIENCE is
        at its end, if they do not leave.
        """
        if self.end is None:
            return
        alarmed = False

        def on_alarm(_: int, __: FrameType | None) -> None:
            nonlocal alarmed
            if alarmed and self.child is not None:
                self.child.kill()
                return
            alarmed = True
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * self.job.stop_before_end)
            self.stop("time limit", signal.SIGUSR1)

        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self.end - time.time() - self.job.stop_before_end))

    # going on

    def judge(self, status: int) -> tuple[bool, str]:
        """Whether the job is to start again, and why, or why not."""
        ends, saved = self.collect_exit_statuses(), self.job.saved
        mine = jobs.events(self.logs, self.place.job).get(0, [])
        before = [event["why"] for event in mine if event["event"] == "requeue" and event.get("saved") == saved]
        return should_requeue(status, self.told, self.late, ends, before, self.job.restarts)

    def collect_exit_statuses(self) -> list[int]:
        """Exit statuses of all tasks in this start, as far as they come in time. A requeue kills who is left."""
        deadline = time.monotonic() + FAREWELL
        while True:
            everybody = jobs.events(self.logs, self.place.job).values()
            ends = [
                e["status"] for own in everybody for e in own if (e["event"], e["start"]) == ("end", self.place.start)
            ]
            if len(ends) == self.place.num_tasks or time.monotonic() > deadline:
                return ends
            time.sleep(0.2)

    def requeue(self, why: str, submitit_handler: Callable[[int, None], object]) -> NoReturn:
        """Hand over to submitit, unless SLURM has ended this start: then it starts the job again by itself, or not."""
        state, start = state_of(self.place.job)
        if state not in ("RUNNING", None) or start != self.place.start:
            self.note("requeue", why=why + jobs.BY_SLURM, saved=self.job.saved)
            print(f"{why}; SLURM has ended this start already ({state})", flush=True)
            sys.exit(REQUEUE)
        self.note("requeue", why=why, saved=self.job.saved)
        print(f"{why}; requeueing", flush=True)
        try:
            submitit_handler(getattr(signal, f"SIG{SIGNAL}"), None)
        except (subprocess.SubprocessError, OSError) as error:
            requeue_marker(self.logs, self.place.job).touch()
            print(f"could not requeue here ({error}); the job's script tries it", file=sys.stderr, flush=True)
        sys.exit(1)
