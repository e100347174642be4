"""Folders of runs, their jobs and their logs as training and SLURM leave them, for the tests of mae_dist.monitor."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mae_dist import config
from mae_dist.run import events, jobs
from mae_dist.run.directory import RunDir

JOB = "7"
LOST = "mae-dist: rank 1 did not answer at step 4: hung or gone; the same command resumes from the last checkpoint"


def create_run(path: Path, *overrides: str, steps: int = 0, total: str = "train.steps=1000") -> RunDir:
    """A run's folder with a config.yaml and `steps` lines of metrics; of 6000 images."""
    always = [f"out={path}", "data.path=/data", "model.name=vit_demo4", "train.global_batch=64"]
    settings = config.load("pretrain", None, [*always, total, *overrides])
    run = RunDir(path)
    run.open("pretrain", settings, "0123456789abcdef", config.total_steps(settings.train, 6000))
    with (path / "metrics.jsonl").open("a") as stream:
        for step in range(1, steps + 1):
            record = {"kind": "step", "step": step, "epoch": round(step * 64 / 6000, 4), "images_per_second": 320.0}
            stream.write(json.dumps(record | {"lr": 1e-3, "loss": 1.0 + (step > steps - 100)}) + "\n")
    return run


def submit(path: Path, job: str = JOB) -> None:
    """Record a submission of two tasks."""
    jobs.record_submission(path, jobs.Submission(job, str(path / jobs.FOLDER), "1", 2))


def record(path: Path, task: int, event: str, start: int = 0, **fields: Any) -> None:
    """Record an event of a task."""
    jobs.record(path / jobs.FOLDER, JOB, task, event, start, **fields)


def fail(path: Path, rank: int, reason: str, message: str) -> None:
    """Record the failure of a rank."""
    events.append(path, "fail", reason=reason, rank=rank, message=message.removeprefix("mae-dist: "))


def write_log(path: Path, task: int, *lines: str, start: int = 0) -> None:
    """Append a start with these lines to the log of a task."""
    head = f"== start {start} of job {JOB}, task {task} on node{task + 1}"
    file = jobs.log_file(path / jobs.FOLDER, JOB, task)
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as stream:
        stream.write("\n".join([head, *lines, ""]))


def age(path: Path, seconds: float) -> None:
    """Make the files and folders in a folder this many seconds old."""
    for file in path.iterdir():
        os.utime(file, (time.time() - seconds, time.time() - seconds))
