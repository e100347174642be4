"""What a pretraining measures of itself at its evaluations, on any ranks and over kills, and the best that it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import MAE, SETTINGS, kill_ranks_when, records, refused, start_ranks, unpickle_nothing

from mae_dist import config as configuration
from mae_dist import evaluate
from mae_dist.__main__ import main
from mae_dist.run import layout
from mae_dist.stages import online
from mae_dist.stages.pretrain import build
from mae_dist.stages.setup import build_setup

SMALL = [*SETTINGS, "model.image_size=16"]
ONLINE = [
    *SMALL, *MAE, "train.ema=0.9", "train.steps=10", "track.evaluate_every=0.5", "checkpoint.every=4",
    "checkpoint.keep=1", "track.online=[knn,ridge,rankme]", "checkpoint.keep_best=ridge_top1",
]  # fmt: skip
"""An epoch of 10 steps, evaluated after every fifth."""


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == "evaluation"]


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [*map(layout.step_of, layout.checkpoints(run))]


def best_of(run: Path) -> int:
    """The first step with the largest ridge_top1 of a run's evaluations."""
    values = {record["step"]: record["ridge_top1"] for record in evaluations(run)}
    return max(values, key=lambda step: (values[step], -step))


@pytest.fixture(scope="module")
def alone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one rank."""
    out = tmp_path_factory.mktemp("online") / "alone"
    assert main(["pretrain", f"data.path={tiny_data}", f"out={out}", *ONLINE]) == 0
    return out


def test_online_knn_and_ridge_equal_the_verbs_on_the_same_checkpoint(
    alone: Path, tiny_data: Path, tmp_path: Path
) -> None:
    last, shared = evaluations(alone)[-1], [f"data.path={tiny_data}", f"init_from={alone}", *SMALL]
    assert main(["knn", *shared, f"out={tmp_path / 'knn'}"]) == 0
    assert main(["probe", *shared, f"out={tmp_path / 'probe'}", "heads.ridge=true"]) == 0
    knn, probe = (json.loads((tmp_path / verb / "result.json").read_text()) for verb in ("knn", "probe"))
    assert last["knn_top1"] == knn["top1"]
    assert last["ridge_top1"] == probe["top1"]
    assert last["step"] == 10


def test_online_numbers_are_the_result_and_of_every_evaluation(alone: Path) -> None:
    found, result = evaluations(alone), json.loads((alone / "result.json").read_text())
    assert [record["step"] for record in found] == [5, 10]
    assert {name: result[name] for name in ("test_loss", "knn_top1", "ridge_top1", "rankme")}.items() <= found[
        -1
    ].items()
    assert "loss_by_position" not in result
    assert all(1 <= record["rankme"] <= 128 for record in found)
    assert len([*(alone / "pictures").glob("loss_by_position-*.png")]) == 2


def test_checkpoint_keep_best_stays_beside_the_newest(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = best_of(alone)
    assert steps(alone) == sorted({best, 10})
    (value,) = (record["ridge_top1"] for record in evaluations(alone) if record["step"] == best)
    capsys.readouterr()
    assert main(["ckpt", "list", str(alone)]) == 0
    assert f"best ridge_top1: {value:.4g}, step {best} ({alone}@{best})" in capsys.readouterr().out.replace("\n", "")


def test_online_numbers_on_two_fsdp_ranks_that_unpickle_nothing_and_after_a_sigkill_are_those_of_one(
    alone: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Ranks exchange plain values as text: nothing that comes over the network is unpickled."""
    run, log = tmp_path / "killed", tmp_path / "log"
    shared = ["pretrain", f"data.path={tiny_data}", *ONLINE, f"out={run}"]
    ranks = start_ranks(2, *shared, "machine.strategy=fsdp", log=log, before=unpickle_nothing)
    kill_ranks_when(ranks, lambda: has_step(run, 7), log)
    (before,) = evaluations(run)
    assert main(shared) == 0  # on one rank from the checkpoint of step 4 or 5
    assert evaluations(run)[0] == before
    assert steps(run) == sorted({best_of(run), 10})
    for own, other in zip(evaluations(run), evaluations(alone), strict=True):
        assert own["knn_top1"] == pytest.approx(other["knn_top1"], abs=2.6)  # one of 40 images, by rounding
        assert own["ridge_top1"] == pytest.approx(other["ridge_top1"], abs=2.6)
        assert own["rankme"] == pytest.approx(other["rankme"], rel=1e-3)
        assert np.allclose(own["loss_by_position"], other["loss_by_position"], atol=1e-3)


def has_step(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").is_file() and any(record["step"] >= step for record in records(run))


def test_online_evaluation_does_not_change_training(alone: Path, tiny_data: Path, tmp_path: Path) -> None:
    bare = [word for word in ONLINE if not word.startswith(("track.online", "checkpoint.keep_best", "track.evaluate"))]
    assert main(["pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'bare'}", *bare]) == 0
    own, other = ({r["step"]: r["loss"] for r in records(run) if "loss" in r} for run in (tmp_path / "bare", alone))
    assert own == other


def test_loss_by_position_is_the_mean_over_images_where_a_patch_is_predicted(tiny_data: Path, tmp_path: Path) -> None:
    words = [*SMALL, *MAE, f"data.path={tiny_data}", f"out={tmp_path}", "machine.micro_batch=7", "mae.predict=0.5"]
    setup = build_setup("pretrain", configuration.load("pretrain", None, words), needs_labels=False)
    objective = build(setup)
    assert setup.test_split is not None
    (tmp_path / "pictures").mkdir()
    found = online.test_loss(setup, objective, source := setup.source(setup.test_split), 0)
    sums, counts = np.zeros(16), np.zeros(16)
    with torch.no_grad():
        for batch in setup.evaluation_batches(source):
            mask = objective.mask(batch)
            errors = objective.errors(batch, mask, objective(batch).prediction)
            for positions, rows in zip(objective.predicted(mask).tolist(), errors, strict=True):
                for position, row in zip(positions, rows, strict=True):
                    sums[position] += float(row.mean())
                    counts[position] += 1
    assert counts.sum() == 40 * 6
    assert np.allclose(found["loss_by_position"], (sums / counts).reshape(4, 4), atol=2e-5)
    assert found["test_loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_directions_is_their_number(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert evaluate.rankme(3 * basis[:rank].repeat(700, 1)) == pytest.approx(rank, rel=1e-3)


def test_rankme_is_the_entropy_of_singular_values() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    share = torch.linalg.svdvals(rows.double())
    share = share / share.sum() + 1e-7
    assert evaluate.rankme(rows) == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-9)
    assert evaluate.rankme(rows[:3]) <= 3
    assert evaluate.rankme(torch.zeros(5, 4)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.keep_best=knn_top1", "track.evaluate_every=1"], "or track.online=[knn], which measures it"),
        (["checkpoint.keep_best=test_top1", "track.evaluate_every=1"], "this run measures test_loss; choose"),
        (["checkpoint.keep_best=test_loss"], "is measured at the end only; give track.evaluate_every"),
        (["track.online=[knn]", "data.split=test", "data.test_split=no"], "has no split 'no' to evaluate on"),
        (["track.online=[ridge]", "track.online_images=2"], "of 2 training images 0 would be held out"),
        (["track.online=[probe]"], "track.online=[probe]: must be one of knn, ridge, rankme"),
        (["track.band=[1,2,3]"], "track.band=[1,2,3]: must be a list of lists: track.band=[[...], ...]"),
        (["track.band=[[1,2]]"], "track.band: [1, 2] must be [epoch, low, high]"),
        (["track.band=[[2,0,1],[1,0,1]]"], "track.band: [1, 0, 1] must be"),
        (["track.band=[[1,.nan,1]]"], "track.band: [1, nan, 1] must be"),
    ],
)
def test_online_settings_that_cannot_be_are_refused(
    words: list[str], said: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SMALL, *MAE, *words)
    assert said in line
    assert not (tmp_path / "run").exists()
