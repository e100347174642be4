"""`mae-dist certify`: gaps, tolerances and verdicts; the shapes for a machine; a small certificate of real runs."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import environment, refused, start

from mae_dist import errors, schema
from mae_dist.__main__ import main
from mae_dist.verify import certificate, certify, processes
from mae_dist.verify.certificate import FAILED, IDENTICAL, Gaps, tolerance, verdict
from mae_dist.verify.compare import Evidence

STEPS = 16
ROWS = ["ddp-2", "accumulation", "resume-fsdp-2", "chain-2-1"]
ARGV = ["certify", "model.image_size=16", "--ranks", "1,2", "--steps", str(STEPS), "--only"]

PLANNED = {1: [(0, 3), (0, 1)], 2: [(0, 2), (1, 0)]}


def evidence(**changes: object) -> Evidence:
    """A run of two steps as it should be, but for the changes."""
    state = {"model.weight": torch.tensor([1.0, 2.0]), "optimizer.weight.exp_avg": torch.tensor([0.1, 0.2])}
    plain = Evidence({1: 0.9, 2: 0.8}, {1: 4.0, 2: 3.0}, dict(PLANNED), state)
    return dataclasses.replace(plain, **changes)  # pyright: ignore


def gaps(**changes: object) -> Gaps:
    return certificate.measure_gaps(evidence(**changes), evidence(), PLANNED)


def test_gaps_of_a_run_to_itself_are_zero() -> None:
    assert gaps() == Gaps(0.0, 0.0, 0.0, identical=True, order=None)


def test_gaps_show_losses_gradient_norms_weights_and_moments() -> None:
    assert gaps(losses={1: 0.9, 2: 0.83}).loss == pytest.approx(0.03)
    assert gaps(grad_norms={1: 4.4, 2: 3.0}).grad_norm == pytest.approx(0.1)
    moved = {"model.weight": torch.tensor([1.0, 2.5]), "optimizer.weight.exp_avg": torch.tensor([0.1, 0.2])}
    assert gaps(state=moved).weights == 0.5
    moment = {"model.weight": torch.tensor([1.0, 2.0]), "optimizer.weight.exp_avg": torch.tensor([0.1, 0.3])}
    assert gaps(state=moment).weights == 0
    for changes in (
        {"losses": {1: 0.9, 2: 0.83}},
        {"grad_norms": {1: 4.4, 2: 3.0}},
        {"state": moved},
        {"state": moment},
    ):
        assert not gaps(**changes).identical


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"losses": {1: 0.9}}, "loss"),
        ({"losses": {1: 0.9, 2: float("nan")}}, "loss"),
        ({"grad_norms": {1: 4.0}}, "grad_norm"),
        ({"state": {"model.weight": torch.tensor([1.0, 2.0])}}, "weights"),
        ({"state": {"model.weight": torch.tensor([1.0]), "optimizer.weight.exp_avg": torch.tensor([0.1])}}, "weights"),
        ({"state": evidence().state | {"model.weight": torch.tensor([1.0, float("nan")])}}, "weights"),
    ],
)  # fmt: skip
def test_gap_is_infinite_where_something_is_missing_or_not_finite(changes: dict, field: str) -> None:
    found = gaps(**changes)
    assert getattr(found, field) == float("inf")
    assert verdict(found, tolerance("bf16"), exact=False) == FAILED


def test_certify_fails_if_both_runs_lack_a_step() -> None:
    short = evidence(losses={1: 0.9}, grad_norms={1: 4.0})
    assert verdict(certificate.measure_gaps(short, short, PLANNED), tolerance("fp32"), exact=False) == FAILED


@pytest.mark.parametrize(
    "wrong",
    [
        {1: [(0, 1), (0, 3)], 2: [(0, 2), (1, 0)]},  # two ids swapped
        {1: [(0, 3), (0, 1)], 2: [(0, 2), (0, 0)]},  # another epoch
        {1: [(0, 3), (0, 1)]},
        PLANNED | {3: [(1, 1), (1, 2)]},
        {},
    ],
)
def test_certify_fails_on_another_sample_order_even_with_equal_losses(wrong: dict) -> None:
    found = gaps(samples=wrong)
    assert found.order is not None
    assert "not as planned" in found.order
    assert found.identical
    assert verdict(found, tolerance("bf16"), exact=False) == FAILED
    both = certificate.measure_gaps(evidence(samples=wrong), evidence(samples=wrong), PLANNED)
    assert verdict(both, tolerance("bf16"), exact=False) == FAILED


def test_verdict_depends_on_precision_and_exactness() -> None:
    small, large = Gaps(9e-6, 1e-6, 1e-3, False, None), Gaps(2e-5, 1e-6, 1e-3, False, None)
    steep = Gaps(1e-7, 2e-4, 1e-3, False, None)
    assert verdict(gaps(), tolerance("fp32"), exact=True) == IDENTICAL
    assert verdict(small, tolerance("fp32"), exact=False) == "within 1e-05 in loss"
    assert verdict(small, tolerance("fp32"), exact=True) == FAILED
    assert verdict(large, tolerance("fp32"), exact=False) == FAILED
    assert verdict(steep, tolerance("fp32"), exact=False) == FAILED
    assert verdict(large, tolerance("bf16"), exact=False) == "within 0.01 in loss"


def shapes(
    ranks: list[int], num_gpus: int | None = None, batch: int = 22
) -> tuple[list[certify.Shape], dict[str, str]]:
    settings = SimpleNamespace(train=schema.TrainConfig(global_batch=batch), machine=schema.MachineConfig())
    return certify.plan(ranks, settings, num_gpus)


def test_certify_plans_ddp_fsdp_hsdp_and_elastic_shapes_for_four_ranks() -> None:
    found, left_out = shapes([1, 2, 3, 4])
    assert [shape.folder for shape in found] == [
        "reference", "ddp-2", "ddp-3", "ddp-4", "fsdp-2", "fsdp-3", "fsdp-4", "hsdp-2x2", "accumulation",
        "accumulation-fsdp-2", "resume", "resume-fsdp-2", "resume-ddp-4", "chain-4-3-1",
    ]  # fmt: skip
    assert not left_out
    chain = found[-1]
    assert chain.title == "4 ranks FSDP2 -> 3 ranks DDP -> 1 rank"
    assert [leg.ranks for leg in chain.legs] == [4, 3, 1]
    assert [shape.folder for shape in found if shape.exact] == ["resume", "resume-fsdp-2", "resume-ddp-4"]
    assert {shape.against for shape in found} == {"reference", "fsdp-2", "ddp-4"}


def test_certify_leaves_out_what_the_machine_cannot_run_with_the_reason() -> None:
    found, left_out = shapes([1, 2, 3, 4], num_gpus=2)
    assert {leg.ranks for shape in found for leg in shape.legs} == {1, 2}
    assert left_out == {
        "3 ranks": "this machine has 2 GPUs",
        "4 ranks": "this machine has 2 GPUs",
        "HSDP": "needs 4 ranks",
    }
    found, left_out = shapes([1])
    assert [shape.folder for shape in found] == ["reference", "accumulation", "resume"]
    assert "HSDP" in left_out
    assert "accumulation" not in [shape.folder for shape in shapes([1], batch=1)[0]]


def test_last_step_is_read_while_metrics_are_written(tmp_path: Path) -> None:
    assert processes.reached(tmp_path) == 0
    lines = [json.dumps({"kind": "step", "step": step, "loss": 0.5}) for step in range(1, 500)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 500, "lo')
    assert processes.reached(tmp_path) == 499


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--ranks", "1,zwei"], ["--ranks 1,zwei", "1,2,4"]),
        (["--ranks", "0,1"], ["--ranks 0", "1 or more"]),
        (["--ranks", "1,30"], ["30 processes", "train.global_batch=22"]),
        (["--steps", "5"], ["--steps 5", "6 or more"]),
        (["--stops", "5"], ["--stops"]),
        (["--ranks", "1,2", "--only", "ddp-3"], ["--only ddp-3", "no row 'ddp-3'", "ddp-2, fsdp-2"]),
        (["machine.processes=2"], ["machine.processes=2", "--ranks"]),
        (["out=x"], ["out=x", "--out"]),
        (["a.yaml", "b.yaml"], ["one CONFIG.yaml"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["train.bach=3"], ["train.bach"]),
    ],
)
def test_certify_refuses_mistakes_in_one_line(
    argv: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "certify", *argv, "--out", tmp_path / "out")
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_certify_passes_ddp_fsdp_accumulation_resume_and_elastic(tmp_path: Path) -> None:
    """Three ranks, HSDP of 2 x 2, uneven shares and DDP's resume are compared in tests/stages and by chaos."""
    certified = tmp_path / "certify"
    start(*ARGV, ",".join(ROWS), "--out", certified, timeout=1200)
    found = json.loads((certified / "certificate.json").read_text())
    assert found["passed"] is True
    rows = {row["folder"]: row for row in found["rows"]}
    assert rows.keys() == {"reference", "fsdp-2", *ROWS}
    assert all(row["gaps"]["loss"] <= 1e-5 for row in rows.values() if row["folder"] != "reference")
    assert rows["resume-fsdp-2"]["verdict"] == IDENTICAL
    assert not rows["ddp-2"]["gaps"]["identical"], "sums in another order cannot be equal in every bit"
    assert [start["ranks"] for start in rows["chain-2-1"]["starts"]] == [2, 1]
    assert "machine.strategy=fsdp" in rows["chain-2-1"]["starts"][0]["command"]
    assert 0 < rows["chain-2-1"]["starts"][1]["step"] < STEPS
    assert "Every row passes" in (certified / "certificate.md").read_text()


@pytest.mark.slow
def test_certify_skips_finished_shapes_and_fails_another_sample_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank and two pass; then a second call in which only the reference starts a process, and the run on two took
    other samples.
    """
    certified = tmp_path / "certify"
    words = [*ARGV, "ddp-2", "--out", str(certified)]
    start(*words, timeout=1200)
    found = json.loads((certified / "certificate.json").read_text())
    assert [row["folder"] for row in found["rows"] if row["verdict"] != FAILED] == ["reference", "ddp-2"]

    def run_reference_only(shape: certify.Shape, *arguments: Any) -> str | None:
        return run_shape(shape, *arguments) if shape.folder == "reference" else None

    run_shape = certify.run_shape
    monkeypatch.setattr(certify, "run_shape", run_reference_only)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    ids = certified / "ddp-2" / "ids.jsonl"
    lines = ids.read_text().splitlines()
    last = json.loads(lines[-1])
    last["ids"][0], last["ids"][1] = last["ids"][1], last["ids"][0]
    ids.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    checkpoints = sorted((certified / "reference" / "checkpoints").iterdir())
    before = [path.stat().st_mtime_ns for path in checkpoints]
    assert main(words) == errors.FAILED
    found = json.loads((certified / "certificate.json").read_text())
    assert [row["folder"] for row in found["rows"] if row["verdict"] == FAILED] == ["ddp-2"]
    assert [path.stat().st_mtime_ns for path in checkpoints] == before
