"""What launchers and their jobs leave beside a run, so that anybody can see what became of it. Imports no torch.

    RUN/jobs/submitted.jsonl    one line a submission: time, job, nodes, tasks_per_node, logs
    LOGS/JOB_TASK.jsonl         one line an event of a task: start, told, end, requeue; when, in which start
    LOGS/JOB_TASK_log.out       what the task said, over all its starts

LOGS is RUN/jobs, or the jobs/ of the sweep that the run is of. Every file has one writer. A job is named by its number,
with an underscore and its place for one of an array; a task by its number, which is its rank where a task is a rank.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER, SUBMITTED = "jobs", "submitted.jsonl"


@dataclass(frozen=True)
class Submission:
    """One line of submitted.jsonl. ``nodes`` is as it was asked for: "2" or "1-4"."""

    job: str
    logs: str
    nodes: str
    tasks_per_node: int
    time: str


def note_submission(run: Path, submission: Submission) -> None:
    """Append to the run's submitted.jsonl."""
    _append(run / FOLDER / SUBMITTED, asdict(submission))


def submissions(run: Path) -> list[Submission]:
    """All submissions of a run, oldest first."""
    return [Submission(**line) for line in _read(run / FOLDER / SUBMITTED)]


def note(logs: Path, job: str, task: int, event: str, start: int, **facts: Any) -> None:
    """Append an event of a task; ``start`` counts how often SLURM had requeued the job by then."""
    _append(logs / f"{job}_{task}.jsonl", {"event": event, "start": start, "time": now()} | facts)


def events(logs: Path, job: str) -> dict[int, list[dict[str, Any]]]:
    """Events of each task of a job, oldest first."""
    files = {file: file.stem.removeprefix(f"{job}_") for file in logs.glob(f"{job}_*.jsonl")}
    return {int(task): _read(file) for file, task in files.items() if task.isdigit()}


def log_file(logs: Path, job: str, task: int) -> Path:
    """What a task said; submitit's name for it."""
    return logs / f"{job}_{task}_log.out"


def now() -> str:
    """The time as all these files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
