"""Several data sets in one run: their order on any ranks, classes by name, statistics, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import MAE, SETTINGS, finish_ranks, losses, refused, start_ranks

from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.batch import IMAGENET_MEAN
from mae_dist.data.dataset import Dataset
from mae_dist.data.index import open_split
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.stages.images import with_statistics
from mae_dist.stages.splits import find_test_split, open_train_split, with_test_split
from mae_dist.verify.compare import planned_order

STEPS = 5


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """Two data sets of the same ten classes; B numbers them the other way round, and has other statistics."""
    folders = tmp_path / "A", tmp_path / "B"
    for folder, num in zip(folders, (40, 60), strict=True):
        pack(from_synthetic(num, 10, seed=num), folder, shard_size=15)
    known = Dataset.load(folders[1])
    assert known.classes is not None
    replace(known, name="B", classes=known.classes[::-1], mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1)).save(folders[1])
    return folders


def words(parts: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    return ["pretrain", f"data.path=[{parts[0]}, {parts[1]}]", f"out={out}", *SETTINGS, *MAE, f"train.steps={STEPS}",
            "model.image_size=16", "track.ids=true", "data.weights=[2, 1]", "checkpoint.every=2", *more]  # fmt: skip


def test_start_names_the_data_set_without_statistics_and_the_splits_that_a_test_loss_needs(
    parts: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    known = Dataset.load(parts[1])
    replace(known, splits={"train": known.splits["train"]}, mean=None, std=None).save(parts[1])
    settings = config.load("pretrain", None, words(parts, tmp_path / "run")[1:])
    train = open_train_split(settings)
    assert with_statistics(settings, None, train).data.mean == IMAGENET_MEAN
    assert "mean and std are not known of B: using ImageNet's" in caplog.text
    assert find_test_split(with_test_split(settings, None), required=False, train=train) is None
    assert f"no split val or test in all of [{parts[0]}, {parts[1]}]" in caplog.text


def test_mixture_on_two_ranks_and_resumed_takes_the_planned_samples(parts: tuple[Path, Path], tmp_path: Path) -> None:
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert main(words(parts, one)) == 0
    finish_ranks(start_ranks(2, *words(parts, two), log=log), log)
    (two / "result.json").unlink()
    for newest in (two / "checkpoints").glob(f"step-{STEPS:09d}*"):
        newest.rename(newest.with_name("put-aside"))
    assert main(words(parts, two)) == 0, "goes on after step 4"
    order = planned_order(config.load("pretrain", None, words(parts, one)[1:]))
    for run in (one, two):
        taken: dict[int, list[int]] = {}
        for line in map(json.loads, (run / "ids.jsonl").read_text().splitlines()):
            taken.setdefault(line["step"], []).extend(line["ids"])
        for step in range(1, STEPS + 1):
            assert sorted(taken[step]) == sorted(order.at(16 * (step - 1), 16 * step)[1].tolist()), (run, step)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ids = order.at(0, 90)[1]
    assert (ids < 40).sum() == 60, "two of three draws are of A"


def test_mixture_merges_classes_by_name_and_pools_statistics(parts: tuple[Path, Path]) -> None:
    data, (a, b) = open_split(f"[{parts[0]}, {parts[1]}]", "train"), (open_split(str(part), "train") for part in parts)
    assert a.dataset.classes is not None
    assert b.dataset.classes is not None
    names = [a.dataset.classes[a.label(i)] for i in range(40)] + [b.dataset.classes[b.label(i)] for i in range(60)]
    assert data.dataset.classes == a.dataset.classes
    assert [a.dataset.classes[data.label(i)] for i in range(100)] == names
    assert data.dataset.mean is not None
    assert data.dataset.std is not None
    mean, std = np.array(a.dataset.mean), np.array(a.dataset.std)
    pooled = 0.4 * mean + 0.6 * 0.5
    assert np.allclose(data.dataset.mean, pooled)
    squares = 0.4 * (std**2 + mean**2) + 0.6 * (0.1**2 + 0.5**2)
    assert np.allclose(np.square(data.dataset.std), squares - pooled**2)
    alone = open_split(str(parts[1]), "test").numbered_as(a.dataset.classes)
    both = open_split(f"[{parts[0]}, {parts[1]}]", "test")
    assert [alone.label(i) for i in range(10)] == [both.label(10 + i) for i in range(10)]


def test_mixture_fingerprint_knows_order_and_borders_of_data_sets(parts: tuple[Path, Path]) -> None:
    a, b = parts
    paths = [f"[{a}, {b}]", f"[{b}, {a}]", f"{a}::{b}", str(a), f"[{a}/train-000000.tar, {a}/train-000001.tar]",
             f"[{a}/train-00000[01].tar]"]  # fmt: skip
    assert len({open_split(path, "train").fingerprint for path in paths}) == len(paths)


def test_mixture_refusals_are_one_sentence(
    parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Dataset.load(parts[1])
    replace(known, classes=None).save(parts[1])
    labelled = [
        "finetune",
        f"data.path=[{parts[0]}, {parts[1]}]",
        f"out={tmp_path / 'x'}",
        *SETTINGS,
        "init_from=random",
    ]
    assert "B: the names of its classes are not known; data.merge_labels=names merges" in refused(capsys, *labelled)
    assert open_split(f"[{parts[0]}, {parts[1]}]", "train", merging="apart").dataset.num_classes == 20
    assert open_split(f"[{parts[0]}, {parts[1]}]", "train", merging="numbers").dataset.num_classes == 10
    for weights, wanted in (
        ("[1]", "data.path names 2 data sets, and each needs one weight"),
        ("[1, 0]", "must be greater than 0"),
        ("[0.333333, 1]", "too fine to be kept; round it, like [25, 75]"),
    ):
        assert wanted in refused(capsys, *words(parts, tmp_path / "y"), f"data.weights={weights}")
    replace(known, white=4095.0).save(parts[1])
    assert "were packed with different --white" in refused(capsys, *words(parts, tmp_path / "y"))
