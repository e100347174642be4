"""What a SLURM task does: start a rank (or a node's torchrun), pass on what it is told, and hand over to a requeue.

The run itself is `mae-dist VERB ...`, a process of its own, which knows no SLURM: it saves when it is signalled and
says by its exit status what became of it. This process only watches. It imports no torch, holds no state that a
requeue could lose, and notes what happens in `mae_dist.jobs`' files.

A stop begins with a signal of SLURM (preemption, time limit) or with the clock: the end of the job is asked of SLURM.
When the ranks have saved and left, task 0 hands over to submitit's own handler, which requeues the job, unless SLURM
has done so already. Tasks other than 0 leave quietly, so that no result of theirs says that the job has failed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

from mae_dist import jobs
from mae_dist.stop import REQUEUE

SIGNAL = "USR2"
"""What SLURM is asked to send; submitit's choice."""
TOLD = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
PATIENCE = 0.8
"""Share of the time before the end in which the ranks must have saved; after it they are killed, and requeued."""
MISTAKE, LOST = 2, 1
"""Exit statuses of mae-dist: a user's mistake, which starting again would repeat; a rank that hung or crashed."""
FAREWELL = 5.0
"""Seconds in which the other tasks must have noted how they ended."""
SHARED = 300.0
"""Seconds in which a file of another node must be seen."""


@dataclass(frozen=True)
class Place:
    """Where in which job this task is, as SLURM says; ``start`` counts requeues."""

    job: str
    raw_job: str
    start: int
    task: int
    num_tasks: int
    local_task: int
    node: int
    hosts: tuple[str, ...]

    @staticmethod
    def here() -> Place:
        """From the environment of a task."""
        own = submitit.JobEnvironment()
        return Place(
            own.job_id, own.raw_job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0)), own.global_rank, own.num_tasks,
            own.local_rank, own.node, tuple(own.hostnames),
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """``words`` of mae-dist, run by each task as a rank; or, with ``torchrun``, by one task a node for its ranks; or,
    if not ``ranked``, by a single task. What is noted lies in ``logs``. Done, it writes its ``receipt``, (file, text).
    """

    words: tuple[str, ...]
    logs: str
    ranks_per_node: int
    stop_before_end: float
    restarts: int = 0
    ranked: bool = True
    torchrun: bool = False
    receipt: tuple[str, str] | None = None

    @property
    def tasks_per_node(self) -> int:
        """Tasks that SLURM starts on each node."""
        return self.ranks_per_node if self.ranked and not self.torchrun else 1

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same, as everything else is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Run in a task. Returns when the run is finished; else leaves with the exit status of the rank."""
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it calls every requeue a time-out
        remembered = signal.getsignal(getattr(signal, f"SIG{SIGNAL}"))
        assert callable(remembered)
        watch = Watch(self, Place.here())
        status = watch.run()
        if status == 0:
            if self.receipt and watch.place.task == 0:
                file, text = Path(self.receipt[0]), self.receipt[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            return
        if watch.place.task == 0 and (why := watch.why_again(status, watch.farewells())):
            watch.requeue(why, remembered)
        sys.exit(0 if status == REQUEUE or watch.told else status if status > 0 else 128 - status)


class Watch:
    """One task of one start: its process, and whether it was told to stop."""

    def __init__(self, job: Job, place: Place):
        self.job, self.place, self.told = job, place, False
        self.logs = Path(job.logs)
        self.child: subprocess.Popen[bytes] | None = None

    def note(self, event: str, **facts: object) -> None:
        """For everybody to see."""
        jobs.note(self.logs, self.place.job, self.place.task, event, self.place.start, **facts)

    def run(self) -> int:
        """Start the process and wait for it; its exit status, -n if signal n ended it."""
        place = self.place
        for number in TOLD:
            signal.signal(number, self.tell)
        print(f"== start {place.start} of job {place.job}, task {place.task} of {place.num_tasks}", flush=True)
        self.note("start", host=socket.gethostname(), tasks=place.num_tasks, nodes=len(place.hosts))
        environment, held = os.environ | self.environment(), None
        if self.job.ranked:
            address, held = self.meet()
            environment |= dict(zip(("MASTER_ADDR", "MASTER_PORT"), address, strict=True))
        if place.task == 0:
            self.introduce()
            self.set_clock()
        if not self.told:
            self.child = subprocess.Popen(self.command(environment), env=environment)
        status = self.child.wait() if self.child else REQUEUE
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in TOLD:  # from here on it is known what will happen
            signal.signal(number, signal.SIG_IGN)
        if held:
            held.close()
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
        shape = {
            "--nnodes": len(self.place.hosts), "--node-rank": self.place.node,
            "--nproc-per-node": self.job.ranks_per_node, "--master-addr": environment["MASTER_ADDR"],
            "--master-port": environment["MASTER_PORT"],
        }  # fmt: skip
        agent = [sys.executable, "-u", "-m", "torch.distributed.run"]
        agent += [f"{name}={value}" for name, value in shape.items()]
        return ["sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh", *agent, *module]  # its ranks listen, it would die

    # meeting

    def meet(self) -> tuple[tuple[str, str], socket.socket | None]:
        """Address and port at which the ranks of this start meet, and what keeps the port free until then.

        Task 0 has the kernel choose a port and keeps it bound, which lets a rank of this machine listen there and
        nobody else be given it; it tells the others in a file.
        """
        file = self.logs / f"{self.place.job}.{self.place.start}.address"
        if self.place.task == 0:
            held = reserved_port()
            address = self.place.hosts[0], str(held.getsockname()[1])
            temporary = file.with_suffix(".new")
            temporary.write_text(" ".join(address))
            temporary.replace(file)
            for old in self.logs.glob(f"{self.place.job}.*.address"):
                if old != file:
                    old.unlink()
            return address, held
        deadline = time.monotonic() + SHARED
        while not file.exists():
            if time.monotonic() > deadline:
                sys.exit(f"{file}: not there after {SHARED:g} s; does every node see this folder?")
            time.sleep(0.05)
        host, port = file.read_text().split()
        return (host, port), None

    def introduce(self) -> None:
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
        """Stop in time before the job's end, and once more, harder, if the ranks do not leave."""
        end = end_of(self.place.raw_job)
        if end is None:
            return

        def ring(_: int, __: FrameType | None) -> None:
            if self.told and self.child is not None:
                self.child.kill()
                return
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * self.job.stop_before_end)
            self.stop("time limit", signal.SIGUSR1)

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, end - time.time() - self.job.stop_before_end))

    # going on

    def why_again(self, status: int, others: list[int]) -> str | None:
        """Why the job should start again, ``others`` being how all tasks ended; None: it has failed."""
        if status == MISTAKE:
            return None
        if self.told or status == REQUEUE:
            return "stopped and saved" if status == REQUEUE else "stopped"
        if MISTAKE in others:
            return None
        mine = jobs.events(self.logs, self.place.job).get(0, [])
        crashes = sum(event["event"] == "requeue" and event["why"].startswith("a rank") for event in mine)
        if crashes >= self.job.restarts:
            return None
        return f"a rank was lost, restart {crashes + 1} of {self.job.restarts}"

    def farewells(self) -> list[int]:
        """Exit statuses of all tasks in this start, as far as they come in time: a requeue kills those that are left."""
        deadline = time.monotonic() + FAREWELL
        while True:
            everybody = jobs.events(self.logs, self.place.job).values()
            ends = [
                e["status"] for own in everybody for e in own if (e["event"], e["start"]) == ("end", self.place.start)
            ]
            if len(ends) == self.place.num_tasks or time.monotonic() > deadline:
                return ends
            time.sleep(0.2)

    def requeue(self, why: str, remembered: Callable[[int, None], object]) -> NoReturn:
        """Hand over to submitit, unless SLURM starts this job again by itself or has started it already."""
        state, start = state_of(self.place.raw_job)
        if state not in ("RUNNING", None) or start != self.place.start:
            self.note("requeue", why=f"{why}; by SLURM")
            print(f"{why}; SLURM starts the job again by itself ({state}, start {start})", flush=True)
            sys.exit(0)
        self.note("requeue", why=why)
        print(f"{why}; requeueing", flush=True)
        try:
            remembered(getattr(signal, f"SIG{SIGNAL}"), None)
        except (subprocess.SubprocessError, OSError) as error:
            print(
                f"could not requeue ({error}); submit the same command again, it goes on", file=sys.stderr, flush=True
            )
        sys.exit(1)


def reserved_port() -> socket.socket:
    """A socket bound to a free port, on which another one of this machine may listen while it only holds the port."""
    held = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def end_of(job: str) -> float | None:
    """When the job's time is over, as seconds since 1970; None where SLURM does not say, or has no limit."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    try:
        return datetime.fromisoformat(_ask("squeue", "-h", "-j", job, "-o", "%e")).timestamp()
    except ValueError:
        return None


def state_of(job: str) -> tuple[str | None, int]:
    """State of the job and number of its requeues, as the controller has them; (None, this start's) if it is silent."""
    fields = dict(word.split("=", 1) for word in _ask("scontrol", "show", "job", "-o", job).split() if "=" in word)
    own = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return fields.get("JobState"), int(fields.get("Restarts", own))


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
