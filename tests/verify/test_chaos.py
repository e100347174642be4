"""`mae-dist chaos`: the plan, the comparison and the table on made-up files, and a real run with three faults."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from running import start

from mae_dist.batch import Batch
from mae_dist.data.order import Order
from mae_dist.objectives import Output
from mae_dist.run import events
from mae_dist.verify import chaos, chaos_table, compare, inject_io, inject_nan
from mae_dist.verify.chaos_table import FaultRow, Totals
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


def evidence(folder: Path, metrics: list[dict], ids: list[dict]) -> compare.Evidence:
    """What is read from a run's folder with these records."""
    for name, records in (("metrics.jsonl", metrics), ("ids.jsonl", ids)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return compare.read_evidence(folder)


def test_fault_plan_is_seeded_and_repeats_no_kind_before_all_have_come() -> None:
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


def test_sample_errors_count_lost_repeated_and_moved_samples(tmp_path: Path) -> None:
    planned = compare.planned_samples(ORDER, BATCH, range(1, 7))

    def check(lines: list[dict], last: int = 6) -> tuple[int, int, int]:
        samples = evidence(tmp_path, [], lines).samples
        return dataclasses.astuple(compare.count_sample_errors(samples, planned, range(1, last + 1)))

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


def test_loss_difference_is_infinite_where_a_step_is_missing_skipped_or_recorded_twice(tmp_path: Path) -> None:
    def step(number: int, **fields: float) -> dict:
        return {"kind": "step", "step": number, "lr": 0.1} | fields

    def difference(*records: dict, last: int = 2) -> float:
        losses = evidence(tmp_path, list(records), []).losses
        return compare.largest_difference(losses, wanted, range(1, last + 1))

    first, second = step(1, loss=0.1), step(2, loss=0.2)
    wanted = evidence(tmp_path, [first, second], []).losses
    assert difference(first, second, {"kind": "evaluation", "step": 2, "test_loss": 3.0}) == 0
    assert difference(first, step(2, loss=math.nextafter(0.2, 1))) > 0
    assert difference(first) == math.inf
    assert difference(first, last=1) == 0
    assert difference(first, second, second) == math.inf
    assert difference(first, step(2, skipped=True)) == math.inf
    assert difference(first, second | {"skipped": True}) == math.inf
    assert difference(first, second | {"skipped": True, "loss_scale": 2.0**16}) == 0, "fp16 halves its scale"


def test_state_difference_finds_a_bit_a_name_a_shape_and_a_nan() -> None:
    wanted = {"w": torch.tensor([1.0, 2.0]), "attn.qkv.bias": torch.arange(6.0)}
    assert compare.state_difference(dict(wanted), wanted) == 0
    assert compare.state_difference(wanted | {"w": torch.tensor([1.0, 2.0000002])}, wanted, key_biases=False) > 0
    for other in (
        {}, wanted | {"v": wanted["w"]}, wanted | {"w": torch.tensor([1.0, math.nan])},
        wanted | {"w": torch.tensor([1.0, math.inf])}, wanted | {"w": torch.tensor([1.0])},
    ):  # fmt: skip
        assert compare.state_difference(other, wanted, key_biases=False) == math.inf
    assert compare.state_difference({}, {}) == math.inf
    for place, counts in enumerate([True, True, False, False, True, True]):  # two queries, two keys, two values
        other = wanted | {"attn.qkv.bias": wanted["attn.qkv.bias"].index_fill(0, torch.tensor(place), -1)}
        assert compare.state_difference(other, wanted) > 0
        assert (compare.state_difference(other, wanted, key_biases=False) > 0) == counts


ROW = FaultRow(
    number=1, kind="hang", step=50, ranks=2, recovered=True, seconds=9.0, redone=3, lost=0, repeated=0, moved=0,
    loss_difference=0.0, elastic=False,
)  # fmt: skip
TOTALS = Totals(
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
def test_chaos_fails_if_one_thing_is_wrong(row: dict, totals: dict) -> None:
    assert chaos_table.passed([ROW], TOTALS)
    rows, whole = [ROW, dataclasses.replace(ROW, **row)], dataclasses.replace(TOTALS, **totals)
    assert not chaos_table.passed(rows, whole)
    assert "a promise is broken" in chaos_table.markdown(rows, whole)
    plain = json.loads(json.dumps(chaos_table.as_json(rows, whole), allow_nan=False))
    assert not plain["passed"]
    assert all(one["passed"] for one in plain["faults"]) == (not row)


def test_elastic_chaos_passes_within_rounding_and_the_table_shows_the_difference() -> None:
    row = dataclasses.replace(ROW, loss_difference=3e-7, elastic=True)
    totals = dataclasses.replace(TOTALS, loss_difference=3e-7, state_difference=2e-6, elastic=True)
    assert chaos_table.passed([row], totals)
    text = chaos_table.markdown([row], totals)
    assert "within 0.0001 (3.0e-07)" in text
    assert "final weights bit-equal: within 0.0001 (2.0e-06); every promise is kept" in text


def test_nan_is_injected_once_for_each_listed_sample(tmp_path: Path) -> None:
    file = tmp_path / "nan_samples.json"
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
    file.write_text(json.dumps([(0, 5), (1, 6)]))
    first, second, third = losses()
    assert (first, third) == (1, 3)
    assert math.isnan(second)
    assert losses() == [1, 2, 3]
    assert inject_nan.pending(file) == {(0, 5)}


def test_calls_of_the_file_system_fail_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, victim = tmp_path / "listed", tmp_path / "victim"
    for module, name in ((os, "pread"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    inject_io.install(listed)
    listed.write_text("pread rmtree")
    with listed.open("r+b") as stream:
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(stream.fileno(), 1, 0)
        os.fsync(stream.fileno())
    victim.mkdir()
    with pytest.raises(OSError, match="not empty"):
        shutil.rmtree(victim)
    listed.unlink()
    shutil.rmtree(victim)


def test_torchrun_run_finds_and_kills_all_its_processes(tmp_path: Path) -> None:
    job = TorchrunRun(tmp_path / "run", "none", [], 2, tmp_path / "log", {})
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    job.launcher = subprocess.Popen([sys.executable, "-c", code], env=job.environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(found := job.processes()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {process.parent for process in found} == {os.getpid(), job.launcher.pid}
    job.kill()
    assert not job.processes()
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
    ("argv", "message"),
    [
        (["--kinds", "kill-rank,earthquake"], "no kind 'earthquake'"),
        (["--faults", "0"], "--faults 0"),
        (["--processes", "1"], "--processes 1"),
        (["out=elsewhere"], "out=elsewhere: chaos sets"),
        (["train.steps=9"], "train.steps=9: chaos sets"),
        (["train.stps=9"], "did you mean train.steps"),
        (["one.yaml", "two.yaml"], "one CONFIG.yaml, not 2"),
        (["--out", "."], "not an empty folder"),
    ],
)
def test_chaos_refuses_mistakes_before_it_writes_anything(argv: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    with pytest.raises(ValueError, match=message):
        chaos.main(["--out", str(out), *argv])
    assert not out.exists()


def test_elastic_resize_is_injected_only_on_request() -> None:
    assert ELASTIC not in chaos.kinds_of(chaos.parse([]))
    assert ELASTIC in chaos.kinds_of(chaos.parse(["--elastic"]))
    assert chaos.kinds_of(chaos.parse(["--kinds", "nan,resize", "--elastic"])) == ["nan", ELASTIC]


@pytest.mark.slow
def test_run_is_bit_identical_after_sigkill_power_loss_and_nan(tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    quick = ["model.image_size=16", "checkpoint.every=10"]
    done = start("chaos", *quick, "--faults", 3, "--kinds", "kill-rank,power-loss,nan", "--out", out, timeout=400)
    found = json.loads((out / "chaos.json").read_text())
    assert found["passed"]
    assert found["totals"]["final_weights_bit_equal"]
    assert sorted(row["kind"] for row in found["faults"]) == ["kill-rank", "nan", "power-loss"]
    for row in found["faults"]:
        assert row["recovered"], row
        assert row["losses_bit_equal"], row
        assert row["lost"] == row["repeated"] == row["moved"] == 0, row
    assert next(row for row in found["faults"] if row["kind"] == "nan")["redone"] >= 3
    assert "every promise is kept" in done.stdout
    assert len(events.of(out / "run", "start")) == 3  # a start, and two after kills
