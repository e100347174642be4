"""Handing jobs to SLURM through submitit: one job, or many as an array; after others; or only the script of it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launch.cluster import Cluster, ask, one_line
from launch.pipeline import Stage
from launch.slurm_task import SCRIPT_SETUP
from launch.task_runner import SIGNAL, JobSpec, script_end

FOR_EVER = 10**6
"""Times that submitit lets a job time out: when to stop is not its decision."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK")
"""Beginnings of variables that say how SLURM is reached; all others of SLURM describe an allocation."""
DEAF = """sh -c 'trap "" USR1 USR2; exec "$@"' sh"""
"""Runs a command to which these signals do nothing until it listens: early ones would end it."""


def submit(jobs: Sequence[JobSpec], cluster: Cluster, stage: Stage, code: Path, after: str | None) -> list[str]:
    """Queue the jobs of a stage (several: as an array); their names, "12" or "12_0", "12_1", ...

    ``after`` is a dependency in SLURM's words. Raises ValueError with sbatch's reason; nothing is queued then.
    """
    executor = submitit.SlurmExecutor(jobs[0].logs, max_num_timeout=FOR_EVER, python=_python(cluster))
    executor.update_parameters(**parameters(jobs[0], cluster, stage, code, after))
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0]).job_id]
        with executor.batch():
            queued = [executor.submit(job) for job in jobs]
        return [job.job_id for job in queued]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"sbatch refuses: {one_line(str(error))}") from error


def script(jobs: Sequence[JobSpec], cluster: Cluster, stage: Stage, code: Path) -> str:
    """The script that `submit` hands to sbatch, but for what it waits for."""
    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(jobs[0].logs)}"
    chosen = parameters(jobs[0], cluster, stage, code, after=None)
    return _make_sbatch_string(
        command=command, folder=jobs[0].logs, map_count=len(jobs) if len(jobs) > 1 else None, **chosen
    )


def rehearse(text: str) -> None:
    """Ask SLURM whether it would take a script, without queueing it (ValueError in one sentence)."""
    try:
        ask("sbatch", "--test-only", said=text)
    except ValueError as error:
        raise ValueError(f"sbatch refuses: {error}") from error


def leave_allocation() -> None:
    """Forget the allocation that one submits from, if any. A job would take for its own what SLURM does not set anew:
    the memory, over which srun stumbles, the number of requeues, the end.
    """
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_") and not name.startswith(KEPT)]:
            del os.environ[name]


def parameters(job: JobSpec, cluster: Cluster, stage: Stage, code: Path, after: str | None) -> dict[str, Any]:
    """A job's options in submitit's words."""
    tasks = job.tasks_per_node
    cpus = (cluster.cpus_per_task or 0) * cluster.ranks_per_node // tasks or None
    nodes = cluster.nodes if job.ranked else "1"
    gpus = cluster.gpus_per_node if job.ranked else 0
    more = {"requeue": True, "nodes": nodes}
    steps = ["--kill-on-bad-exit=0", f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    fixed = nodes.isdigit()  # of a range SLURM would keep the first start's number of tasks, and wait for as many nodes
    more |= {} if fixed else {"mincpus": tasks * (cpus or 1)}
    more |= {name: value is None or value for name, value in cluster.sbatch.items()}
    more = {name: value for name, value in more.items() if value is not False}
    if after:
        more |= {"dependency": after, "kill-on-invalid-dep": "yes"}
    exports = [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
    exports += [f"export {key}={shlex.quote(value)}" for key, value in cluster.env.items()]
    known = {
        "job_name": stage.name, "array_parallelism": stage.at_once,
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "time": cluster.minutes, "ntasks_per_node": tasks if fixed else None,
        "gpus_per_node": gpus or None, "cpus_per_task": cpus if fixed else None, "exclusive": cluster.exclusive or None,
        "mem": None if cluster.memory is None else f"{round(cluster.memory * 1000)}M",
        "signal_delay_s": round(cluster.stop_before_end), "stderr_to_stdout": True,
        "setup": [*SCRIPT_SETUP, *cluster.setup, *exports],
        "teardown": script_end(job.logs),
        "srun_args": [*steps, *cluster.srun],
        "additional_parameters": more,
    }  # fmt: skip
    return {key: value for key, value in known.items() if value is not None} | {"wckey": None}


def _python(cluster: Cluster) -> str:
    assert SIGNAL in DEAF
    return f"{DEAF} {cluster.python or shlex.quote(sys.executable)}"
