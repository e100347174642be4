"""Submitting jobs to SLURM through submitit: one job or a job array, with dependencies; or only printing its script."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launch.cluster import Cluster
from launch.pipeline import Stage
from launch.slurm_task import SCRIPT_SETUP
from launch.task_runner import SIGNAL, JobSpec, script_end
from mae_dist.errors import USER_ERROR
from mae_dist.run import slurm_cli

MAX_TIMEOUTS = 10**6
"""Time limits after which submitit stops requeueing a job: never, as the task decides that."""
PREPENDED = ("PATH", "PYTHONPATH")
"""Variables whose value in `env` comes before what they are, which the job needs as well."""
CONNECTION = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK")
"""Prefixes of the variables by which SLURM is reached; all other SLURM_ variables describe an allocation."""
IGNORE_SIGNALS = """sh -c 'trap "" USR1 USR2; exec "$@"' sh"""
"""Runs a command that ignores these signals until it installs its handlers: early ones would end it."""


def submit(
    jobs: Sequence[JobSpec], cluster: Cluster, stage: Stage, code: Path, after: str | None, largest: int | None = None
) -> list[str]:
    """Queue the jobs of a stage; give their names, "12" or "12_0", "12_1", ... Several are an array, more than the
    `largest` several arrays, each after the one before, so that no more of them run at once than of one array.

    ``after`` is a value of sbatch's --dependency. Raises ValueError with sbatch's reason; then nothing is queued.
    """
    names: list[str] = []
    try:
        for part in parts(jobs, largest):
            before = [after] if after else []
            before += [f"afterany:{number_of(names[-1])}"] if names else []
            names += _queue(part, cluster, stage, code, ",".join(before) or None)
    except BaseException:
        if names:
            cancel(numbers_of(names))
        raise
    return names


def parts(jobs: Sequence[JobSpec], largest: int | None) -> list[Sequence[JobSpec]]:
    """Jobs in parts of at most `largest`, if there is a limit."""
    size = max(1, len(jobs) if largest is None else largest)
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


def number_of(name: str) -> str:
    """The number of a job, or of the array that it is in, from its name."""
    return name.partition("_")[0]


def numbers_of(names: Iterable[str]) -> list[str]:
    """The numbers of jobs and arrays with these names, each once."""
    return [*dict.fromkeys(map(number_of, names))]


def _queue(jobs: Sequence[JobSpec], cluster: Cluster, stage: Stage, code: Path, after: str | None) -> list[str]:
    executor = submitit.SlurmExecutor(jobs[0].logs, max_num_timeout=MAX_TIMEOUTS, python=_python(cluster))
    executor.update_parameters(**parameters(jobs[0], cluster, stage, code, after))
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0]).job_id]
        with executor.batch():
            queued = [executor.submit(job) for job in jobs]
        return [job.job_id for job in queued]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"sbatch refuses: {slurm_cli.one_line(str(error))}") from error


def script(jobs: Sequence[JobSpec], cluster: Cluster, stage: Stage, code: Path) -> str:
    """The script that `submit` hands to sbatch, without the dependency."""
    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(jobs[0].logs)}"
    chosen = parameters(jobs[0], cluster, stage, code, after=None)
    return _make_sbatch_string(
        command=command, folder=jobs[0].logs, map_count=len(jobs) if len(jobs) > 1 else None, **chosen
    )


def check_script(text: str) -> None:
    """Raise ValueError, in one sentence, if SLURM would refuse a script. Queues nothing."""
    try:
        slurm_cli.call("sbatch", "--test-only", stdin=text)
    except ValueError as error:
        raise ValueError(f"sbatch refuses: {error}") from error


def cancel(numbers: Iterable[str]) -> None:
    """Cancel jobs, as far as SLURM can be reached."""
    subprocess.run(["scancel", *numbers], check=False)


def leave_allocation() -> None:
    """Remove the variables of the allocation that this process runs in, if any. Otherwise a job would inherit those
    that SLURM does not set again: the memory, with which srun fails, the number of requeues, the job's end.
    """
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_") and not name.startswith(CONNECTION)]:
            del os.environ[name]


def parameters(job: JobSpec, cluster: Cluster, stage: Stage, code: Path, after: str | None) -> dict[str, Any]:
    """The options of a job, as submitit names them."""
    tasks = job.tasks_per_node
    cpus = (cluster.cpus_per_task or 0) * cluster.ranks_per_node // tasks or None
    nodes = cluster.nodes if job.ranked else "1"
    gpus = cluster.gpus_per_node if job.ranked else 0
    more = {"requeue": True, "nodes": nodes}
    steps = ["--kill-on-bad-exit=0", f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    # with a range, SLURM would keep the number of tasks of the first start and wait for as many nodes
    fixed = nodes.isdigit()
    more |= {} if fixed else {"mincpus": tasks * (cpus or 1)}
    more |= {name: value is None or value for name, value in cluster.sbatch.items()}
    if cluster.gres and gpus:
        more["gres"] = ",".join([f"{cluster.gres}:{gpus}", *([more["gres"]] if "gres" in more else [])])
    more = {name: value for name, value in more.items() if value is not False}
    if after:
        more |= {"dependency": after, "kill-on-invalid-dep": "yes"}
    known = {
        "job_name": stage.name, "array_parallelism": stage.at_once,
        "partition": ",".join(cluster.partitions) or None, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "time": cluster.minutes or "UNLIMITED",
        "ntasks_per_node": tasks if fixed else None,
        "gpus_per_node": None if cluster.gres else gpus or None,
        "cpus_per_task": cpus if fixed else None, "exclusive": cluster.exclusive or None,
        "mem": None if cluster.memory is None else f"{round(cluster.memory * 1000)}M",
        "signal_delay_s": round(cluster.stop_before_end), "stderr_to_stdout": True,
        "setup": [*SCRIPT_SETUP, *map(checked_line, cluster.setup), *exports(cluster, code)],
        "teardown": script_end(job.logs),
        "srun_args": [*steps, *cluster.srun],
        "additional_parameters": more,
    }  # fmt: skip
    return {key: value for key, value in known.items() if value is not None} | {"wckey": None}


def checked_line(line: str) -> str:
    """A line of `setup` that ends the job, with a message that names the line, where it fails."""
    name = shlex.quote(f"mae-dist: the line of setup `{line[:200]}` failed with status")
    return f'eval {shlex.quote(line)} || {{ status=$?; echo {name} "$status"; exit {USER_ERROR}; }}'


def exports(cluster: Cluster, code: Path) -> list[str]:
    """Shell lines after those of `setup`: the variables of the tasks, and what keeps the job on its copy of the code
    whatever `setup` or `env` have set.
    """
    lines = []
    for name, value in cluster.env.items():
        before = f"${{{name}:+:${name}}}" if name in PREPENDED else ""
        lines.append(f"export {name}={shlex.quote(value)}{before}")
    home = [] if cluster.python else ["unset PYTHONHOME"]  # it would take this Python away from its packages
    own = [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
    return [*lines, *home, *own, "export SLURM_EXPORT_ENV=ALL", "set +eu"]  # else a failing srun would end the script


def _python(cluster: Cluster) -> str:
    assert SIGNAL in IGNORE_SIGNALS
    return f"{IGNORE_SIGNALS} {cluster.python or shlex.quote(sys.executable)}"
