"""Cluster files, and their check against the partitions of the cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import CLUSTER_FILE, ROOT

from launch import cluster as cluster_file
from launch import pipeline, submit
from launch.cluster import Cluster
from mae_dist.run import slurm_cli

SINFO = """\
main*|2-00:00:00|gpu:a100:8(S:0-1)|64|512000|4
main*|2-00:00:00|gpu:8|64|256000|2
cpu|infinite|(null)|32|128000|10
short|30:00|gpu:v100:4,gpu:a100:2|64|64000+|2
"""


def test_partitions_are_read_from_sinfo() -> None:
    rows = cluster_file.partitions_of(SINFO)
    assert [row["gpus"] for row in rows] == [8, 8, 0, 6]
    assert [row["seconds"] for row in rows] == [2 * 86400, 2 * 86400, None, 1800]
    assert rows[0] == {
        "name": "main", "default": True, "seconds": 172800, "gpus": 8, "cpus": 64, "memory": 512000, "nodes": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"partition": "gpu"}, "partition=gpu: this cluster has no such partition, only main, cpu, short"),
        ({"gpus_per_node": 9}, "gpus_per_node=9: the nodes of partition main have 8"),
        ({"partition": "cpu", "gpus_per_node": 1}, "gpus_per_node=1: the nodes of partition cpu have 0"),
        ({"nodes": "1-7"}, "nodes=1-7: partition main has 6"),
        (
            {"gpus_per_node": 8, "cpus_per_task": 9},
            "8 ranks a node need 72 CPU cores, the nodes of partition main have 64",
        ),
        ({"memory": 600}, "memory=600: the nodes of partition main have 512 GB"),
        ({"time": "3-00:00:00"}, "time=3-00:00:00: partition main allows 48:00:00"),
        ({"partition": "main,gpu"}, "partition=gpu: this cluster has no such partition, only main, cpu, short"),
        ({"partition": "cpu, main", "gpus_per_node": 9}, "gpus_per_node=9: the nodes of partition cpu have 0"),
    ],
)
def test_request_beyond_the_partition_is_refused(shape: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cli, "call", lambda *_: SINFO)
    for sound in (Cluster(), Cluster(partition="cpu,main", gpus_per_node=8), Cluster(partition="short,", time="10")):
        cluster_file.check_partition(sound)
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        cluster_file.check_partition(Cluster(**shape))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nodes: 0", "nodes=0: must be a number, or a range"),
        ("nodes: 4-1", "nodes=4-1: must be a number, or a range"),
        ("tasks_per_node: 0", "tasks_per_node=0: must be at least 1"),
        ("{gpus_per_node: 2, tasks_per_node: 4}", "tasks_per_node=4: more ranks than gpus_per_node=2"),
        ("time: soon", 'time=soon: write it as "hours:minutes:seconds"'),
        ("time: 1-12:30:00:00", "time=1-12:30:00:00: write it as"),
        ("time: '0:01:00'", "shorter than starting and saving take .* ask for 5 minutes or more"),
        ("env: {MY-NAME: x}", "env: 'MY-NAME' is no name of an environment variable"),
        ("gpu_per_node: 8", "did you mean gpus_per_node"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("memory: -1", "memory=-1.0: must be at least 0"),
        ("[a, b]", "expected sections with keys"),
        ("sbatch: {exclude: [node1, node2]}", "sbatch.exclude=.*: must be one value, or true"),
    ],
)
def test_invalid_cluster_file_is_refused(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        cluster_file.load(str(file), [])


def test_example_cluster_file_is_valid() -> None:
    example = cluster_file.load(str(ROOT / "launch" / "clusters" / "example.yaml"), ["nodes=1-4"])
    assert example.nodes_range == (1, 4)
    assert (example.ranks_per_node, example.minutes) == (8, 24 * 60)
    assert str(example) == "1-4 nodes x 8 ranks of partition gpu, 8 GPUs each, 24:00:00"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("90:30", 91), ("0:30:00", 30), ("2-12", 3600), ("1-12:30", 2190), ("2-00:00:00", 2880),
        ("7-0", 10080), ("UNLIMITED", None), ("infinite", None), ("0", None),
    ],
)  # fmt: skip
def test_time_limit_is_what_sbatch_reads(text: str, minutes: int | None, tmp_path: Path) -> None:
    """The forms of sbatch's manual page; in a file also without quotes, where YAML reads 24:00:00 as 86400."""
    assert Cluster(time=text).minutes == minutes
    file = tmp_path / "cluster.yaml"
    file.write_text(f"time: {text}\n")
    assert cluster_file.load(str(file), []).minutes == minutes


@pytest.mark.parametrize(
    ("typed", "seconds"), [("24:00:00", 86400), ("1:00:00", 3600), ("1-00:00:00", 86400), ("90", 5400), ("90:00", 5400)]
)
def test_time_option_in_minutes_or_hours(typed: str, seconds: int) -> None:
    options = submit.parse(
        ["pretrain", "--cluster", CLUSTER_FILE, "--time", typed, "--nodes", "3", "--gpus-per-node", "0"]
    )
    cluster = submit.cluster_for(pipeline.Stage("pretrain", "pretrain", ()), options)
    assert (cluster_file.seconds_of(cluster.time), cluster.nodes, cluster.gpus_per_node) == (seconds, "3", 0)


def test_folder_as_cluster_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--cluster {tmp_path}: is a folder; there are .*test.yaml"):
        cluster_file.load(str(tmp_path), [])
