"""Which task of which job this process is, as SLURM's environment says, and the address at which all tasks meet."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit

from mae_dist.run.jsonl import write_atomic

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds to wait for a file that another node writes."""
SCRIPT_SETUP = (
    "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}",
    'export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(SLURM_TIME_FORMAT=%s squeue -h -j "$job" -o %e)}"',
)
"""Shell lines of a job before its tasks: its name, which `task_runner.script_end` needs, and its end, where SLURM does
not set it. An element of an array needs both numbers: the last element's job number alone means the whole array.
"""


@dataclass(frozen=True)
class SlurmTask:
    """A task of a job; an element of an array is job 12_3. ``start`` is the number of requeues before this start."""

    job: str
    start: int
    number: int
    num_tasks: int
    local_task: int
    node: int
    hosts: tuple[str, ...]

    @staticmethod
    def here() -> SlurmTask:
        """The task that this process is, from its environment variables."""
        own = submitit.JobEnvironment()
        return SlurmTask(
            own.job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0)), own.global_rank, own.num_tasks, own.local_rank,
            own.node, tuple(own.hostnames),
        )  # fmt: skip


def rendezvous(task: SlurmTask, logs: Path) -> tuple[tuple[str, str], socket.socket | None]:
    """Address and port at which the ranks of this start meet, and the socket that reserves the port until then.

    Task 0 has the kernel choose a port and keeps it bound: a rank of this machine can still listen there, and no other
    process is given it. The other tasks read the address from a file.
    """
    file = logs / f"{task.job}.{task.start}.address"
    if task.number == 0:
        reserved = reserve_port()
        address = task.hosts[0], str(reserved.getsockname()[1])
        write_atomic(file, " ".join(address))
        for old in logs.glob(f"{task.job}.*.address"):
            if old != file:
                old.unlink()
        return address, reserved
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
    while file.name not in os.listdir(logs):  # a network file system may cache that a file is missing, not a list
        if time.monotonic() > deadline:
            sys.exit(f"{file}: not there after {RENDEZVOUS_TIMEOUT:g} s; does every node see this folder?")
        time.sleep(0.05)
    host, port = file.read_text().split()
    return (host, port), None


def reserve_port() -> socket.socket:
    """A socket bound to a free port, on which another one of this machine may listen while it only holds the port."""
    reserved = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def end_of_job() -> float | None:
    """The time limit of the job in seconds since 1970; None where it has none or SLURM does not set it."""
    try:
        return float(os.environ.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None
