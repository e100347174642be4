"""Chaos: the plan, the audit and the verdict on made-up files, and three faults for real."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_dist.batch import Batch
from mae_dist.data.order import Order
from mae_dist.objectives import Output
from mae_dist.run.directory import RunDir
from mae_dist.verify import audit, chaos, inject_nan
from mae_dist.verify.faults import ELASTIC, KINDS
from mae_dist.verify.torchrun import TorchrunRun

BATCH = 4
ORDER = Order(0, np.array([6, 5]), 64)


def ids_log(num_steps: int) -> list[dict]:
    """The ids.jsonl of a run that keeps to the plan."""
    lines = []
    for step in range(1, num_steps + 1):
        epochs, ids = ORDER.at((step - 1) * BATCH, step * BATCH)
        lines.append({"step": step, "epochs": epochs.tolist(), "ids": ids.tolist()})
    return lines


def check(lines: list[dict], first: int = 1, last: int = 6) -> tuple[int, int, int]:
    return dataclasses.astuple(audit.audit(lines, ORDER, BATCH, first, last))


def test_a_plan_is_seeded_and_has_every_kind_before_any_comes_again() -> None:
    kinds = list(KINDS)
    plan = chaos.plan(0, 30, kinds)
    assert plan == chaos.plan(0, 30, kinds)
    assert plan != chaos.plan(1, 30, kinds)
    names = [fault.kind for fault in plan]
    for first in range(0, 30, len(kinds)):
        assert len(set(names[first : first + len(kinds)])) == min(len(kinds), 30 - first)
    assert names[: len(kinds)] != names[len(kinds) : 2 * len(kinds)]
    assert [fault.number for fault in plan] == list(range(1, 31))
    distances = np.diff([0, *(fault.step for fault in plan), 31 * chaos.SLOT])
    assert distances.min() > chaos.SLOT // 2


def test_the_audit_finds_a_lost_a_repeated_and_a_moved_sample() -> None:
    assert check(ids_log(6)) == (0, 0, 0)

    lost = ids_log(6)
    for name in ("epochs", "ids"):
        lost[2][name].pop(1)
    assert check(lost) == (1, 0, 0)

    repeated = ids_log(6)
    for name in ("epochs", "ids"):
        repeated[3][name].append(repeated[3][name][0])
    assert check(repeated) == (0, 1, 0)

    replaced = ids_log(6)
    replaced[0]["ids"][0] = replaced[0]["ids"][1]
    assert check(replaced) == (1, 1, 0)

    swapped = ids_log(6)
    swapped[4]["ids"][1:3] = swapped[4]["ids"][2:0:-1]
    assert swapped[4]["epochs"][1] == swapped[4]["epochs"][2]
    assert check(swapped) == (0, 0, 2)

    wrong_epoch = ids_log(6)
    wrong_epoch[0]["epochs"][0] += 1
    assert check(wrong_epoch) == (1, 1, 0)

    twice = ids_log(6)
    assert check([*twice, twice[2]]) == (0, BATCH, 0)
    assert check(twice[:-1]) == (BATCH, 0, 0)
    assert check(twice[:-1], last=5) == (0, 0, 0)


def test_losses_differ_where_a_step_is_missing_skipped_or_there_twice(tmp_path: Path) -> None:
    def losses(*records: dict) -> dict[int, float]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return audit.losses(RunDir(tmp_path))

    first, second = {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}
    wanted = losses(first, second)
    assert audit.loss_difference(losses(first, second, {"step": 2, "test_loss": 3.0}), wanted, 1, 2) == 0
    assert audit.loss_difference(losses(first, {"step": 2, "loss": math.nextafter(0.2, 1)}), wanted, 1, 2) > 0
    assert audit.loss_difference(losses(first), wanted, 1, 2) == math.inf
    assert audit.loss_difference(losses(first), wanted, 1, 1) == 0
    assert audit.loss_difference(losses(first, second, second), wanted, 1, 2) == math.inf
    assert audit.loss_difference(losses(first, {"step": 2, "skipped": True}), wanted, 1, 2) == math.inf
    assert audit.loss_difference(losses(first, second | {"skipped": True}), wanted, 1, 2) == math.inf


def test_states_differ_in_a_bit_a_name_or_a_nan() -> None:
    wanted = {"w": torch.tensor([1.0, 2.0]), "attn.qkv.bias": torch.arange(6.0)}
    assert audit.state_difference(dict(wanted), wanted, False) == 0
    assert audit.state_difference(wanted | {"w": torch.tensor([1.0, 2.0000002])}, wanted, True) > 0
    for other in ({}, wanted | {"v": wanted["w"]}, wanted | {"w": torch.tensor([1.0, math.nan])}):
        assert audit.state_difference(other, wanted, True) == math.inf
    assert audit.state_difference({}, {}, False) == math.inf
    for place, counts in enumerate([True, True, False, False, True, True]):  # two queries, two keys, two values
        other = wanted | {"attn.qkv.bias": wanted["attn.qkv.bias"].index_fill(0, torch.tensor(place), -1)}
        assert audit.state_difference(other, wanted, False) > 0
        assert (audit.state_difference(other, wanted, True) > 0) == counts


ROW = audit.Row(
    number=1, kind="hang", step=50, ranks=2, recovered=True, seconds=9.0, redone=3, lost=0, repeated=0, moved=0,
    loss_difference=0.0, elastic=False,
)  # fmt: skip
TOTALS = audit.Totals(
    faults=1, planned=1, recovered=1, steps=80, redone=3, lost=0, repeated=0, moved=0, loss_difference=0.0,
    state_difference=0.0, elastic=False, seconds=60.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "totals"),
    [
        ({"recovered": False}, {}),
        ({"lost": 1}, {}),
        ({"repeated": 1}, {}),
        ({"moved": 2}, {}),
        ({"loss_difference": 1e-9}, {}),
        ({"loss_difference": 2e-4, "elastic": True}, {}),
        ({}, {"planned": 2}),
        ({}, {"recovered": 0}),
        ({}, {"lost": 1}),
        ({}, {"repeated": 1}),
        ({}, {"moved": 2}),
        ({}, {"loss_difference": math.inf}),
        ({}, {"state_difference": 1e-9}),
        ({}, {"state_difference": 2e-4, "elastic": True}),
    ],
)
def test_one_thing_wrong_breaks_the_promise(row: dict, totals: dict) -> None:
    assert audit.verdict([ROW], TOTALS)
    rows, whole = [ROW, dataclasses.replace(ROW, **row)], dataclasses.replace(TOTALS, **totals)
    assert not audit.verdict(rows, whole)
    assert "the promise is broken" in audit.markdown(rows, whole)
    plain = json.loads(json.dumps(audit.plain(rows, whole), allow_nan=False))
    assert not plain["passed"]
    assert all(one["passed"] for one in plain["faults"]) == (not row)


def test_another_number_of_ranks_may_round_otherwise_and_the_table_says_so() -> None:
    row = dataclasses.replace(ROW, loss_difference=3e-7, elastic=True)
    totals = dataclasses.replace(TOTALS, loss_difference=3e-7, state_difference=2e-6, elastic=True)
    assert audit.verdict([row], totals)
    text = audit.markdown([row], totals)
    assert "within 0.0001 (3.0e-07)" in text
    assert "final weights bit-equal: within 0.0001 (2.0e-06); the promise is kept" in text


def test_a_poisoned_pair_strikes_once(tmp_path: Path) -> None:
    file = tmp_path / "poison.json"
    ids = torch.tensor([5, 6, 7])
    batch = Batch(
        torch.zeros(3, 3, 4, 4), -torch.ones_like(ids), ids, torch.ones_like(ids), torch.zeros(3, dtype=torch.bool)
    )

    def losses() -> list[float]:
        loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        output = inject_nan.inject(Output(loss, torch.zeros(3, 1)), batch, file)
        output.loss.sum().backward()
        assert loss.grad is not None
        assert torch.equal(output.loss.isnan(), loss.grad.isnan())
        return output.loss.tolist()

    assert losses() == [1, 2, 3]
    inject_nan.write(file, [(0, 5), (1, 6)])
    first, second, third = losses()
    assert (first, third) == (1, 3)
    assert math.isnan(second)
    assert losses() == [1, 2, 3]
    assert inject_nan.waiting(file) == {(0, 5)}


def test_all_processes_of_a_job_are_found_and_ended(tmp_path: Path) -> None:
    job = TorchrunRun(tmp_path / "run", "none", [], 2, tmp_path / "log", {})
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    job.launcher = subprocess.Popen([sys.executable, "-c", code], env=job.environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(found := job.found()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {process.parent for process in found} == {os.getpid(), job.launcher.pid}
    job.kill()
    assert not job.found()
    while not all(is_over(process.pid) for process in found):  # memory goes first, and with it the mark
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_over(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kinds", "kill-rank,earthquake"], "no kind 'earthquake'"),
        (["--faults", "0"], "--faults 0"),
        (["--processes", "1"], "--processes 1"),
        (["out=elsewhere"], "out=elsewhere: chaos decides"),
        (["train.steps=9"], "train.steps=9: chaos decides"),
        (["train.stps=9"], "did you mean train.steps"),
        (["one.yaml", "two.yaml"], "one CONFIG.yaml, not 2"),
        (["--out", "."], "not an empty folder"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(words: list[str], said: str, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    with pytest.raises(ValueError, match=said):
        chaos.main(["--out", str(out), *words])
    assert not out.exists()


def test_resizing_is_asked_for() -> None:
    assert ELASTIC not in chaos.kinds_of(chaos.parse([]))
    assert ELASTIC in chaos.kinds_of(chaos.parse(["--elastic"]))
    assert chaos.kinds_of(chaos.parse(["--kinds", "nan,resize", "--elastic"])) == ["nan", ELASTIC]


@pytest.mark.slow
def test_a_run_survives_three_faults_to_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    command = [sys.executable, "-m", "mae_dist", "chaos", "--faults", "3", "--kinds", "kill-rank,power-loss,nan"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "chaos.json").read_text())
    assert found["passed"]
    assert found["totals"]["final_weights_bit_equal"]
    assert sorted(row["kind"] for row in found["faults"]) == ["kill-rank", "nan", "power-loss"]
    for row in found["faults"]:
        assert row["recovered"], row
        assert row["losses_bit_equal"], row
        assert row["lost"] == row["repeated"] == row["moved"] == 0, row
    assert next(row for row in found["faults"] if row["kind"] == "nan")["redone"] >= 3
    assert "the promise is kept" in done.stdout
    assert len((out / "run" / "provenance.jsonl").read_text().splitlines()) == 3  # a start, and two after kills
