"""Where a task of a job is: what SLURM's environment says, where all tasks meet, what the controller says of the job.

Holds no process and decides nothing. In a container SLURM's commands may be missing: then the controller is silent.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit

SHARED = 300.0
"""Seconds in which a file of another node must be seen."""
SCRIPT_SETUP = (
    "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}",
    'export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(SLURM_TIME_FORMAT=%s squeue -h -j "$job" -o %e)}"',
)
"""Shell lines of a job before its tasks: its name, which the last lines need, and its end, where SLURM does not say it.
A single number, as the last of an array has, would stand for the whole array.
"""


@dataclass(frozen=True)
class SlurmTask:
    """Where in which job this task is, as SLURM says; ``start`` counts requeues. An array's job is named 12_3."""

    job: str
    start: int
    task: int
    num_tasks: int
    local_task: int
    node: int
    hosts: tuple[str, ...]

    @staticmethod
    def here() -> SlurmTask:
        """From the environment of a task."""
        own = submitit.JobEnvironment()
        return SlurmTask(
            own.job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0)), own.global_rank, own.num_tasks, own.local_rank,
            own.node, tuple(own.hostnames),
        )  # fmt: skip


def meet(place: SlurmTask, logs: Path) -> tuple[tuple[str, str], socket.socket | None]:
    """Address and port at which the ranks of this start meet, and what keeps the port free until then.

    Task 0 has the kernel choose a port and keeps it bound, which lets a rank of this machine listen there and nobody
    else be given it; it tells the others in a file.
    """
    file = logs / f"{place.job}.{place.start}.address"
    if place.task == 0:
        held = reserved_port()
        address = place.hosts[0], str(held.getsockname()[1])
        temporary = file.with_suffix(".new")
        temporary.write_text(" ".join(address))
        temporary.replace(file)
        for old in logs.glob(f"{place.job}.*.address"):
            if old != file:
                old.unlink()
        return address, held
    deadline = time.monotonic() + SHARED
    while file.name not in os.listdir(logs):  # asked for itself, a network file system may remember that it was missing
        if time.monotonic() > deadline:
            sys.exit(f"{file}: not there after {SHARED:g} s; does every node see this folder?")
        time.sleep(0.05)
    host, port = file.read_text().split()
    return (host, port), None


def reserved_port() -> socket.socket:
    """A socket bound to a free port, on which another one of this machine may listen while it only holds the port."""
    held = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def end_of_job() -> float | None:
    """When the job's time is over, as seconds since 1970; None where SLURM does not say, or it has no limit."""
    try:
        return float(os.environ.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None


def state_of(job: str) -> tuple[str | None, int]:
    """State of the job and number of its requeues, as the controller has them; (None, this start's) if it is silent."""
    own = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    try:
        command = ["scontrol", "show", "job", "-o", job]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    fields = dict(word.split("=", 1) for word in said.partition("\n")[0].split() if "=" in word)
    return fields.get("JobState"), int(fields.get("Restarts", own))
