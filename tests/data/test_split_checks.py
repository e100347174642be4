"""A test split against the training split: classes that training lacks, tars in both; refused, or accepted by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import SETTINGS
from test_index import png, write_tar

from mae_dist.__main__ import main as mae_dist
from mae_dist.commands.data import main
from mae_dist.data import index, split_checks
from mae_dist.data.pack import Picture, Source, pack


def make(folder: Path, name: str, labels: list[str], split: str = "train") -> Path:
    """Index a tar of samples with these labels, as a split of `folder`; each has bytes of its own."""
    folder.mkdir(exist_ok=True)
    members = [(f"{name}{i}.png", png(i, (8, 8))) for i in range(len(labels))]
    members += [(f"{name}{i}.cls", label.encode()) for i, label in enumerate(labels)]
    write_tar(folder / f"{name}.tar", members)
    main(["index", str(folder / f"{name}.tar"), "--split", split])
    return folder


def found(train: str, test: str, needs_labels: bool = True) -> dict[str, str]:
    return split_checks.problems(
        index.open_split(train, "train"), index.open_split(test, "test"), needs_labels=needs_labels
    )


def test_split_check_finds_classes_that_training_lacks(tmp_path: Path) -> None:
    """In one folder and in two, with and without counts in dataset.json."""
    make(tmp_path / "a", "x", ["0", "2", "0"])
    make(tmp_path / "a", "y", ["2", "1", "-1", "3"], "test")
    unseen = {"unseen_classes": "the test split has 2 classes that the training split lacks (1, 3)"}
    assert index.Dataset.load(tmp_path / "a").label_counts == {"train": [2, 0, 1], "test": [0, 1, 1, 1]}
    assert found(f"{tmp_path}/a", f"{tmp_path}/a") == unseen
    assert found(f"{tmp_path}/a/x.tar", f"{tmp_path}/a/y.tar") == unseen
    assert found(f"{tmp_path}/a", f"{tmp_path}/a", needs_labels=False) == {}
    make(tmp_path / "b", "z", ["2", "0"], "test")
    assert found(f"{tmp_path}/a", f"{tmp_path}/b") == {}


def test_split_check_finds_tars_in_both_splits(tmp_path: Path) -> None:
    make(tmp_path / "a", "x", ["0", "1"])
    make(tmp_path / "b", "x", ["0", "1"], "test")
    shared = {"overlap": "1 tar in both the test split and the training split (x.tar)"}
    assert found(f"{tmp_path}/a", f"{tmp_path}/b", needs_labels=False) == shared
    assert found(f"{tmp_path}/a/x.tar", f"{tmp_path}/a/x.tar") == shared


def test_packing_counts_the_labels_of_each_split(tmp_path: Path) -> None:
    labels = {"train": [2, 0, 2, -1, 0], "test": [1]}

    def pictures(split: str, numbers: range) -> list[Picture]:
        return [Picture("png", png(n, (8, 8)), labels[split][n]) for n in numbers]

    counts = {split: len(values) for split, values in labels.items()}
    pack(Source("s", ["a", "b", "c"], counts, pictures), tmp_path / "out", shard_size=2)
    assert index.Dataset.load(tmp_path / "out").label_counts == {"train": [2, 0, 2], "test": [0, 1]}
    expected = {"unseen_classes": "the test split has 1 classes that the training split lacks (1 b)"}
    assert found(f"{tmp_path}/out", f"{tmp_path}/out") == expected


@pytest.mark.parametrize("verb", ["probe", "finetune", "knn"])
def test_test_split_with_unseen_classes_is_refused_or_accepted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """By names, too: the classes of the test split get the numbers of the training split."""
    make(tmp_path / "t", "x", ["b", "c"] * 8)
    make(tmp_path / "v", "y", ["a", "c", "b", "a"], "test")
    steps = [] if verb == "knn" else ["train.steps=1"]
    words = [verb, *SETTINGS, *steps, f"data.path={tmp_path}/t", f"data.test_path={tmp_path}/v", "init_from=random"]
    assert mae_dist([*words, f"out={tmp_path}/run"]) == 2
    assert "class a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert mae_dist([*words, f"out={tmp_path}/run", "data.accept=[unseen_classes]"]) == 0
