"""A pipeline or a sweep without SLURM: one run after another on this machine, as the commands that a user types."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from launch.pipeline import Run, Stage
from mae_dist import environment
from mae_dist.errors import DONE, INTERRUPTED, STOPPED
from mae_dist.monitor.logs import find_cause, last_line
from mae_dist.monitor.status import root_failure, since_last_start
from mae_dist.run import events, jobs

ROOT = Path(__file__).parents[1]
LOG = "local.log"


def run_stages(stages: list[Stage], dry_run: bool = False) -> int:
    """Run what is not done; give the exit status of the first run that failed, or 0. The same command resumes. With
    `dry_run` the commands are only printed.

    As under SLURM, the other runs of a stage do not mind that one has failed, and the stages after it are not run.
    """
    failed = DONE
    for stage in stages:
        for run in stage.runs if failed == DONE or stage.run_after_failures else ():
            if run.done:
                print(f"{run.name}: done already, skipped", flush=True)
                continue
            print(f"\n$ mae-dist {shlex.join(run.argv)}", flush=True)
            if dry_run:
                continue
            status, output = execute(run)
            if status in (STOPPED, INTERRUPTED):
                print(f"stopped in {run.name}; the same command resumes", file=sys.stderr)
                return status
            if status != DONE:
                print_failure(run, status, output)
                failed = failed or status
            elif run.stamp is not None:
                Path(run.stamp[0]).write_text(run.stamp[1])
    return failed


def print_failure(run: Run, status: int, output: list[str]) -> None:
    """Print why a run failed, in one line, and where its output is."""
    failure = root_failure(since_last_start(events.read(run.folder)))
    cause = find_cause(output, status, failure) or find_cause(output, status)
    line = last_line(output, cause) or (output[-1] if output else "")
    print(f"mae-dist: {run.name} failed with status {status}: {line.removeprefix('mae-dist: ')}\n"
          f"its output is in {log_of(run)}", file=sys.stderr)  # fmt: skip


def execute(run: Run) -> tuple[int, list[str]]:
    """Run `mae-dist ARGV`; give its exit status and output. The output is kept in the run's local.log. SIGTERM is
    passed on, so that no run is left behind, and it saves.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*environment.python(), *run.argv], env=os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    output: list[str] = []
    try:
        while True:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    output.append(line.rstrip())
                break
            except KeyboardInterrupt:  # the child process got it as well, and saves
                continue
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    log_of(run).write_text("\n".join(output) + "\n")
    return status, output


def log_of(run: Run) -> Path:
    """The file with the output of a run."""
    return Path(run.stamp[0]).with_name(LOG) if run.stamp else run.folder / jobs.FOLDER / LOG
