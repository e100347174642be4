"""Runs of 2 nodes x 2 tasks on a real SLURM, interrupted in every way that SLURM has: each ends with the bits, and the
samples in the order, of a run that was not interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from .launching import NODES, Launch, Launched, assert_equal_runs

pytestmark = pytest.mark.slow
INTERRUPTION = 20
"""The step after which a run is interrupted."""
STEP_SECONDS = 0.1
"""Least seconds a step of such a run, so that it does not finish before it is interrupted."""


def test_run_on_two_nodes_with_two_tasks_each(reference: Launched) -> None:
    starts = [own[0] for own in reference.task_events().values()]
    assert sorted(start["host"] for start in starts) == ["node1", "node1", "node2", "node2"]
    host, port = next(reference.logs.glob("*.address")).read_text().split()
    assert host == "node1"
    assert int(port) > 1024
    output = reference.output(0)
    assert "4 ranks on node1, node2; python" in output
    assert str(reference.code) in output
    assert "4 ranks on" not in reference.output(1)
    (start,) = reference.starts()
    frozen = yaml.safe_load((reference.code / "settings" / "pretrain.yaml").read_text())
    assert frozen["checkpoint"]["minutes"] == 30  # lose_at_most
    assert start["ranks"] == 4
    assert start["git"] == (reference.code / "REVISION").read_text().strip()
    assert json.loads((reference.run / "result.json").read_text())["loss"] > 0


def requeued_by_hand(launched: Launched) -> None:
    launched.slurm.run("scontrol", "requeue", launched.job)


def preempted_without_grace(launched: Launched) -> None:
    preempted(launched)


def preempted(launched: Launched) -> None:
    launched.slurm.run(
        "sbatch", "--parsable", "--partition=urgent", f"--nodelist={','.join(NODES[:2])}", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap", "srun sleep 1",
    )  # fmt: skip


def preempted_without_user_signal(launched: Launched) -> None:
    launched.slurm.cluster("user-signal", "off")
    preempted(launched)


def node_failed(launched: Launched) -> None:
    launched.slurm.cluster("kill-node", NODES[1])
    launched.slurm.cluster("start-node", NODES[1])  # from which SLURM sees that it was dead


@pytest.mark.parametrize(
    "interrupt", [requeued_by_hand, preempted, preempted_without_user_signal, preempted_without_grace, node_failed]
)
def test_requeue_after_preemption_or_node_failure_is_bit_identical(
    interrupt: Callable[[Launched], None], reference: Launched, launch: Launch
) -> None:
    partition = "rude" if interrupt is preempted_without_grace else "main"
    launched = launch(interrupt.__name__, cluster=f"partition: {partition}", slow=STEP_SECONDS)
    launched.reach(INTERRUPTION)
    try:
        interrupt(launched)
        launched.wait(lambda: launched.num_starts() > 1, "it is started again")
        assert not launched.results()  # submitit does not take the job for ended
    finally:
        launched.slurm.cluster("user-signal", "on")
    launched.finish()
    assert set(launched.results()) == {"success"}
    assert_equal_runs(launched, reference)
    first, second = launched.starts()
    assert first["step"] == 0
    assert 0 < second["step"] <= second["reached"]  # without a warning, it resumes from an earlier checkpoint
    if interrupt not in (preempted_without_grace, node_failed):
        assert second["step"] == second["reached"] >= INTERRUPTION
        assert launched.saved_before_leaving()


def test_elastic_requeue_on_fewer_nodes(reference: Launched, launch: Launch) -> None:
    reference.slurm.await_idle(NODES[:2])
    launched = launch("elastic", shape=["--nodes", "1-2"], slow=STEP_SECONDS)
    launched.reach(INTERRUPTION)
    launched.slurm.cluster("kill-node", NODES[1])
    launched.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=dead")  # noticed at once
    try:
        launched.finish()
    finally:
        launched.slurm.cluster("start-node", NODES[1])
    assert [start["ranks"] for start in launched.starts()] == [4, 2]
    assert_equal_runs(launched, reference, elastic=True)
