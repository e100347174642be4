"""Steps that are not finite: skipped and counted, gone back from, explained; a sample that is to blame is left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_dist import evaluate, rewind
from mae_dist.__main__ import main
from mae_dist.batch import Batch
from mae_dist.data.index import open_split
from mae_dist.data.order import Order
from mae_dist.objectives import Output
from mae_dist.objectives.mae import MAE
from mae_dist.run import checkpoint, events
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of
from mae_dist.stages import pretrain
from mae_dist.stages.setup import build_setup

BATCH = 16
SETTINGS = [
    "pretrain", "model.name=vit_demo4", "model.image_size=16", "view.test_crop=1", f"train.global_batch={BATCH}",
    "train.precision=fp32", "track.every=1", "track.ids=true", "machine.processes=1", "mae.decoder_dim=32",
    "mae.decoder_depth=1", "mae.decoder_heads=4", "optim.base_lr=1e-2", "checkpoint.every=3", "train.steps=20",
]  # fmt: skip


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    def start(*words: str, status: int = 0) -> Path:
        out = tmp_path / "run"
        assert main([*SETTINGS, f"data.path={tiny_data}", f"out={out}", *words]) == status
        return out

    return start


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    state = {name: torch.empty(shape) for name, shape in checkpoint.names_in(path).items()}
    checkpoint.load(path, state)
    return state


def poison(monkeypatch: pytest.MonkeyPatch, hits: Callable[[Batch], torch.Tensor]) -> None:
    """Make the losses (and so the gradients) NaN where `hits` says, in training."""
    healthy = MAE.forward

    def forward(self: MAE, batch: Batch) -> Output:
        output = healthy(self, batch)
        return output._replace(loss=torch.where(hits(batch), torch.nan, output.loss)) if self.training else output

    monkeypatch.setattr(MAE, "forward", forward)


def ids_of(tiny_data: Path, step: int) -> list[int]:
    """Sample ids of the n-th step."""
    order = Order(0, open_split(str(tiny_data), "train").counts, 64)
    return order.at((step - 1) * BATCH, step * BATCH)[1].tolist()


def test_runs_of_steps() -> None:
    assert rewind.consecutive([], 1) == []
    assert rewind.consecutive([4, 6, 8], 2) == []
    assert rewind.consecutive([4, 6, 7, 8, 11, 12], 2) == [6, 7, 8]
    assert rewind.consecutive([4], 1) == [4]
    assert rewind.consecutive([1, 2, 4, 5, 6], 3) == [4, 5, 6]


def test_one_bad_step_is_skipped_counted_and_changes_nothing(
    tiny_data: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_id = ids_of(tiny_data, 7)[3]
    poison(monkeypatch, lambda batch: (batch.ids == bad_id) & (batch.epochs == 0))
    out = run("train.steps=9")
    records = [record for record in lines(out / "metrics.jsonl") if "lr" in record]
    assert [record["step"] for record in records if record.get("skipped")] == [7]
    assert "loss" not in records[6]
    assert len(records) == 9
    assert json.loads((out / "result.json").read_text())["skipped"] == 1
    assert not events.of(out, "rewind")


def test_a_sample_that_is_to_blame_is_left_out(
    tiny_data: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad_id = ids_of(tiny_data, 8)[5]
    poison(monkeypatch, lambda batch: batch.ids == bad_id)
    out = run("checkpoint.rewind_after=1")
    (rewind,) = events.of(out, "rewind")
    assert rewind["left_out"] == [bad_id]
    assert rewind["nonfinite"] == [8]
    assert rewind["to"] == 6
    assert "back to step 6, without 1 samples" in caplog.text
    trained = [line["ids"] for line in lines(out / "ids.jsonl")]
    assert len(trained) == 20
    assert bad_id not in [id_ for ids in trained for id_ in ids]
    planned = ids_of(tiny_data, 8)
    assert [a for a, b in zip(trained[7], planned, strict=True) if a != b] == [(bad_id + 1) % 160]
    bundle = json.loads((out / "forensics/step-000000008/step-000000008.json").read_text())
    assert [row["loss"] for row in bundle["samples"] if row["id"] == bad_id] == ["nan"]
    assert all(row["key"].endswith(".tar") for row in bundle["samples"])
    assert (out / "forensics/step-000000008/step-000000008.png").stat().st_size > 1000
    assert main(["replay", str(out), "--step", "8"]) == 0  # also knows who was left out
    replayed = json.loads((out / "replay/step-000000008/replay.json").read_text())
    assert [row["id"] for row in replayed["samples"]] == trained[7]


def test_a_passing_fault_is_undone(
    tiny_data: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.steps=11", "checkpoint.rewind_after=2"]
    healthy = run(*words)
    healthy.rename(tmp_path / "healthy")
    seen: set[int] = set()
    burst = {step: ids_of(tiny_data, step)[0] for step in (8, 9)}

    def once(batch: Batch) -> torch.Tensor:
        strikes = [id_ for id_ in burst.values() if id_ in batch.ids and id_ not in seen and not batch.epochs.any()]
        seen.update(strikes)
        return torch.isin(batch.ids, torch.tensor(strikes, dtype=torch.int64))

    poison(monkeypatch, once)
    out = run(*words)
    (rewind,) = events.of(out, "rewind")
    assert (rewind["nonfinite"], rewind["to"], rewind["left_out"]) == ([8, 9], 6, [])
    for name in ("ids.jsonl", "metrics.jsonl"):
        kept = ("step", "loss", "grad_norm", "lr", "ids", "epochs")
        first, second = (
            [{k: v for k, v in line.items() if k in kept} for line in lines(path / name)]
            for path in (tmp_path / "healthy", out)
        )
        assert first == second


def test_what_fails_twice_without_a_culprit_is_left_out_whole(
    tiny_data: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that overflows while every loss is finite."""
    bad_id, healthy = ids_of(tiny_data, 8)[5], MAE.forward

    def forward(self: MAE, batch: Batch) -> Output:
        output = healthy(self, batch)
        if torch.is_grad_enabled() and bad_id in batch.ids:
            output.loss.register_hook(lambda gradient: gradient * torch.inf)
        return output

    monkeypatch.setattr(MAE, "forward", forward)
    out = run("checkpoint.rewind_after=1", "train.steps=10")
    first, second = events.of(out, "rewind")
    assert first["left_out"] == []
    assert second["left_out"] == sorted(ids_of(tiny_data, 8))


def test_a_budget_and_a_first_checkpoint_are_needed(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda batch: batch.ids >= 0)
    run("checkpoint.max_skipped=4", "checkpoint.rewind_after=9", status=2)
    said = capsys.readouterr().err
    assert "5 steps were not finite, more than checkpoint.max_skipped=4 allows: lower optim.base_lr" in said


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda batch: batch.ids >= 0)
    out = run("checkpoint.rewind_after=2", status=2)
    assert "steps 1 to 2 were not finite and there is no checkpoint yet" in capsys.readouterr().err
    assert not list((out / "checkpoints").iterdir())


@pytest.mark.slow
def test_fp16_keeps_its_scale_over_a_resume(run: Callable[..., Path]) -> None:
    out = run("train.precision=fp16", "train.clip_grad=1")
    losses = [record["loss"] for record in lines(out / "metrics.jsonl") if "lr" in record]
    (out / "result.json").unlink()
    for path in sorted((out / "checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    run("train.precision=fp16", "train.clip_grad=1")
    assert [record["loss"] for record in lines(out / "metrics.jsonl") if "lr" in record] == losses


def test_averaged_weights_skip_with_the_run_resume_with_it_and_are_what_is_evaluated(
    tiny_data: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_id = ids_of(tiny_data, 7)[3]
    poison(monkeypatch, lambda batch: (batch.ids == bad_id) & (batch.epochs == 0))
    words = ["train.ema=0.8", "checkpoint.every=1", "checkpoint.keep=99", "train.steps=10"]
    out = run(*words)
    paths = {step_of(path): path for path in RunDir(out).checkpoints()}
    assert sorted(paths) == [*range(1, 7), *range(8, 11)]
    states = {step: state_of(path) for step, path in paths.items()}
    trained = [name for name in states[1] if name.startswith("ema.")]
    assert "ema.backbone.blocks.0.attn.qkv.weight" in trained
    assert "ema.backbone.pos_embed" not in trained
    for name in trained:
        weights = {step: state[name.replace("ema", "model", 1)].double() for step, state in states.items()}
        average = states[1][name].double()
        for step in list(weights)[1:]:
            average = 0.8 * average + 0.2 * weights[step]
        torch.testing.assert_close(states[10][name].double(), average, rtol=1e-5, atol=1e-7)

    settings = RunDir(out).settings()[2]
    setup = build_setup("pretrain", settings, needs_labels=False)
    assert setup.test_split is not None
    objective, recorded = pretrain.build(setup), json.loads((out / "result.json").read_text())["test_loss"]
    for kind in ("model", "ema"):
        load = {n.partition(".")[2]: tensor for n, tensor in states[10].items() if n.startswith(f"{kind}.")}
        objective.load_state_dict(load, strict=kind == "model")
        batches = setup.evaluation_batches(setup.source(setup.test_split))
        assert (evaluate.mean_loss(objective, batches, setup.device)[0] == recorded) == (kind == "ema")

    (out / "result.json").unlink()
    for step in range(6, 11):
        shutil.rmtree(out / f"checkpoints/step-{step:09d}", ignore_errors=True)
    run(*words)
    again = state_of(paths[10])
    assert again.keys() == states[10].keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in states[10].items())
