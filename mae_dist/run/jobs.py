"""What launchers and their jobs leave beside a run, so that anybody can see what became of it. Imports no torch.

    RUN/jobs/submitted.jsonl    one line a submission: time, job, nodes, tasks_per_node, logs
    LOGS/JOB_TASK.jsonl         one line an event of a task: start, told, end, requeue; when, in which start
    LOGS/JOB_TASK_log.out       what the task said, over all its starts

LOGS is RUN/jobs, or the jobs/ of the sweep that the run is of. Every file has one writer. A job is named by its number,
with an underscore and its place for one of an array; a task by its number, which is its rank where a task is a rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER, SUBMITTED = "jobs", "submitted.jsonl"
RECORDS = "pipeline"
"""The folder beside the stages' that says which are done, and has the logs of those that make no run."""
BY_SLURM = "; by SLURM"
"""How a note of a requeue ends that SLURM was doing by itself; if it then knows the job no more, it has not done it."""
PATIENCE = 10.0
"""Seconds to wait for an answer of SLURM; its commands wait 9 s for a controller that is down, and some for longer."""


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


def states(jobs: Iterable[str]) -> dict[str, str]:
    """SLURM's word for each of these jobs now, RUNNING or TIMEOUT for example; those that it does not know are left
    out, which is all of them where there is no SLURM or it does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    arrays = {job: job.partition("_")[0] for job in wanted}
    # the controller also knows, for some minutes, those that have ended; -r: a line for each of an array
    found = _ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", ",".join(sorted(wanted)))
    if missing := wanted - found.keys():
        numbers = ",".join(sorted({arrays[job] for job in missing}))
        record = _ask("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", numbers)
        # those of an array that never started share one line, 12_[3-7%2] for example, or 12 if it was cancelled at once
        shared = {job.partition("_")[0]: state for job, state in record.items() if "[" in job or "_" not in job}
        record = {job: shared[array] for job, array in arrays.items() if array in shared} | record
        found = record | found
    return {job: found[job] for job in wanted if job in found}


def _ask(*command: str) -> dict[str, str]:
    """The lines JOB|STATE of one of SLURM's commands; {} when there is no such command, or no answer in time."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.split("|") for line in said.splitlines())
    return {pair[0]: pair[1].split()[0] for pair in pairs if len(pair) == 2 and pair[1]}  # CANCELLED by 0


def now() -> str:
    """The time as all these files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, which stays whole after one that a full disk or a kill has cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
        torn = stream.read(1) not in (b"\n", b"")
        stream.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found += [json.loads(line)] if line.endswith("}") else []
    return found
