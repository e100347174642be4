"""A pipeline without SLURM: the same stages, one after another on this machine, each the command a user would type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from launch.pipeline import Run, Stage
from mae_dist.monitor.logs import Task, cause_in
from mae_dist.signals import REQUEUE

ROOT = Path(__file__).parents[1]
LOG = "local.log"


def walk(stages: list[Stage]) -> int:
    """Run what is not done; the exit status of the first that failed, or 0. The same command goes on after a stop."""
    for stage in stages:
        for run in stage.runs:
            if run.done:
                print(f"{run.name}: done already, passed over", flush=True)
                continue
            status, said = step(run)
            if status == REQUEUE:
                print(f"stopped and saved in {run.name}; the same command goes on", file=sys.stderr)
            elif status:
                line = Task(0, said, [], cause_in(said)).said or (said[-1] if said else "")
                print(f"submit: stage {run.name} failed with status {status}: {line.removeprefix('mae-dist: ')}\n"
                      f"all that it said is in {log_of(run)}", file=sys.stderr)  # fmt: skip
            if status:
                return status
            assert run.receipt is not None
            Path(run.receipt[0]).write_text(run.receipt[1])
    return 0


def step(run: Run) -> tuple[int, list[str]]:
    """Say and run `mae-dist WORDS`; its exit status and last lines. What it says is kept in the run's local.log."""
    print(f"\n$ mae-dist {shlex.join(run.words)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-u", "-m", "mae_dist", *run.words]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    said: list[str] = []
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line.rstrip())
            break
        except KeyboardInterrupt:  # it has been told as well, and saves
            continue
    status = process.wait()
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    log_of(run).write_text("\n".join(said) + "\n")
    return status, said


def log_of(run: Run) -> Path:
    """The file with what a run said."""
    assert run.receipt is not None
    return Path(run.receipt[0]).with_name(LOG)
