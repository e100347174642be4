"""What the environment says of this process: which rank of how many it is, and how many cores it may use.

torchrun sets RANK, WORLD_SIZE and others. The tasks of `srun` and of MPI launchers have variables of their own, which
`of_ranks` translates, so that they become ranks too. Imports no torch.
"""

import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mae_dist import interfaces

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING_FILE = "MAE_DIST_MEETING_FILE"
"""Environment variable: a file through which ranks of one machine find each other, instead of a server's port."""
MEETING = ("MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
"""Launcher -> its variables for TORCHRUN's; srun's last one lists the tasks of all nodes."""
JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "HYDI_CONTROL_FD", "PMI_JOBID")
"""Variables that are equal for all tasks of one launch, and differ between launches."""
SPECIAL_STEPS = 0xFFFFFFF0
"""From here on SLURM numbers the steps that are no user's: a job's script, the shell of salloc."""
FIRST_PORT, NUM_PORTS = 15_000, 15_000
"""Ports below those that kernels give to connections by themselves."""
COMPILED = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable: torch's folder for compiled code."""
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def of_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables of this process, where another launcher started it as one of several; {} where torchrun set
    them, or nothing did. Raises ValueError where they are incomplete, are not numbers, or contradict each other.
    """
    if any(environ.get(name) is not None for name in ("RANK", "WORLD_SIZE")):
        check_torchrun(environ)
        return {}
    for launcher, names in LAUNCHERS.items():
        number, count, local, here = (environ.get(name, "") for name in names)
        if not (number.isdigit() and count.isdigit() and int(count) > 1):
            continue
        node = environ.get("SLURM_NODEID", "0") if launcher == "srun" else "0"
        local_count = tasks_of_node(here, int(node) if node.isdigit() else 0) or int(count)
        found = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": local or number}
        found |= {"LOCAL_WORLD_SIZE": str(local_count), "MASTER_PORT": port(environ)}
        found["MASTER_ADDR"] = first_host(environ, launcher, alone=local_count == int(count))
        return found | {name: environ[name] for name in MEETING if environ.get(name)}
    return {}


def nodes_left_out(environ: Mapping[str, str]) -> str:
    """A sentence for a process that is not one of several ranks but has several nodes of SLURM; else "". Raises
    ValueError in the shell of `salloc` on a login node, where a run would leave all nodes of the allocation idle.
    """
    if "SLURM_JOB_ID" not in environ:
        return ""
    way = "`srun --ntasks-per-node=N mae-dist ...` runs N ranks on each node"
    if not {"SLURM_PROCID", "SLURMD_NODENAME"} & environ.keys():
        raise ValueError(
            f"allocation {environ['SLURM_JOB_ID']}: its nodes are not this machine: {way}; to run here all the same, "
            f"`env -u SLURM_JOB_ID mae-dist ...`"
        )
    nodes, step = environ.get("SLURM_JOB_NUM_NODES", "1"), environ.get("SLURM_STEP_ID", "")
    if nodes == "1" or (step.isdigit() and int(step) < SPECIAL_STEPS):
        return ""
    return f"of the {nodes} nodes of allocation {environ['SLURM_JOB_ID']}, this run uses one: {way}"


def of_user() -> dict[str, str]:
    """Variables to set for libraries, where the system knows no name or home of the user, as in many containers."""
    import getpass

    found = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        found["LOGNAME"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        found["HOME"] = str(_own_folder("home", "the home of a user without one", "HOME"))
    return found


def python() -> list[str]:
    """The words that start `python -m mae_dist` in another process. It takes no modules from the working folder, which
    may be one of data in which others have put theirs, unless mae_dist itself lies there.
    """
    own = os.path.exists("mae_dist") and os.path.samefile("mae_dist", Path(__file__).parent)
    return [sys.executable, *([] if own else ["-P"]), "-m", "mae_dist"]


def prepare_compiler(device: str) -> None:
    """Give torch a folder of this user's own for what it compiles, whose default, /tmp/torchinductor_USER, others can
    make first. Raises ValueError where they have made this one, or where there is no compiler: of C for GPUs, or C++.
    """
    from shutil import which

    variable, names = ("CC", ("gcc", "clang", "cc")) if device == "cuda" else ("CXX", ("g++",))
    if not any(which(name) for name in (os.environ.get(variable, ""), *names) if name):
        raise ValueError(
            f"machine.compile=true: torch needs a compiler ({', '.join(names)}, or what the environment variable "
            f"{variable} names), and there is none; install one, or leave machine.compile=false"
        )
    if COMPILED not in os.environ:
        os.environ[COMPILED] = str(
            _own_folder("compiled", "machine.compile=true: the folder of compiled code", COMPILED)
        )


def _own_folder(name: str, what: str, variable: str) -> Path:
    """A folder of this user's own below that of temporary files, the same at each start. Raises ValueError where others
    have made it, as they can foresee its name; in its place an environment variable can name a folder.
    """
    import tempfile

    folder = Path(tempfile.gettempdir()) / f"mae_dist-{name}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{what}, {folder}, is another user's, or others may write into it; remove it, or set the environment "
            f"variable {variable} to a folder of your own"
        )
    return folder


def check_torchrun(environ: Mapping[str, str]) -> None:
    """Raise ValueError where torchrun's variables are not all there, or are not its numbers."""
    values = {name: environ.get(name) for name in ("RANK", "WORLD_SIZE", *MEETING)}
    way = "start with torchrun, which sets all of them, or run `unset RANK WORLD_SIZE LOCAL_RANK` to start without it"
    for name, value in values.items():
        if not value:
            there = ", ".join(f"{other}={text}" for other, text in values.items() if text)
            state = "empty" if value == "" else "not set"
            raise ValueError(f"environment variable {name} is {state}{f' beside {there}' if there else ''}: {way}")
    for name in (*TORCHRUN, "MASTER_PORT"):
        if (value := environ.get(name)) is not None and not value.isdigit():
            raise ValueError(f"environment variable {name}={value[:20]!r} is no number: {way}")
    for name, bound in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in environ and bound in environ and int(environ[name]) >= int(environ[bound]):
            raise ValueError(
                f"environment variable {name}={environ[name]} is not below {bound}={environ[bound]}: {way}"
            )


def rank(environ: Mapping[str, str]) -> int:
    """The rank that torchrun gave this process; 0 where its variables are left over, so that their refusal is seen."""
    try:
        check_torchrun(environ)
    except ValueError:
        return 0
    return int(environ["RANK"])


def tasks_of_node(text: str, node: int) -> int | None:
    """The number of tasks of a node, of srun's "2(x3),1" or of a plain number; None where it is not known."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else counts[0]


def first_host(environ: Mapping[str, str], launcher: str, alone: bool) -> str:
    """Where rank 0 is. Raises ValueError where the launcher does not say it and the ranks are on several machines."""
    if alone:
        return interfaces.LOCALHOST
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if launcher == "srun" and (match := re.match(r"([^,\[]+)(?:\[(\w+))?([^,\]]*\]([^,]*))?", nodes)):
        return f"{match[1]}{match[2] or ''}{match[4] or ''}"
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    raise ValueError(
        f"{launcher} started this process as one of several on several machines: set the environment variable "
        "MASTER_ADDR to the name of the machine of rank 0, for example with mpirun -x MASTER_ADDR=node1"
    )


def port(environ: Mapping[str, str]) -> str:
    """A port that all tasks of a launch derive alike from its name."""
    name = " ".join(environ.get(job, "") for job in JOBS)
    return str(FIRST_PORT + zlib.crc32(name.encode()) % NUM_PORTS)


def cores() -> int:
    """Cores that this process may use: those of its affinity mask, and no more than the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(quota() or allowed)))


def threads(environ: Mapping[str, str], ranks: int) -> int:
    """Threads for each of `ranks` processes of this machine: its cores shared out, or what SLURM gave each task, if it
    says so, since each task may see its own cores alone.
    """
    given = environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores(), int(given)) if ranks > 1 and given.isdigit() else max(1, cores() // ranks)


def quota(groups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """The number of cores whose time the control groups of this process grant it, the least of all; None: no limit."""
    found = []
    for folder in control_groups("cpu", groups, own):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
            with suppress(OSError, ValueError):  # "max": no limit
                most, period = map(int, " ".join((folder / file).read_text() for file in files).split())
                found += [most / period] if most > 0 and period > 0 else []
    return min(found, default=None)


def memory(groups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Bytes of memory that this process may use: those of the machine, and no more than its control groups grant."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in control_groups("memory", groups, own):
        for file in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                found.append(int((folder / file).read_text()))
    return min(found)


def control_groups(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, one in the other, and that may limit it."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if path and (not controllers or controller in controllers.split(",")):
                root = groups / controller if controllers else groups
                place = root / path.lstrip("/")
                yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(root))


def fast_precisions() -> tuple[str, ...]:
    """The 16-bit precisions that the CPU has instructions for; without them fp32 is faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    return ("bf16",) if "avx512_bf16" in flags or "amx_bf16" in flags else ()
