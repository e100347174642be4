"""The cluster of the SLURM tests: nodes with names, jobs that come back, nodes that die, clear refusals."""

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
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves on the cluster is gone before the next."""
    cluster = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if cluster:
        cluster.clear()


@pytest.mark.slow
def test_nodes_have_names_and_gpus(slurm: Slurm) -> None:
    assert sorted(slurm.run("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]
    assert slurm.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1"


@pytest.mark.slow
def test_jobs_come_back_after_a_requeue_and_after_the_death_of_their_node(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(JOB)
    notes = {node: tmp_path / node for node in ("node1", "node2")}

    def runs(node: str) -> list[list[str]]:
        """Host, number of restarts and a child's process id of each run so far."""
        return [line.split() for line in notes[node].read_text().splitlines()] if notes[node].exists() else []

    jobs = {
        node: slurm.run("sbatch", "--parsable", f"--nodelist={node}", "--output=/dev/null", str(script), str(note))
        for node, note in notes.items()
    }
    slurm.wait(lambda: all(len(runs(node)) == 1 for node in jobs), "both jobs run")

    slurm.run("scontrol", "requeue", jobs["node1"])
    slurm.cluster("kill-node", "node2")
    child = runs("node2")[0][2]
    assert not Path(f"/proc/{child}/exe").exists()  # nor has a zombie
    slurm.cluster("start-node", "node2")

    slurm.wait(lambda: all(len(runs(node)) == 2 for node in jobs), "both jobs run again")
    for node, job in jobs.items():
        assert [run[:2] for run in runs(node)] == [[node, "0"], [node, "1"]]
        assert slurm.state(job) == "RUNNING"
    slurm.run("scancel", jobs["node2"])
    slurm.wait(lambda: slurm.state(jobs["node2"]) == "CANCELLED", "a job is cancelled")


@pytest.mark.slow
def test_up_touches_neither_folders_of_others_nor_a_running_cluster(slurm: Slurm) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "letter").write_text("dear")
        assert "is not empty" in refusal("up", folder)[1]
        assert os.listdir(folder) == ["letter"]
    assert "it runs with --nodes 4 " in refusal("up", str(slurm.folder), "--nodes", "5")[1]
    assert "there is no node 'node9'" in refusal("kill-node", str(slurm.folder), "node9")[1]


def refusal(*words: str, user: int | None = None) -> tuple[int, str]:
    """Status and the one line of the script for these words."""
    done = subprocess.run(
        ["bash", "-s", "-", *words], input=CLUSTER.read_text(), user=user, cwd="/", capture_output=True, text=True
    )
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_refusals_are_one_line() -> None:
    long = "/tmp/" + "x" * 60
    for words, reason in {
        ("rise",): "unknown word 'rise'",
        ("up",): "too few or too many words",
        ("down", "/tmp/slurm", "now"): "too few or too many words",
        ("up", long): "at most 60 characters",
        ("up", "/tmp/a b"): "only letters",
    }.items():
        status, line = refusal(*words)
        assert status == 1
        assert reason in line
    status, line = refusal("up", "/tmp/slurm-of-nobody", user=65534 if os.geteuid() == 0 else None)
    assert status == 3
    assert "root" in line
    assert not Path("/tmp/slurm-of-nobody").exists()
