"""SLURM's commands and job states, for what runs on login nodes and in the tasks of jobs. Imports no torch."""

import re
import subprocess
from collections.abc import Iterable

TIMEOUT = 20.0
"""Seconds to wait for a command of SLURM, which itself waits 9 s for a controller that is down, or longer."""
NO_CONFIG = ("resolve_ctls_from_dns_srv", "configuration source", "unable to status file")
"""Parts of the error messages of SLURM's commands when they do not know where its controller is."""

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""Job states before a start, the first or another."""
ACTIVE = ("RUNNING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""Job states between a start and its end."""
COMPLETING, CANCELLED, FAILED = "COMPLETING", "CANCELLED", "FAILED"
KILLED = ("TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "LAUNCH_FAILED", "REVOKED")
"""Final job states in which SLURM killed the tasks, so that the state explains more than their exit statuses."""
NEVER = "DependencyNeverSatisfied"
"""SLURM's reason where a job that another one waits for has failed."""
ORDINARY = ("", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "Cleaning")
"""Reasons for which any job waits, and which explain nothing."""
ALIVE = (*WAITING, *ACTIVE, COMPLETING)
"""States of a job that can still write to its run."""


def call(*command: str, stdin: str = "") -> str:
    """Standard output of a command of SLURM; ValueError with SLURM's reason in one line where it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]}: not found; is this a login node of a SLURM cluster? Without one: `mae-dist VERB ...`"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]}: no answer in {TIMEOUT:g} s; is SLURM's controller down?") from None
    if done.returncode:
        text = one_line(done.stderr or done.stdout) or f"{command[0]}: status {done.returncode}"
        if any(part in text for part in NO_CONFIG):
            text = f"no SLURM in this shell; try `module load slurm`, or set SLURM_CONF ({command[0]}: {text})"
        raise ValueError(text)
    return done.stdout


def one_line(text: str) -> str:
    """The error messages of a command of SLURM in one line, each once."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def states(jobs: Iterable[str]) -> dict[str, str]:
    """The state of each of these jobs now, RUNNING or TIMEOUT for example; of one that waits or was cancelled also why,
    after a space, where that is explained saying: "PENDING QOSMaxJobsPerUserLimit".

    Jobs that SLURM does not know are left out: all of them where there is no SLURM or it does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    arrays = {job: job.partition("_")[0] for job in wanted}
    # the controller also knows, for some minutes, those that have ended; -r: a line for each of an array
    found = _job_states("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", ",".join(sorted(wanted)))
    if missing := wanted - found.keys():
        numbers = ",".join(sorted({arrays[job] for job in missing}))
        recorded = _job_states("sacct", "-n", "-P", "-X", "-o", "JobID,State,Reason", "-j", numbers)
        # those of an array that never started share one line, 12_[3-7%2] for example, or 12 if it was cancelled at once
        shared = {job.partition("_")[0]: state for job, state in recorded.items() if "[" in job or "_" not in job}
        recorded = {job: shared[array] for job, array in arrays.items() if array in shared} | recorded
        found = recorded | found
    return {job: found[job] for job in wanted if job in found}


def state_and_restarts(job: str) -> tuple[str | None, int | None]:
    """State of a job and the number of its requeues, as the controller has them; (None, None) where it is silent."""
    first_line = _output("scontrol", "show", "job", "-o", job).partition("\n")[0]  # of an array: the job itself
    fields = dict(word.split("=", 1) for word in first_line.split() if "=" in word)
    return fields.get("JobState"), int(fields["Restarts"]) if "Restarts" in fields else None


def max_array_size() -> int | None:
    """How many jobs an array may have, as their numbers, from 0, are below MaxArraySize; None where it is not known."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"), re.M)
    return None if found is None else int(found[1])


def _job_states(*command: str) -> dict[str, str]:
    """Job -> state, and reason, from a command that prints lines JOB|STATE|REASON."""
    found = {}
    for job, state, *reason in (line.split("|") for line in _output(*command).splitlines() if line.count("|")):
        words = [*state.split()[:1], *reason]  # CANCELLED by 0
        explained = len(words) > 1 and words[0] in (*WAITING, CANCELLED) and words[1] not in ORDINARY
        found |= {job: " ".join(words[: 1 + explained])} if words else {}
    return found


def _output(*command: str) -> str:
    """What a command of SLURM prints, whatever its exit status; "" where there is no such command or no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
