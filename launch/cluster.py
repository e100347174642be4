"""Where to run: the cluster file, the resources that a job requests, and a check of both against SLURM's partitions.

A cluster file holds WHERE to run, never what is trained. Flags of the command line and the keys of a pipeline's stage
override its fields.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_dist import config as configuration
from mae_dist.run import slurm_cli
from mae_dist.setting import setting

UNLIMITED = ("unlimited", "infinite", "n/a")
"""What sbatch takes, and sinfo prints, for no time limit."""
FIELDS = {
    "partition": "partition", "nodes": "nodes", "time": "time", "cpus-per-task": "cpus_per_task", "mem": "memory",
    "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node",
    "gpus": "gpus_per_node", "gpus-per-node": "gpus_per_node", "gpus-per-task": "gpus_per_node",
}  # fmt: skip
"""Options of sbatch -> the field of a cluster file that sets them, and from which ranks and limits follow."""
FLAGS = ("partition", "nodes", "gpus_per_node", "tasks_per_node", "time")
"""Fields that options of the command line override."""
SIGNAL_LEAD = 30.0
"""Seconds by which SLURM may signal before it was requested to: it checks time limits twice a minute."""


@dataclass(frozen=True)
class Cluster:
    partition: str | None = setting(None, "SLURM partition, or several: a,b; none: the cluster's default")
    account: str | None = setting(None, "account that pays")
    qos: str | None = setting(None, "quality of service")
    constraint: str | None = setting(None, "features that the nodes must have, a100 for example")
    nodes: str = setting("1", "nodes; 1-4: as many of them as are free, again at every requeue")
    gpus_per_node: int = setting(0, "GPUs of each node, one rank each", at_least=0)
    gres: str | None = setting(
        None, "request GPUs by --gres=GRES:N, with gpu or gpu:a100 for example; none: by --gpus-per-node=N"
    )
    gpu: str | None = setting(
        None, "name of the GPUs, H100 for example, from which preflight knows speed and memory; none: that in gres or "
        "constraint",
    )  # fmt: skip
    tasks_per_node: int | None = setting(None, "ranks of each node; none: one a GPU", at_least=1)
    cpus_per_task: int | None = setting(None, "CPU cores of each rank", at_least=1)
    memory: float | None = setting(None, "GB of each node; none: the partition's default; 0: all", at_least=0)
    time: str = setting(
        "24:00:00", "time limit in a form of sbatch, days-hours:minutes for example, in quotes in a file"
    )
    start_up: float = setting(60.0, "seconds from the start of a job to its first step", at_least=0)
    stop_before_end: float = setting(
        180.0, "seconds before the time limit at which a run saves and is requeued", at_least=0
    )
    lose_at_most: float = setting(
        30.0, "minutes of work that a stop without warning may lose; runs save that often", above=0
    )
    torchrun: bool = setting(False, "one task on each node, which starts its ranks, instead of one task a rank")
    exclusive: bool = setting(False, "share the nodes with no other job")
    setup: tuple[str, ...] = setting((), "shell lines of the job before its tasks start: modules, environments")
    python: str | None = setting(
        None, "Python of the tasks, 'apptainer exec --nv X.sif python' for example; none: this one"
    )
    srun: tuple[str, ...] = setting((), "more options of srun, --container-image=... of pyxis for example")
    env: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "environment variables of the tasks, as they are; PATH and PYTHONPATH come before what they are"
        },
    )
    sbatch: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "more options of sbatch, without dashes; true: one without a value"}
    )

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def partitions(self) -> list[str]:
        """The partitions, of which SLURM takes the one that is free first; none: the cluster's default."""
        return [name.strip() for name in (self.partition or "").split(",") if name.strip()]

    @property
    def nodes_range(self) -> tuple[int, int]:
        """Smallest and largest number of nodes."""
        least, _, most = self.nodes.partition("-")
        return int(least), int(most or least)

    @property
    def minutes(self) -> int | None:
        """The time limit, rounded up; None for no limit."""
        seconds = seconds_of(self.time)
        return None if seconds is None else -(-seconds // 60)

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes_range[1] > 1)}"
        where = f" of partition {' or '.join(self.partitions)}" if self.partitions else ""
        gpus = f", {self.gpus_per_node} GPU{'s' * (self.gpus_per_node > 1)} each" if self.gpus_per_node else ""
        return f"{nodes} x {self.ranks_per_node} rank{'s' * (self.ranks_per_node > 1)}{where}{gpus}, {self.time}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --cluster and the options that override its fields."""
    example = Path(__file__).parent / "clusters" / "example.yaml"
    parser.add_argument("--cluster", help=f"WHERE: a cluster file, see {example}")
    for name in FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"overrides {name} of the cluster file")


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The `field=value` that the options of `add_flags` give."""
    flags = {name: value for name in FLAGS if (value := getattr(options, name)) is not None}
    if flags.get("time", "").isdigit():  # minutes, as for sbatch
        flags["time"] = f"{int(flags['time']) // 60}:{int(flags['time']) % 60:02d}:00"
    return [f"{name}={json.dumps(value)}" for name, value in flags.items()]


def load(file: str, overrides: list[str]) -> Cluster:
    """Read a cluster file, with `field=value` overrides, and check it. ValueError names field and value."""
    if not Path(file).is_file():
        what = "is a folder" if Path(file).is_dir() else "no such file"
        known = ", ".join(sorted(str(path) for path in Path(__file__).parent.glob("clusters/*.yaml")))
        raise ValueError(f"--cluster {file}: {what}; there are {known}: copy one and say where you are")
    hint = f"see {Path(__file__).parent / 'clusters' / 'example.yaml'}"
    cluster = configuration.read(Cluster, f"cluster {file} needs", hint, file, overrides)
    check_fields(cluster)
    return cluster


def check_fields(cluster: Cluster) -> None:
    """Raise ValueError for values that no cluster could satisfy."""
    if (
        not re.fullmatch(r"[1-9]\d{,5}(-[1-9]\d{,5})?", cluster.nodes)
        or cluster.nodes_range[0] > cluster.nodes_range[1]
    ):
        raise ValueError(f"nodes={cluster.nodes}: must be a number, or a range such as 1-4")
    configuration.check_ranges(cluster)
    for name, value in (("setup", cluster.setup), ("srun", cluster.srun), ("env", cluster.env.values())):
        if odd := [part for part in value if not isinstance(part, str)]:
            raise ValueError(f"{name}: {odd[0]}: must be a text; put quotes around a text with a colon")
    for name, value in cluster.sbatch.items():
        if (own := FIELDS.get(name.replace("_", "-"))) is not None:
            raise ValueError(f"sbatch.{name}={value}: set {own} in the cluster file instead, from which ranks follow")
        if name == "gres" and re.search(r"\bgpu\b", str(value)):
            raise ValueError(f"sbatch.gres={value}: write gpus_per_node: N and gres: gpu, or gpu:TYPE, instead")
        if isinstance(value, dict | list):
            raise ValueError(f"sbatch.{name}={value}: must be one value, or true for an option that has none")
    for line in cluster.setup:
        check_line(line)
    if unfit := [name for name in cluster.env if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
        raise ValueError(f"env: {unfit[0]!r} is no name of an environment variable: letters, digits and _")
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    if gpus and ranks > gpus:
        raise ValueError(f"tasks_per_node={ranks}: more ranks than gpus_per_node={gpus}; a rank needs a GPU of its own")
    least = cluster.start_up + cluster.stop_before_end + SIGNAL_LEAD
    if cluster.minutes is not None and cluster.minutes * 60 < least:
        raise ValueError(
            f"time={cluster.time}: shorter than starting and saving take (start_up={cluster.start_up:g} s, "
            f"stop_before_end={cluster.stop_before_end:g} s, and {SIGNAL_LEAD:g} s by which SLURM may be early); "
            f"ask for {-(-int(least) // 60)} minutes or more"
        )


def check_line(line: str) -> None:
    """Raise ValueError for a line of `setup` that bash does not understand by itself."""
    if (bash := shutil.which("bash")) is None:
        return
    done = subprocess.run([bash, "-n", "-c", line], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0].rpartition(": ")[2]
        raise ValueError(
            f"setup: {line}: is no shell line ({reason}); lines that belong together are one item, after `- |`"
        )


def one_rank(cluster: Cluster) -> list[str]:
    """Overrides for work that ranks cannot share: the CPUs and memory of one rank, and no GPU."""
    memory = cluster.memory / cluster.ranks_per_node if cluster.memory else "null"
    return ["nodes=1", "gpus_per_node=0", "tasks_per_node=1", f"memory={memory}", "exclusive=false"]


def seconds_of(time: str) -> int | None:
    """Seconds in a time limit in any form that sbatch knows: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds; None for no limit, which is 0 too. Raises ValueError.
    """
    if time.lower() in UNLIMITED:
        return None
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time)
    if match is None:
        raise ValueError(
            f'time={time}: write it as "hours:minutes:seconds", "days-hours:minutes:seconds" or any other form of '
            "sbatch's --time, in quotes"
        )
    days, *rest = match.groups()
    first, second, third = (None if part is None else int(part) for part in rest)
    if days is None and third is None:  # minutes, or minutes:seconds
        hours, minutes, seconds = 0, first, second
    else:
        hours, minutes, seconds = first, second, third
    return ((int(days or 0) * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60 + (seconds or 0) or None


def check_partition(cluster: Cluster) -> None:
    """Raise ValueError, in one sentence, if a partition is not there, or if none can give what is requested."""
    there = partitions_of(slurm_cli.call("sinfo", "--all", "-h", "-o", "%P|%l|%G|%c|%m|%D"))  # also hidden ones
    names = cluster.partitions or [row["name"] for row in there if row["default"]][:1]
    if not names:
        raise ValueError("partition: this cluster has no default; name one with --partition or in the cluster file")
    refusals = []
    for name in names:
        rows = [row for row in there if row["name"] == name]
        if not rows:
            known = ", ".join(dict.fromkeys(row["name"] for row in there))
            raise ValueError(f"partition={name}: this cluster has no such partition, only {known}")
        try:
            _check_rows(cluster, name, rows)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) == len(names):
        raise refusals[0]


def _check_rows(cluster: Cluster, name: str, rows: list[dict[str, Any]]) -> None:
    """Raise ValueError if the partition `name` cannot give what is requested; ``rows`` are its nodes."""
    nodes, gpus, cpus = sum(row["nodes"] for row in rows), *(max(row[k] for row in rows) for k in ("gpus", "cpus"))
    limits = [row["seconds"] for row in rows]
    if cluster.gpus_per_node > gpus:
        raise ValueError(f"gpus_per_node={cluster.gpus_per_node}: the nodes of partition {name} have {gpus}")
    if cluster.nodes_range[1] > nodes:
        raise ValueError(f"nodes={cluster.nodes}: partition {name} has {nodes}")
    if (needed := cluster.ranks_per_node * (cluster.cpus_per_task or 1)) > cpus:
        raise ValueError(
            f"cpus_per_task={cluster.cpus_per_task or 1}: {cluster.ranks_per_node} ranks a node need {needed} CPU "
            f"cores, the nodes of partition {name} have {cpus}"
        )
    memory = max(row["memory"] for row in rows)
    if (cluster.memory or 0) * 1000 > memory:
        raise ValueError(f"memory={cluster.memory:g}: the nodes of partition {name} have {memory / 1000:g} GB")
    wanted = math.inf if cluster.minutes is None else cluster.minutes * 60
    if None not in limits and wanted > (limit := max(filter(None, limits))):
        raise ValueError(f"time={cluster.time}: partition {name} allows {limit // 3600}:{limit % 3600 // 60:02d}:00")


def partitions_of(text: str) -> list[dict[str, Any]]:
    """The rows that sinfo prints: name, default, seconds (None: no limit), gpus, cpus, memory (MB), nodes."""
    rows = []
    for line in text.splitlines():
        name, limit, gres, *numbers = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        row = {"name": name.rstrip("*"), "default": name.endswith("*"), "seconds": seconds_of(limit), "gpus": gpus}
        cpus, memory, nodes = (int(number.rstrip("+")) for number in numbers)
        rows.append(row | {"cpus": cpus, "memory": memory, "nodes": nodes})
    return rows
