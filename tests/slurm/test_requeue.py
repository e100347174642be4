"""Runs of 2 nodes x 2 tasks on a real SLURM, stopped in every way that SLURM knows: each ends with the same bits, and
the same samples in the same order, as an undisturbed run.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from mae_dist.verify import compare

from .launching import NODES, Launch, Launched

pytestmark = pytest.mark.slow
STRIKE = 20
"""The step after which a run is disturbed."""


PACE = 0.1
"""Seconds that a step of a disturbed run takes at least, so that it is not over before it can be disturbed."""


@pytest.fixture(scope="module")
def patient(launch: Launch) -> Launched:
    """The run that meets its time limit, on a slow machine and nodes of its own; it goes on while others are tested.
    SLURM signals 60 to 90 s after a start, in which no more than 29 of its 60 steps can be made.
    """
    return launch(
        "time-limit", "track.wandb=offline", cluster="time: '0:02:00'\nstart_up: 0\nstop_before_end: 30",
        nodes=NODES[2:], slow=3.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(patient: Launched, launch: Launch) -> Launched:
    assert patient.job  # is queued first, as it takes longest
    launched = launch("undisturbed")
    launched.finish()
    return launched


def assert_equal(found: Launched, wanted: Launched, elastic: bool = False) -> None:
    """Same samples in the same order, each step once; same weights, moments and averages."""
    assert (found.run / "ids.jsonl").read_text() == (wanted.run / "ids.jsonl").read_text()
    run, reference = (compare.read_evidence(launched.run) for launched in (found, wanted))
    losses = compare.largest_difference(run.losses, reference.losses, range(1, found.total + 1))
    if elastic:
        assert losses < 1e-5
    else:
        assert (compare.state_difference(run.state, reference.state), losses) == (0, 0)


def test_two_nodes_of_two_tasks(undisturbed: Launched) -> None:
    starts = [events[0] for events in undisturbed.events().values()]
    assert sorted(start["host"] for start in starts) == ["node1", "node1", "node2", "node2"]
    host, port = next(undisturbed.logs.glob("*.address")).read_text().split()
    assert host == "node1"
    assert int(port) > 1024
    said = undisturbed.said(0)
    assert "4 ranks on node1, node2; python" in said
    assert str(undisturbed.code) in said
    assert "4 ranks on" not in undisturbed.said(1)
    (provenance,) = undisturbed.lines("provenance.jsonl")
    frozen = yaml.safe_load((undisturbed.code / "settings" / "pretrain.yaml").read_text())
    assert frozen["checkpoint"]["minutes"] == 30  # lose_at_most
    assert provenance["world"] == 4
    assert provenance["git"] == (undisturbed.code / "REVISION").read_text().strip()
    assert json.loads((undisturbed.run / "result.json").read_text())["loss"] > 0


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


def node_died(launched: Launched) -> None:
    launched.slurm.cluster("kill-node", NODES[1])
    launched.slurm.cluster("start-node", NODES[1])  # SLURM knows from it that the node was dead


@pytest.mark.parametrize(
    "strike", [requeued_by_hand, preempted, preempted_without_user_signal, preempted_without_grace, node_died]
)
def test_a_stopped_run_ends_like_an_undisturbed_one(
    strike: Callable[[Launched], None], undisturbed: Launched, launch: Launch
) -> None:
    partition = "rude" if strike is preempted_without_grace else "main"
    launched = launch(strike.__name__, cluster=f"partition: {partition}", slow=PACE)
    launched.reach(STRIKE)
    try:
        strike(launched)
        launched.wait(lambda: launched.starts() > 1, "it is started again")
        assert not launched.results()  # as if nothing had ended
    finally:
        launched.slurm.cluster("user-signal", "on")
    launched.finish()
    assert set(launched.results()) == {"success"}
    assert_equal(launched, undisturbed)
    first, second = launched.lines("provenance.jsonl")
    assert first["step"] == 0
    assert 0 < second["step"] <= second["reached"]  # where nothing warns, what is on disk helps
    if strike not in (preempted_without_grace, node_died):
        assert second["step"] == second["reached"] >= STRIKE
        assert launched.saved_before_leaving()


def test_a_run_goes_on_on_fewer_nodes(undisturbed: Launched, launch: Launch) -> None:
    undisturbed.slurm.await_idle(NODES[:2])
    launched = launch("elastic", shape=["--nodes", "1-2"], slow=PACE)
    launched.reach(STRIKE)
    launched.slurm.cluster("kill-node", NODES[1])
    launched.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=dead")  # is noticed at once
    try:
        launched.finish()
    finally:
        launched.slurm.cluster("start-node", NODES[1])
    assert [line["world"] for line in launched.lines("provenance.jsonl")] == [4, 2]
    assert_equal(launched, undisturbed, elastic=True)


def test_a_run_survives_its_time_limit_again_and_again(patient: Launched, undisturbed: Launched) -> None:
    patient.finish(500)
    stops = [event for event in patient.events()[0] if event["event"] == "requeue"]
    assert len(stops) >= 2
    resumed = [line["step"] for line in patient.lines("provenance.jsonl")]
    assert len(set(resumed)) >= 3  # it came further each time
    assert_equal(patient, undisturbed)
    mirrors = [path.name for path in (patient.run / "wandb").glob("offline-run-*")]
    assert len(mirrors) >= 3
    assert len({name.rpartition("-")[2] for name in mirrors}) == 1
