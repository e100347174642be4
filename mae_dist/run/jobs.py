"""The jobs of a run: which were submitted, and the files that each of their tasks leaves. Imports no torch.

    LOGS/JOB_TASK.jsonl         events of a task, one a line: {"event": KIND, "start": N, "time": ISO 8601, ...}
        start                   host, tasks, nodes
        stop_requested          by (a signal's name, or "time limit")
        end                     status (exit status of the child process; -n: signal n ended it)
        requeue                 reason, by, message, saved, as in the run's events.jsonl; the last of a start counts
    LOGS/JOB_TASK_log.out       output of the task, over all its starts

LOGS is RUN/jobs, or the jobs/ of the sweep that the run is part of; submissions are in RUN/events.jsonl. Every file has
one writer. A job is named by its number, an element of an array by both, 12_3; a task by its number, which is its rank
where each task is a rank; a start by the number of requeues before it.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from mae_dist.run import events as run_events
from mae_dist.run import jsonl

FOLDER = "jobs"
PIPELINE = "pipeline"
"""The folder beside the stages' with their stamp files, and the logs of stages that make no run."""
MOST_LOG, MOST_LINES = 2**26, 500_000
"""Bytes and lines of a log that are read, its last ones."""
FIELDS = {"stop_requested": ("by",), "end": ("status",), "requeue": ("by", "message")}
"""The fields that an event of a task always has beside `start`."""
Reason = Literal["saved", "stopped", "time_limit", "rank_lost"]
"""Why a job is requeued: stopped and saved; stopped and not saved; at the time limit and not saved; a rank failed."""
By = Literal["task", "slurm", "script"]
"""Who requeues a job. If SLURM was about to and later does not know the job, it has not done so."""


@dataclass(frozen=True)
class Submission:
    """A job of a run. ``nodes`` is as it was requested: "2" or "1-4"."""

    job: str
    logs: str
    nodes: str
    tasks_per_node: int


def record_submission(run: Path, submission: Submission) -> None:
    """Append a submission to the run's events.jsonl, with the folder of its logs as seen from the run's."""
    run_events.append(run, "submit", **asdict(submission) | {"logs": os.path.relpath(submission.logs, run)})


def submissions(run: Path) -> list[Submission]:
    """All submissions of a run, oldest first."""
    return submissions_in(run_events.read(run), run)


def submissions_in(recorded: Iterable[run_events.Event], run: Path) -> list[Submission]:
    """The submissions among the events of the run in the folder `run`, in their order."""
    names = [field.name for field in fields(Submission)]
    submits = (event for event in recorded if event["event"] == "submit")
    found = (Submission(**{name: event[name] for name in names}) for event in submits)
    return [replace(submission, logs=str(run / submission.logs)) for submission in found]


def record(logs: Path, job: str, task: int, event: str, start: int, **values: Any) -> None:
    """Append an event to the file of a task."""
    line = {"event": event, "start": start, "time": run_events.now()} | values
    jsonl.append(logs / f"{job}_{task}.jsonl", line)


def events(logs: Path, job: str) -> dict[int, list[dict[str, Any]]]:
    """Events of each task of a job, oldest first."""
    files = {file: file.stem.removeprefix(f"{job}_") for file in logs.glob(f"{job}_*.jsonl")}
    read = {int(task): jsonl.read(file, run_events.MOST) for file, task in files.items() if task.isdecimal()}
    return {task: [e for e in run_events.sound(found, FIELDS) if type(e.get("start")) is int]
            for task, found in read.items()}  # fmt: skip


def log_file(logs: Path, job: str, task: int) -> Path:
    """The file with the output of a task, as submitit names it."""
    return logs / f"{job}_{task}_log.out"


def log_lines(logs: Path, job: str, task: int) -> list[str]:
    """The `last_lines` of the output of a task; [] where there is none."""
    file = log_file(logs, job, task)
    return last_lines(file) if file.is_file() else []


def last_lines(file: Path) -> list[str]:
    """The lines of a log; of one of more than MOST_LOG bytes or MOST_LINES lines the last."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - MOST_LOG))
        return stream.read(MOST_LOG).decode(errors="replace").splitlines()[-MOST_LINES:]
