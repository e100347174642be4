"""Runs over data of which some samples cannot be read: exact counts on any number of ranks, also killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import MAE, SETTINGS, finish_ranks, kill_ranks_when, records, start_ranks
from shared_types import Tars

from mae_dist.__main__ import main
from mae_dist.data.order import Order
from mae_dist.run import unreadable

BROKEN = {17, 101}
STEPS = 8


def words(data: Path, out: Path) -> list[str]:
    return ["pretrain", f"data.path={data}", f"out={out}", "data.max_bad=0.01", "view.crop=resized", *SETTINGS, *MAE,
            "model.image_size=16", f"train.steps={STEPS}", "machine.workers=0", "data.test_split=train",
            "data.accept=[overlap]"]  # fmt: skip


def test_run_over_one_percent_of_broken_samples_counts_each_on_any_ranks_and_after_sigkill(
    tars: Tars, tmp_path: Path
) -> None:
    """200 samples, data.max_bad exactly their share; 16 a step."""
    data = tars([120, 80], size=None, broken=BROKEN)
    order, folder = Order(0, data.counts, 64), data.tars[0].parent
    planned = {
        step: sum(id_ in BROKEN for id_ in order.at(16 * (step - 1), 16 * step)[1].tolist())
        for step in range(1, STEPS + 1)
    }
    whole, killed, log = (tmp_path / name for name in ("whole", "killed", "log"))
    assert main(words(folder, whole)) == 0
    ranks = start_ranks(1, *words(folder, killed), "checkpoint.every=3", log=log)
    saved = (killed / "checkpoints").glob
    kill_ranks_when(ranks, lambda: any(saved("step-*")) and len(records(killed)) > 4, log)
    finish_ranks(start_ranks(2, *words(folder, killed), log=log), log)
    for run in (whole, killed):
        assert {r["step"]: r.get("bad", 0) for r in records(run) if r["kind"] == "step"} == planned
        result = json.loads((run / "result.json").read_text())
        assert (result["bad"], result["num_unreadable"]) == (sum(planned.values()), 2)
        found = unreadable.by_reason(run)
        assert sorted(name for _, names in found for name in names) == sorted(map(data.sample_name, BROKEN))
    first, second = ([r["loss"] for r in records(run) if "loss" in r] for run in (whole, killed))
    assert first == pytest.approx(second, rel=1e-4)


def test_knn_and_probe_leave_unreadable_test_images_out_of_all_counts(tars: Tars, tmp_path: Path) -> None:
    """Both splits are the same tars, so that the nearest neighbour is the image itself: replaced ones would differ."""
    broken = {1, 2, 3, 7}
    folder = tars([6, 6], size=None, broken=broken).tars[0].parent
    for verb, more in (("knn", ["knn.k=1"]), ("probe", ["train.steps=1"]), ("probe", ["heads.ridge=true"])):
        out = tmp_path / f"{verb}{len(more[0])}"
        settings = [
            "init_from=random",
            f"data.path={folder}",
            "data.test_split=train",
            "data.accept=[overlap]",
            "data.max_bad=1",
            f"out={out}",
        ]
        assert main([verb, *settings, *more, *SETTINGS, "model.image_size=16"]) == 0
        result = json.loads((out / "result.json").read_text())
        assert (result["num_test_images"], result["num_unreadable"]) == (8, 4)
        assert verb != "knn" or result["top1"] == 100
