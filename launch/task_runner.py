"""What a SLURM task does: start a rank (or all of a node), pass signals on to it, and have the job requeued.

The run itself is `mae-dist VERB ...`, a child process that knows no SLURM: it saves when it gets a signal, and its exit
status says how it ended. This process only supervises. It imports no torch, holds no state that a requeue could lose,
and records events in the files of `mae_dist.run.jobs`.

A stop begins with a signal of SLURM (preemption, time limit), or with an alarm before the job's end. When the ranks
have saved and exited, task 0 calls submitit's own signal handler, which requeues the job, unless SLURM has done so
already. Where that fails, as in a container without SLURM's commands, task 0 leaves a marker file and the job's script
requeues the job. Tasks other than 0 exit with status 0, so that no result of theirs says that the job has failed.
"""

import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import submitit

from launch.cluster import SIGNAL_LEAD
from launch.slurm_task import SlurmTask, end_of_job, rendezvous
from mae_dist.environment import MEETING_FILE, TORCHRUN
from mae_dist.errors import DONE, FAILED, SIGNAL_BASE, STOPPED, USER_ERROR
from mae_dist.run import events, jobs, layout, slurm_cli

SIGNAL = "USR2"
"""The signal that SLURM sends before the end of a job; submitit's choice."""
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
SAVE_SHARE = 0.8
"""Share of `stop_before_end` in which the ranks must have saved and exited; after it they are killed."""
MAX_UNSTARTED = 20
"""Times that a job is requeued because its tasks could not be started on all of its nodes."""
EXIT_STATUS_WAIT = 5.0
"""Seconds to wait for the exit statuses of the other tasks."""


@dataclass(frozen=True)
class JobSpec:
    """What a job runs: `mae-dist ARGV`, by each task as a rank; or, with ``torchrun``, by one task a node that starts
    its ranks; or, if not ``ranked``, by a single task.

    ``logs`` is the folder of logs and event files; ``run`` the folder of the run, if it makes one; ``stamp`` (file,
    text) is written when the job is done.
    """

    argv: tuple[str, ...]
    logs: str
    ranks_per_node: int
    stop_before_end: float
    run: str | None = None
    restarts: int = 0
    ranked: bool = True
    torchrun: bool = False
    stamp: tuple[str, str] | None = None

    @property
    def tasks_per_node(self) -> int:
        """Tasks that SLURM starts on each node."""
        return self.ranks_per_node if self.ranked and not self.torchrun else 1

    @property
    def last_saved_step(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        return max((layout.step_of(path) for path in layout.checkpoints(Path(self.run))), default=0) if self.run else 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: this JobSpec unchanged, as all progress is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Run in a task. Returns when the run is finished; else exits with the exit status of the rank."""
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it calls every requeue a time-out
        submitit_handler = signal.getsignal(getattr(signal, f"SIG{SIGNAL}"))
        assert callable(submitit_handler)
        runner = TaskRunner(self, SlurmTask.here())
        status = runner.run()
        if status == DONE:
            if self.stamp and runner.task.number == 0:
                file, text = Path(self.stamp[0]), self.stamp[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            return
        if runner.task.number == 0:
            decision = runner.decide(status)
            if decision.reason:
                runner.requeue(decision.reason, decision.message, submitit_handler)
            if decision.message:
                print(f"mae-dist: {decision.message}", flush=True)
        elif status == STOPPED or runner.stop_requested:
            sys.exit(DONE)
        sys.exit(status if status > 0 else SIGNAL_BASE - status)


def requeue_marker(logs: str | Path, job: str) -> Path:
    """The file by which task 0 asks the job's script to requeue the job."""
    return Path(logs) / f"{job}.requeue"


def script_end(logs: str) -> list[str]:
    """Shell lines of a job after its tasks, outside of any container: requeue the job, with retries for some minutes,
    if the tasks could not, or did not start as a node had died (its srun starts nothing else there either); else exit
    with the tasks' status. ``$job`` is set by `slurm_task.SCRIPT_SETUP`.
    """
    logs = shlex.quote(logs)
    marker, began, of_task_0 = f"{logs}/$job.requeue", f"{logs}/$job.unstarted", f"{logs}/${{job}}_0.jsonl"
    decided = f"""grep -qs '"event": "end", "start": '${{SLURM_RESTART_COUNT:-0}}, {of_task_0}"""
    return [
        "status=$?",
        f'if [ $status != 0 ] && ! {decided} && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] &&',
        "  ! timeout 120 srun true; then",
        f'  echo "mae-dist: the tasks could not be started on all of $SLURM_JOB_NODELIST"; echo >>{began}',
        f"  [ $(wc -l <{began}) -gt {MAX_UNSTARTED} ] || touch {marker}",
        "fi",
        f"if [ -e {marker} ]; then",
        f"  rm -f {marker}",
        '  for pause in 5 15 30 60 60 60; do scontrol requeue "$job" && sleep 60; sleep $pause; done',
        '  echo "mae-dist: $job could not be requeued; submit the same command again to resume"',
        "fi",
        "exit $status",
    ]


class Decision(NamedTuple):
    """Why a job is requeued, or None if it is not; and the message to print, empty where a rank has printed its own."""

    reason: jobs.Reason | None
    message: str = ""


def should_requeue(
    exit_statuses: Sequence[int], stop_requested: bool, time_limit: bool, before: Sequence[jobs.Reason], restarts: int
) -> Decision:
    """Whether to requeue a job, and why or why not.

    ``exit_statuses`` begin with task 0's. ``stop_requested``: of task 0, with ``time_limit`` because of the time limit.
    ``before`` are the reasons of earlier requeues since the newest checkpoint; without a new one, ``restarts`` requeues
    for a lost rank are allowed and one at the time limit.
    """
    if USER_ERROR in exit_statuses:
        return Decision(None)
    if exit_statuses[0] == STOPPED:
        return Decision("saved", "stopped and saved")
    if stop_requested and time_limit:
        message = "the time limit came before a new checkpoint was saved"
        if "time_limit" in before:
            return Decision(None, f"{message}, twice in a row: raise the time limit (--time) or stop_before_end")
        return Decision("time_limit", message)
    if stop_requested:
        return Decision("stopped", "stopped")
    lost = before.count("rank_lost")
    if lost >= restarts:
        return Decision(None, f"a rank was lost {lost + 1} times since the last new checkpoint" if lost else "")
    return Decision("rank_lost", f"a rank was lost, restart {lost + 1} of {restarts} since the last new checkpoint")


class TaskRunner:
    """One task in one start of its job: its child process, and whether a stop was requested."""

    def __init__(self, job: JobSpec, task: SlurmTask):
        self.job, self.task, self.deadline = job, task, end_of_job()
        self.stop_requested = self.time_limit = False
        self.logs = Path(job.logs)
        self.child: subprocess.Popen[bytes] | None = None

    def record(self, event: str, **fields: object) -> None:
        """Append to this task's event file. Errors are printed, not raised: a full disk must not end the supervisor."""
        try:
            jobs.record(self.logs, self.task.job, self.task.number, event, self.task.start, **fields)
        except OSError as error:
            print(f"the event {event} could not be recorded: {error}", file=sys.stderr, flush=True)

    def run(self) -> int:
        """Start the child process and wait for it; give its exit status, -n if signal n ended it."""
        task = self.task
        for number in STOP_SIGNALS:
            signal.signal(number, self.forward_signal)
        print(f"== start {task.start} of job {task.job}, task {task.number} of {task.num_tasks}", flush=True)
        self.record("start", host=socket.gethostname(), tasks=task.num_tasks, nodes=len(task.hosts))
        inherited = {name: value for name, value in os.environ.items() if name not in (*TORCHRUN, MEETING_FILE)}
        environment, reserved_socket = inherited | self.rank_variables(), None
        if self.job.ranked:
            address, reserved_socket = rendezvous(task, self.logs)
            environment |= dict(zip(("MASTER_ADDR", "MASTER_PORT"), address, strict=True))
        if task.number == 0:
            requeue_marker(self.logs, task.job).unlink(missing_ok=True)
            self.log_environment()
            self.set_alarm()
        if not self.stop_requested:
            self.child = subprocess.Popen(self.command(), env=environment)
            if self.stop_requested:  # while the child was being started, so the signal was not forwarded
                self.request_stop("", signal.SIGTERM)
        status = self.child.wait() if self.child else -signal.SIGTERM
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in STOP_SIGNALS:  # what happens next depends on the exit statuses alone
            signal.signal(number, signal.SIG_IGN)
        if reserved_socket:
            reserved_socket.close()
        self.record("end", status=status)
        return status

    def rank_variables(self) -> dict[str, str]:
        """Environment variables that make the child a rank (an agent sets those of its ranks), and its threads."""
        task, variables = self.task, {}
        if self.job.ranked and not self.job.torchrun:
            variables = {
                "RANK": task.number, "WORLD_SIZE": task.num_tasks, "LOCAL_RANK": task.local_task,
                "LOCAL_WORLD_SIZE": self.job.ranks_per_node,
            }  # fmt: skip
        if (cpus := os.environ.get("SLURM_CPUS_PER_TASK")) and "OMP_NUM_THREADS" not in os.environ:
            ranks = self.job.ranks_per_node // self.job.tasks_per_node
            variables["OMP_NUM_THREADS"] = max(1, int(cpus) // ranks)
        return {name: str(value) for name, value in variables.items()}

    def command(self) -> list[str]:
        """Command line of the child process."""
        if not (self.job.ranked and self.job.torchrun):
            return [sys.executable, "-u", "-m", "mae_dist", *self.job.argv]
        shape = [len(self.task.hosts), self.task.node, self.job.ranks_per_node]
        return [sys.executable, "-u", "-m", "launch.agent", *map(str, shape), *self.job.argv]

    def log_environment(self) -> None:
        """Print ranks, hosts, versions and the folder of the code."""
        hosts, code = self.task.hosts, Path(__file__).parents[1]
        ranks = self.job.ranks_per_node * len(hosts) if self.job.ranked else 1
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "submitit"))
        print(f"{ranks} ranks on {', '.join(hosts)}; python {sys.version.split()[0]}, {packages}; {code}", flush=True)

    # stopping

    def forward_signal(self, number: int, _: FrameType | None) -> None:
        """Signal handler. SLURM signals all processes of a task, but not every container passes signals on."""
        self.request_stop(signal.Signals(number).name, number)

    def request_stop(self, by: str, number: int) -> None:
        """Send a signal to the child, which saves and exits; an agent passes it on to its ranks."""
        if not self.stop_requested:
            self.stop_requested = True
            lead = self.job.stop_before_end + SIGNAL_LEAD
            self.time_limit = self.deadline is not None and time.time() > self.deadline - lead
            self.record("stop_requested", by=by)
        if self.child is not None:
            self.child.send_signal(number)

    def set_alarm(self) -> None:
        """Request a stop `stop_before_end` seconds before the job's end, even if one was requested before; and kill the
        child if it has not exited after SAVE_SHARE of that time.
        """
        if self.deadline is None:
            return
        alarmed = False

        def on_alarm(_: int, __: FrameType | None) -> None:
            nonlocal alarmed
            if alarmed and self.child is not None:
                self.child.kill()
                return
            alarmed = True
            signal.setitimer(signal.ITIMER_REAL, SAVE_SHARE * self.job.stop_before_end)
            self.request_stop("time limit", signal.SIGUSR1)

        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self.deadline - time.time() - self.job.stop_before_end))

    # requeueing

    def decide(self, status: int) -> Decision:
        """Whether to requeue the job after this task's child ended with this exit status, and why or why not."""
        saved = self.job.last_saved_step
        mine = jobs.events(self.logs, self.task.job).get(0, [])
        requeues = {e["start"]: e["reason"] for e in mine if e["event"] == "requeue" and e["saved"] == saved}
        statuses = [status, *self.collect_exit_statuses()]
        return should_requeue(
            statuses, self.stop_requested, self.time_limit, list(requeues.values()), self.job.restarts
        )

    def collect_exit_statuses(self) -> list[int]:
        """Exit statuses of all tasks in this start, as far as they come in time. A requeue kills the other tasks."""
        deadline = time.monotonic() + EXIT_STATUS_WAIT
        while True:
            tasks = jobs.events(self.logs, self.task.job).values()
            ends = [e["status"] for own in tasks for e in own if (e["event"], e["start"]) == ("end", self.task.start)]
            if len(ends) == self.task.num_tasks or time.monotonic() > deadline:
                return ends
            time.sleep(0.2)

    def requeue(self, reason: jobs.Reason, message: str, submitit_handler: Callable[[int, None], object]) -> NoReturn:
        """Have submitit requeue the job, unless SLURM has ended this start: then SLURM itself decides about another."""
        state, restarts = slurm_cli.state_and_restarts(self.task.job)
        if state not in ("RUNNING", None) or restarts not in (self.task.start, None):
            self.record_requeue(reason, message, "slurm")
            print(f"{message}; SLURM has ended this start already ({state})", flush=True)
            sys.exit(STOPPED)
        by = "task" if shutil.which("scontrol") else "script"
        self.record_requeue(reason, message, by)
        print(f"{message}; requeueing", flush=True)
        try:
            submitit_handler(getattr(signal, f"SIG{SIGNAL}"), None)
        except (subprocess.SubprocessError, OSError) as error:
            requeue_marker(self.logs, self.task.job).touch()
            if by == "task":
                self.record_requeue(reason, message, "script")
            print(f"could not requeue here ({error}); the job's script tries it", file=sys.stderr, flush=True)
        sys.exit(FAILED)

    def record_requeue(self, reason: jobs.Reason, message: str, by: jobs.By) -> None:
        """Record a requeue in the event files of this task and of the run. The last one of a start counts."""
        fields = {"reason": reason, "by": by, "message": message, "saved": self.job.last_saved_step}
        self.record("requeue", **fields)
        if self.job.run:
            with suppress(OSError):
                events.append(Path(self.job.run), "requeue", job=self.task.job, start=self.task.start, **fields)
