"""The cluster of the SLURM tests: names of nodes, requeues, node failures, errors."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CLUSTER, Slurm

JOB = """#!/bin/bash
setsid sleep 300 &
echo $(hostname) ${SLURM_RESTART_COUNT:-0} $! >>$1
wait
"""


@pytest.fixture(autouse=True)
def clean_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no job and no dead node to the next test."""
    cluster = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if cluster:
        cluster.clear()


def test_slurm_nodes_have_names_and_gpus(slurm: Slurm) -> None:
    assert sorted(slurm.run("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]
    assert slurm.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1"


def test_requeue_by_scontrol_and_after_node_failure(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(JOB)
    files = {node: tmp_path / node for node in ("node1", "node2")}

    def runs(node: str) -> list[list[str]]:
        """Host, number of requeues and process id of a child, of each start so far."""
        return [line.split() for line in files[node].read_text().splitlines()] if files[node].exists() else []

    jobs = {
        node: slurm.run("sbatch", "--parsable", f"--nodelist={node}", "--output=/dev/null", str(script), str(file))
        for node, file in files.items()
    }
    slurm.wait(lambda: all(len(runs(node)) == 1 for node in jobs), "both jobs run")

    slurm.run("scontrol", "requeue", jobs["node1"])
    slurm.cluster("kill-node", "node2")
    child = runs("node2")[0][2]
    assert not Path(f"/proc/{child}/exe").exists()
    slurm.cluster("start-node", "node2")

    slurm.wait(lambda: all(len(runs(node)) == 2 for node in jobs), "both jobs run again")
    for node, job in jobs.items():
        assert [run[:2] for run in runs(node)] == [[node, "0"], [node, "1"]]
        assert slurm.state(job) == "RUNNING"
    slurm.run("scancel", jobs["node2"])
    slurm.wait(lambda: slurm.state(jobs["node2"]) == "CANCELLED", "a job is cancelled")


def test_cluster_up_refuses_foreign_folders_and_other_options(slurm: Slurm) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "letter").write_text("dear")
        assert "is not empty" in error_of("up", folder)[1]
        assert os.listdir(folder) == ["letter"]
    assert "it runs with --nodes 4 " in error_of("up", str(slurm.folder), "--nodes", "5")[1]
    assert "there is no node 'node9'" in error_of("kill-node", str(slurm.folder), "node9")[1]


def error_of(*words: str, user: int | None = None) -> tuple[int, str]:
    """Exit status and error message, which is one line, of the script with these arguments."""
    done = subprocess.run(
        ["bash", "-s", "-", *words], input=CLUSTER.read_text(), user=user, cwd="/", capture_output=True, text=True
    )
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_cluster_errors_are_one_line() -> None:
    long = "/tmp/" + "x" * 60
    for words, reason in {
        ("rise",): "unknown word 'rise'",
        ("up",): "too few or too many words",
        ("down", "/tmp/slurm", "now"): "too few or too many words",
        ("up", long): "at most 60 characters",
        ("up", "/tmp/a b"): "only letters",
    }.items():
        status, line = error_of(*words)
        assert status == 1
        assert reason in line
    status, line = error_of("up", "/tmp/slurm-of-nobody", user=65534 if os.geteuid() == 0 else None)
    assert status == 3
    assert "root" in line
    assert not Path("/tmp/slurm-of-nobody").exists()
