"""Runs on two nodes of a real SLURM, interrupted in every way that SLURM has: each ends with the bits, and the samples
in the order, of a run that was not interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from .launching import NODES, Launch, Launched, assert_equal_runs

LEAD = 5
"""Steps that a start makes before it is interrupted."""
STEP_SECONDS = 0.1
"""Least seconds a step of such a run, so that it does not finish before it is interrupted."""


def requeued_by_hand(launched: Launched) -> None:
    launched.slurm.run("scontrol", "requeue", launched.job)


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


def interrupt_again(launched: Launched, interrupt: Callable[[Launched], None]) -> tuple[int, int]:
    """Interrupt a start of a run LEAD steps after it began; give the step at which the run resumed, and which it had
    reached.
    """
    launched.wait(launched.starts, "a start")
    number = len(launched.starts())
    launched.reach(launched.starts()[-1]["step"] + LEAD)
    try:
        interrupt(launched)
        launched.wait(lambda: len(launched.starts()) > number, "it is started again")
        assert not launched.results()  # submitit does not take the job for ended
    finally:
        launched.slurm.cluster("user-signal", "on")
    last = launched.starts()[-1]
    return last["step"], last["reached"]


def interrupted_with_warning(launched: Launched, interrupt: Callable[[Launched], None]) -> None:
    """Interrupt a run in a way of which it is told: it saves before it leaves."""
    resumed, reached = interrupt_again(launched, interrupt)
    assert resumed == reached >= LEAD
    assert launched.saved_before_leaving()


def assert_first_start_is_as_submitted(launched: Launched) -> None:
    """Hosts, addresses, code and settings of a run on two nodes."""
    starts = [own[0] for own in launched.task_events().values()]
    assert sorted(start["host"] for start in starts) == ["node1", "node2"]
    host, port = next(launched.logs.glob("*.address")).read_text().split()
    assert host == "node1"
    assert int(port) > 1024
    output = launched.output(0)
    assert "2 ranks on node1, node2; python" in output
    assert str(launched.code) in output
    assert "2 ranks on" not in launched.output(1)
    (start,) = launched.starts()
    frozen = yaml.safe_load((launched.code / "settings" / "pretrain.yaml").read_text())
    assert frozen["checkpoint"]["minutes"] == 30  # lose_at_most
    assert start["ranks"] == 2
    assert start["git"] == (launched.code / "REVISION").read_text().strip()


def test_requeue_after_preemption_and_node_failure_is_bit_identical(reference: Launched, launch: Launch) -> None:
    """Without a warning a run resumes from an earlier checkpoint."""
    launched = launch("interrupted", slow=STEP_SECONDS)
    launched.reach(1)
    assert_first_start_is_as_submitted(launched)
    interrupted_with_warning(launched, preempted)
    resumed, reached = interrupt_again(launched, node_failed)
    assert LEAD <= resumed <= reached
    launched.finish()
    assert set(launched.results()) == {"success"}
    assert_equal_runs(launched, reference)


@pytest.mark.slow
def test_requeue_by_hand_and_after_preemption_without_user_signal_is_bit_identical(
    reference: Launched, launch: Launch
) -> None:
    launched = launch("interrupted-otherwise", slow=STEP_SECONDS)
    interrupted_with_warning(launched, requeued_by_hand)
    interrupted_with_warning(launched, preempted_without_user_signal)
    launched.finish()
    assert set(launched.results()) == {"success"}
    assert_equal_runs(launched, reference)


@pytest.mark.slow
def test_requeue_after_preemption_without_grace_is_bit_identical(reference: Launched, launch: Launch) -> None:
    launched = launch("without-grace", cluster="partition: rude", slow=STEP_SECONDS)
    resumed, reached = interrupt_again(launched, preempted)
    assert 0 < resumed <= reached
    launched.finish()
    assert_equal_runs(launched, reference)


@pytest.mark.slow
def test_elastic_requeue_on_fewer_nodes(reference: Launched, launch: Launch) -> None:
    """From two nodes to one."""
    reference.slurm.await_idle(NODES[:2])
    launched = launch("elastic", shape=["--nodes", "1-2"], slow=STEP_SECONDS)
    launched.reach(LEAD + 1)
    launched.slurm.cluster("kill-node", NODES[1])
    launched.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=dead")  # noticed at once
    try:
        launched.finish()
    finally:
        launched.slurm.cluster("start-node", NODES[1])
    assert [start["ranks"] for start in launched.starts()] == [2, 1]
    assert_equal_runs(launched, reference, elastic=True)


def test_run_that_is_not_interrupted_has_a_result(reference: Launched) -> None:
    starts = [own[0] for own in reference.task_events().values()]
    assert [start["host"] for start in starts] == ["node1", "node1"]
    assert [start["ranks"] for start in reference.starts()] == [2]
    assert json.loads((reference.run / "result.json").read_text())["loss"] > 0


@pytest.mark.slow
def test_requeue_where_a_node_dies_between_allocation_and_start(launch: Launch) -> None:
    """The job waits in `setup` until the node is dead; srun then cannot start its tasks, and the job goes to another
    node. (On the same one, started again at once, SLURM's late end of the tasks there ends those of the new start.)
    """
    launch.slurm.await_idle(NODES[:2])
    go = launch.folder / "go"
    cluster = f"setup: ['until [ -e {go} ]; do sleep 0.1; done']\npartition: main,urgent"
    launched = launch(
        "unstarted", "train.steps=2", "track.ids=false", cluster=cluster, nodes=NODES[:3], shape=["--nodes", "2"]
    )
    launched.wait(lambda: launched.slurm.state(launched.job) == "RUNNING", "an allocation")
    launched.slurm.cluster("kill-node", NODES[1])
    go.touch()
    try:
        log = launched.logs / f"{launched.job}_0_log.out"
        launched.wait(lambda: "could not be started on all of node[1-2]" in log.read_text(), "srun fails")
        launched.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=dead")  # noticed at once
        launched.finish()
    finally:
        launched.slurm.cluster("start-node", NODES[1])
    assert [start["ranks"] for start in launched.starts()] == [2]
    hosts = {event["host"] for own in launched.task_events().values() for event in own if event["event"] == "start"}
    assert hosts == {NODES[0], NODES[2]}
