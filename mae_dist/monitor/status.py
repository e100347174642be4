"""The status of a run: queued, running, requeued, stopped, failed or finished, from its folder, its jobs and SLURM.

`mae-dist runs` shows it for many runs, `mae-dist logs` for one. The newest submission counts, and in it the newest
start: SLURM knows whether the job waits, runs or has ended, and the events of its tasks say how they ended.
"""

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mae_dist.errors import DONE, FAILED, INTERRUPTED, SIGNAL_BASE, STOPPED, USER_ERROR
from mae_dist.printed import escaped
from mae_dist.run import events, jobs, layout, slurm_cli
from mae_dist.run.events import Event
from mae_dist.run.jobs import Submission

PROGRAM = "mae-dist: "
"""How the one-line error messages of mae-dist begin."""
EXPECTED_STATUSES = (DONE, STOPPED, INTERRUPTED, SIGNAL_BASE + signal.SIGTERM)
"""Exit statuses of a rank that finished or was stopped: it has saved, or had nothing to save yet."""
SUBFOLDERS = {"checkpoints", "pictures", "features", "forensics", "replay", "wandb"}
"""Folders of a run that contain no other runs."""
QUIET = 300.0
"""Seconds without a change, at least, after which a run that SLURM does not know counts as stopped."""


@dataclass(frozen=True)
class RunStatus:
    """``state`` is one word, ``message`` the reason where one is known, ``requeues`` how often SLURM has started the
    job again, ``job`` its number if the run was submitted.
    """

    state: str
    message: str = ""
    requeues: int = 0
    job: str = ""

    def __str__(self) -> str:
        times = f"{self.requeues} time{'s' * (self.requeues > 1)}"
        if self.state == "requeued":
            text = f"requeued ({self.requeues})"
        else:
            text = self.state + (f", requeued {times}" if self.requeues else "")
        return f"{text}: {escaped(str(self.message))}" if self.message else text


def find_runs(top: Path) -> Iterator[Path]:
    """Folders of runs in `top`, itself included, sorted by name; also runs that are only queued."""
    for path, folders, files in os.walk(top):
        is_run = layout.CONFIG in files or events.FILE in files
        skipped = layout.BEFORE_THE_RUN | (SUBFOLDERS if is_run else set())
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        if is_run:
            yield Path(path)


def run_status(run: Path, states: Mapping[str, str], quiet: float = QUIET) -> RunStatus:
    """The status of a run; ``states`` are SLURM's job states.

    A run that SLURM does not know, because it was not submitted or there is no SLURM here, has the status that its own
    last event gives. Without one it is running if its metrics, checkpoints or events have changed within ``quiet``
    seconds, else stopped: its processes may be another machine's, so they are not searched for.
    """
    finished, recorded = (run / layout.RESULT).is_file(), events.read(run)
    submissions = jobs.submissions_in(recorded, run)
    if not submissions:
        return RunStatus("finished") if finished else _recorded_status(recorded) or RunStatus(_state_by_age(run, quiet))
    newest = submissions[-1]
    tasks = jobs.events(Path(newest.logs), newest.job)
    requeues = max((event["start"] for task in tasks.values() for event in task), default=0)
    slurm_state, _, reason = states.get(newest.job, "").partition(" ")
    state, message, pending = _job_status(run, one_start(tasks, requeues), slurm_state, quiet)
    failure = root_failure(failures(recorded, tasks, requeues))
    if finished:
        state, message, pending = "finished", "", 0
    elif reason and state in ("queued", "requeued", "stopped"):
        message = f"{message}; SLURM: {explained_reason(reason)}".removeprefix("; ")
    elif state == "failed" and not tasks:
        message = _printed(newest) or message
    elif state == "failed" and failure:
        explained = failure["reason"] == "rank_lost" and slurm_state in slurm_cli.KILLED
        message = message if explained else failure["message"]
    return RunStatus(state, message, requeues + pending, newest.job)


def _job_status(run: Path, tasks: dict[int, list[Event]], slurm_state: str, quiet: float) -> tuple[str, str, int]:
    """State, message and the number of requeues still to come (0 or 1), from the tasks' events of the newest start."""
    everything = [event for task in tasks.values() for event in task]
    ends = last_ends(tasks)
    requeue = next((event for event in reversed(everything) if event["event"] == "requeue"), None)
    stopped_by = next((event["by"] for event in everything if event["event"] == "stop_requested"), "")
    if slurm_state in slurm_cli.WAITING:
        return ("requeued", requeue["message"] if requeue else "", 1) if everything else ("queued", "", 0)
    completing, unknown = slurm_state == slurm_cli.COMPLETING, not slurm_state
    if slurm_state in slurm_cli.ACTIVE or (completing and len(ends) < max(1, len(tasks))):
        return "running", "", 0
    if requeue and (completing or (unknown and requeue["by"] != "slurm")):
        return "requeued", requeue["message"], 1
    unexpected = [end for end in ends.values() if end["status"] not in EXPECTED_STATUSES]
    if any(end["status"] == USER_ERROR for end in unexpected):
        return "failed", describe_status(USER_ERROR), 0
    if slurm_state == slurm_cli.CANCELLED:
        return "stopped", "cancelled", 0
    if slurm_state in slurm_cli.KILLED and (unexpected or len(ends) < max(1, len(tasks))):
        return "failed", slurm_state, 0
    if unexpected:
        # a launcher ends the other ranks by SIGTERM, and survivors of a lost rank exit with FAILED
        first = min(
            unexpected, key=lambda end: (end["status"] == -signal.SIGTERM, end["time"], end["status"] == FAILED)
        )
        return "failed", describe_status(first["status"]), 0
    if ends and len(ends) == len(tasks):
        done = all(end["status"] == DONE for end in ends.values())
        return ("finished", "", 0) if done else ("stopped", stopped_by, 0)
    if slurm_state == slurm_cli.FAILED:
        return "failed", "SLURM's state is FAILED", 0
    if unknown and not everything:
        return "unknown", "SLURM does not know the job, or does not answer", 0
    return (_state_by_age(run, quiet) if unknown else "stopped"), stopped_by, 0


def explained_reason(reason: str) -> str:
    """SLURM's reason for a job to wait or to be cancelled, with what it means where its name does not say it."""
    if reason == slurm_cli.NEVER:
        return f"a job that it waits for has failed ({reason})"
    return f"{reason}; `scontrol release` lets it start" if "held" in reason.lower() else reason


def one_start(tasks: Mapping[int, list[Event]], start: int) -> dict[int, list[Event]]:
    """The events of one start of a job, by task; only tasks that have some."""
    chosen = {task: [event for event in found if event["start"] == start] for task, found in sorted(tasks.items())}
    return {task: found for task, found in chosen.items() if found}


def last_ends(tasks: Mapping[int, list[Event]]) -> dict[int, Event]:
    """The last event `end` of each task that has one."""
    return {task: event for task, found in tasks.items() for event in found if event["event"] == "end"}


def failures(recorded: Iterable[Event], tasks: Mapping[int, list[Event]], start: int) -> list[Event]:
    """The `fail` events that a run recorded during one start of its job, oldest first; ``tasks`` has all its starts."""
    started: dict[int, float] = {}
    for event in (event for task in tasks.values() for event in task):
        started[event["start"]] = min(_seconds(event), started.get(event["start"], math.inf))
    begin = started.get(start, math.inf)
    end = min((time for number, time in started.items() if number > start), default=math.inf)
    return [event for event in recorded if event["event"] == "fail" and begin <= _seconds(event) < end]


def since_last_start(recorded: list[Event]) -> list[Event]:
    """The events of a run after its last `start`, or all if it has none."""
    starts = [i for i, event in enumerate(recorded) if event["event"] == "start"]
    return recorded[starts[-1] + 1 :] if starts else recorded


def root_failure(found: Iterable[Event]) -> Event | None:
    """The likeliest root cause among events: the first `fail`, or the first that is not the loss of another rank."""
    failed = [event for event in found if event["event"] == "fail"]
    return min(failed, key=lambda event: event["reason"] == "rank_lost", default=None)


def describe_status(status: int) -> str:
    """An exit status as text, with the name of the signal if one ended the process."""
    number = -status if status < 0 else status - SIGNAL_BASE
    known = {number.value for number in signal.Signals}
    return f"ended by {signal.Signals(number).name}" if number in known else f"exit status {status}"


def _recorded_status(recorded: list[Event]) -> RunStatus | None:
    """The status that a run has recorded at its end, unless it has been started again since."""
    since = since_last_start(recorded)
    last = next((event for event in reversed(since) if event["event"] in ("stop", "fail")), None)
    if last and last["event"] == "stop":
        return RunStatus("stopped", last["message"])
    failure = root_failure(since)
    return RunStatus("failed", failure["message"]) if failure else None


def _printed(job: Submission) -> str:
    """What the script of a job printed last in the name of mae-dist, before any task."""
    lines = jobs.log_lines(Path(job.logs), job.job, 0)
    return next((line.removeprefix(PROGRAM) for line in reversed(lines) if line.startswith(PROGRAM)), "")


def _seconds(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _state_by_age(run: Path, quiet: float) -> str:
    names = (layout.METRICS, events.FILE, "checkpoints")
    changed = max((path.stat().st_mtime for name in names if (path := run / name).exists()), default=0.0)
    return "running" if time.time() - changed < quiet else "stopped"
