"""How a run stands: queued, running, requeued, stopped, failed or finished, from its folder, its jobs and SLURM.

`runs` shows it for many runs, `logs` for one. The newest submission counts, and in it the newest start: SLURM says
whether the job waits, runs or has ended, and the events of its tasks say how they ended. Reads only, and no torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dist.run import events, jobs, layout, slurm_cli
from mae_dist.run.jobs import Submission
from mae_dist.signals import REQUEUE

STOPPED = (REQUEUE, 130, 143)
"""Exit statuses of a run that was told to stop: it has saved, or had nothing to save yet."""
INSIDE = {"checkpoints", "pictures", "features", "forensics", "replay", "wandb"}
"""Folders of a run in which there are no other runs."""
QUIET = 300.0
"""Seconds without a change, at least, after which a run that SLURM knows nothing of counts as stopped."""
Event = dict[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """``state`` in one word, why in few, how often SLURM has started the job again; ``job`` where there is one."""

    state: str
    why: str = ""
    requeues: int = 0
    job: str = ""

    def __str__(self) -> str:
        times = f"{self.requeues} time{'s' * (self.requeues > 1)}"
        if self.state == "requeued":
            text = f"requeued ({self.requeues})"
        else:
            text = self.state + (f", requeued {times}" if self.requeues else "")
        return f"{text}: {self.why}" if self.why else text


def find(top: Path) -> Iterator[Path]:
    """Folders of runs below `top`, itself included, by name; runs that are only queued, too."""
    for path, folders, files in os.walk(top):
        here = Path(path)
        is_run = layout.CONFIG in files or (here / events.FILE).is_file()
        skipped = layout.BEFORE_THE_RUN | (INSIDE if is_run else set())
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        if is_run:
            yield here


def run_status(run: Path, states: Mapping[str, str], quiet: float = QUIET) -> RunStatus:
    """How the run stands, where SLURM has said ``states`` of jobs.

    A run that SLURM knows nothing of, for it was not submitted or there is no SLURM here, is as it has noted at its end
    itself. If it has not, it is running if its metrics, checkpoints or notes of starts have changed within ``quiet``
    seconds, else stopped: nobody is asked for processes, which may be another machine's.
    """
    finished, submissions = (run / layout.RESULT).is_file(), jobs.submissions(run)
    if not submissions:
        return RunStatus("finished") if finished else _own_word(run) or RunStatus(_by_age(run, quiet))
    newest = submissions[-1]
    notes = last_start(jobs.events(Path(newest.logs), newest.job))
    requeues = max((event["start"] for events in notes.values() for event in events), default=0)
    state, why, again = _judge(run, notes, states.get(newest.job, ""), quiet)
    if finished:
        state, why, again = "finished", "", 0
    elif state == "failed" and (own := _own_word(run)):
        why = own.why
    return RunStatus(state, why, requeues + again, newest.job)


def _judge(run: Path, notes: dict[int, list[Event]], word: str, quiet: float) -> tuple[str, str, int]:
    """State, reason and 1 if another start is to come, from the notes of the newest start and SLURM's word."""
    everything = [event for events in notes.values() for event in events]
    ends = endings(notes)
    requeue = next((event for event in reversed(everything) if event["event"] == "requeue"), None)
    told = next((event["by"] for event in everything if event["event"] == "stop_requested"), "")
    if word in slurm_cli.WAITING:
        return ("requeued", requeue["message"] if requeue else "", 1) if everything else ("queued", "", 0)
    if word in slurm_cli.ACTIVE or (word == "COMPLETING" and len(ends) < max(1, len(notes))):
        return "running", "", 0
    if requeue and (word == "COMPLETING" or (word == "" and requeue["by"] != "slurm")):
        return "requeued", requeue["message"], 1
    failures = [end for end in ends.values() if end["status"] not in (0, *STOPPED)]
    if mistakes := [end for end in failures if end["status"] == 2]:
        return "failed", ended(mistakes[0]["status"]), 0
    if word == "CANCELLED":
        return "stopped", "cancelled", 0
    if word in slurm_cli.KILLED and (failures or len(ends) < max(1, len(notes))):
        return "failed", word, 0
    if failures:
        # a launcher ends the rest by SIGTERM, and 1 is also what survivors say
        first = min(failures, key=lambda end: (end["status"] == -signal.SIGTERM, end["time"], end["status"] == 1))
        return "failed", ended(first["status"]), 0
    if ends and len(ends) == len(notes):
        well = all(end["status"] == 0 for end in ends.values())
        return ("finished", "", 0) if well else ("stopped", told, 0)
    if word == "FAILED":
        return "failed", "SLURM says FAILED", 0
    if not everything and not word:
        return "unknown", "SLURM does not know the job, or does not answer", 0
    return ("stopped" if word else _by_age(run, quiet)), told, 0


def last_start(events: dict[int, list[Event]]) -> dict[int, list[Event]]:
    """Of the events of each task, those of the newest start of their job; only tasks that have some."""
    newest = max((event["start"] for task in events.values() for event in task), default=0)
    return of_start(events, newest)


def of_start(events: dict[int, list[Event]], start: int) -> dict[int, list[Event]]:
    """Of the events of each task, those of one start; only tasks that have some."""
    chosen = {task: [event for event in notes if event["start"] == start] for task, notes in sorted(events.items())}
    return {task: notes for task, notes in chosen.items() if notes}


def endings(notes: dict[int, list[Event]]) -> dict[int, Event]:
    """The last `end` of each task that has one."""
    return {
        task: next(event for event in reversed(events) if event["event"] == "end")
        for task, events in notes.items()
        if any(event["event"] == "end" for event in events)
    }


def ended(status: int) -> str:
    """An exit status in words."""
    number = -status if status < 0 else status - 128
    known = {number.value for number in signal.Signals}
    return f"ended by {signal.Signals(number).name}" if number in known else f"exit status {status}"


def newest_submissions(runs: list[Path]) -> dict[Path, Submission]:
    """The newest submission of each run that has one."""
    found = ((run, jobs.submissions(run)) for run in runs)
    return {run: submissions[-1] for run, submissions in found if submissions}


def _own_word(run: Path) -> RunStatus | None:
    """How the run has said that it ended, unless it has been started again since."""
    ends, starts = run / layout.ENDS, run / "provenance.jsonl"
    lines = layout.recent(ends)
    if not lines or (starts.is_file() and starts.stat().st_mtime > ends.stat().st_mtime):
        return None
    return RunStatus(lines[-1]["state"], lines[-1]["why"])


def _by_age(run: Path, quiet: float) -> str:
    names = ("metrics.jsonl", "provenance.jsonl", "checkpoints")
    changed = max((path.stat().st_mtime for name in names if (path := run / name).exists()), default=0.0)
    return "running" if time.time() - changed < quiet else "stopped"
