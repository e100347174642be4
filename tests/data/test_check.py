"""`data check`: finds what is wrong with tars, with samples and between splits, once; quarantine leaves it out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import MAE, SETTINGS, refused
from shared_types import Tars
from test_index import write_tar
from test_indexing import npy

from mae_dist.__main__ import main
from mae_dist.data import check, index
from mae_dist.data.check import Report
from mae_dist.data.findings import Checked, findings
from mae_dist.data.places import Place
from mae_dist.data.tally import Tally


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> list[tuple[str, str, str, str]]:
    """(kind, tar, image, what) of all findings; the exit status says whether any are not in quarantine."""
    capsys.readouterr()
    status = main(["data", "check", *map(str, argv), "--json", "--workers", "1"])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["findings"]
    left = [row for row in rows if row["kind"] != "unreadable" or "--quarantine" not in argv]
    assert status == (1 if left else 0)
    return [(row["kind"], Path(row["tar"]).name, row["image"], row["what"]) for row in rows]


def test_check_of_clean_data_has_status_0_and_reads_only_tars_that_changed_a_second_time(
    tars: Tars, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars([4, 3], size=None).tars[0].parent
    assert main(["data", "check", str(folder), "--workers", "1"]) == 0
    assert (
        "nothing is wrong with it\n  train: 7 images in 2 tars, 3 classes of 2 to 3 images" in capsys.readouterr().out
    )
    read: list[str] = []
    real = check.check

    def noted(place: Place, key: str) -> Report:
        read.append(Path(place.tar).name)
        return real(place, key)

    monkeypatch.setattr(check, "check", noted)
    assert found(capsys, folder) == []
    os.utime(folder / "x-1.tar", (1, 1))
    assert found(capsys, folder) == []
    assert read == ["x-1.tar"]


def test_check_names_broken_samples_and_quarantine_leaves_them_out_of_runs(
    tars: Tars, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars([4, 12], broken={1, 6}).tars[0].parent
    monkeypatch.chdir(folder)
    run = ["pretrain", f"data.path={folder}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "data.max_bad=1"]
    assert main([*run, "train.steps=1"]) == 0
    (tmp_path / "run/result.json").unlink()
    broken = [("unreadable", f"x-{i}.tar", f"s000{k}.png", "image file is truncated") for i, k in ((0, 1), (1, 6))]
    assert [row[:3] for row in found(capsys, ".", "--quarantine")] == [row[:3] for row in broken]
    assert found(capsys, folder) == []
    data = index.open_split(str(folder), "train")
    assert len(data) == 14
    assert "data.accept_change=true" in refused(capsys, *run, "train.steps=1")
    assert main([*run, "train.steps=1", "data.accept_change=true"]) == 0


def test_check_finds_tars_that_vanished_changed_or_are_not_what_their_index_says(
    tars: Tars, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tars([3, 3, 3, 3, 3])
    gone, cut, other, foreign, unindexed = data.tars
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[: data.tars[2].stat().st_size // 2])
    content = bytearray(other.read_bytes())
    content[-1] = 1
    other.write_bytes(content)
    shutil.copy(other.with_suffix(".idx"), foreign.with_suffix(".idx"))
    unindexed.with_suffix(".idx").unlink()
    rows = found(capsys, gone.parent)
    words = {name: " | ".join(what for _, tar, _, what in rows if tar == f"x-{i}.tar")
             for i, name in enumerate(("gone", "cut", "other", "foreign", "unindexed"))}  # fmt: skip
    assert words["gone"] == "there is no such file"
    assert "bytes, but dataset.json lists" in words["cut"]
    assert words["other"] == "its content is not what it was when dataset.json was written (sha256)"
    assert "its index is not that of this tar (3 samples of the tar are not in it" in words["foreign"]
    assert words["unindexed"].startswith("not indexed yet")
    assert [(kind, image) for kind, tar, image, _ in rows if tar == "x-1.tar" and image][-1] == (
        "unreadable",
        "s0005.png",
    )


def report(labels: list[int], hashes: list[int] | None = None, tally: Tally = Tally()) -> Checked:  # noqa: B008
    names = [f"{i}.png" for i in range(len(labels))]
    numbers = dict(zip(names, hashes or [id(names) * 1000 + i for i in range(len(names))], strict=True))
    return Checked(
        Path("x.tar"), Report("", [], names, {}, numbers, dict(zip(names, labels, strict=True)), tally), frozenset()
    )


def said(splits: dict[str, list[Checked]], num_classes: int | None = None, window: int = 64) -> list[tuple[str, str]]:
    return [(finding.kind, finding.what) for finding in findings(splits, num_classes, window)]


def test_findings_of_copies_within_and_between_splits() -> None:
    train, test = report([0, 1, 1, 0], [5, 6, 6, 5]), report([1, 0, 0], [6, 7, 5])
    other = report([1, 0], [5, 9])
    assert said({"train": [train, other], "test": [test]}) == [
        ("copy", "is 1.png in x.tar"), ("copy", "is 0.png in x.tar"), ("other label", "label 1; 0.png in x.tar has 0"),
        ("shared", "is 1.png in x.tar of train"), ("shared", "is 0.png in x.tar of train"),
    ]  # fmt: skip


def test_findings_of_labels() -> None:
    assert said({"train": [report([0, 1, -1, 3])]}) == [
        ("labels", "1 of 4 images have no label (--unlabelled lists them, and with --quarantine leaves them out)"),
        ("labels", "1 of 4 classes have no image, 2 first"),
    ]  # fmt: skip
    assert said({"train": [report([-1, -1])]}) == [], "unlabelled data are fine"
    splits = {"train": [report([0, -1, 0])], "test": [report([-1, -1])]}
    assert [(f.split, f.image, f.what) for f in findings(splits, None, 64, unlabelled=True)] == [
        ("train", "1.png", "has no label"), ("test", "", "2 of 2 images have no label"),
    ]  # fmt: skip
    assert said({"train": [report([0, 1])], "test": [report([0, 1, 2])]}) == [
        ("labels", "1 classes that train lacks, 2 first")
    ]


@pytest.mark.parametrize(
    ("fields", "image", "what"),
    [
        ({"num_classes": 2}, "s0002.png", "label 2, but there are 2 classes"),
        ({}, "s0001.png", "has no label, but dataset.json says that all of its tar have one"),
    ],
)
def test_check_names_labels_that_dataset_json_speaks_of_otherwise(
    tars: Tars, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], image: str, what: str
) -> None:
    """Runs count these samples as unreadable, too: a loss of such a label would end them in an error of torch."""
    data = tars([3])
    folder, file = data.tars[0].parent, data.tars[0].parent / "dataset.json"
    if not fields:
        content = bytearray(data.tars[0].read_bytes())
        content[int(data._table(0).spans[1, 2])] = ord(" ")
        data.tars[0].write_bytes(content)
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert ("unreadable", "x-0.tar", image, what) in found(capsys, folder)
    with pytest.raises(ValueError, match=what):
        index.open_split(str(folder), "train").read(int(image[4]))


def test_check_believes_no_report_of_another_user(tars: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tars([1]).tars[0].with_suffix(".json")
    Report("k", ["seen"]).save(file)
    assert Report.load(file, "k") == Report("k", ["seen"])
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert Report.load(file, "k") is None


@pytest.mark.parametrize(("kind", "sorted_by_class"), [("sorted", True), ("shuffled", False), ("long tail", False)])
def test_findings_of_tars_that_are_sorted_by_class_against_the_shuffle_window(kind: str, sorted_by_class: bool) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(2000) // 20 if kind != "long tail" else np.minimum(generator.zipf(1.5, 2000), 300) - 1
    _, labels = np.unique(labels, return_inverse=True)
    labels = labels if kind == "sorted" else generator.permutation(labels)
    splits = {"train": [report(part.tolist()) for part in np.split(labels, 100)]}
    assert [what for what, _ in said(splits, window=10)] == ["order"] * sorted_by_class
    assert said(splits, window=100) == []


def test_findings_of_a_constant_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    pixels[..., 1] = 7
    assert said({"train": [report([0], tally=Tally.of(pixels, 0))]}) == [
        ("channels", "channel 1 of all images has one value")
    ]


def test_check_names_changes_of_pixels_and_16_bit_values_of_a_small_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    write_tar(tmp_path / "x.tar", [(f"{n}.npy", npy(values[n])) for n in range(3)])
    main(["data", "index", str(tmp_path)])
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "train: note: 3 images: of 16-bit values the upper 8 bits are taken" in printed
    assert "train: note: no 16-bit value exceeds 4095 of 65535; try data.white (data pack: --white)" in printed


def test_check_of_a_tar_that_may_not_be_read_any_more_names_it_and_blames_no_sample(
    tars: Tars, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars([3, 3]).tars[0].parent
    assert found(capsys, folder) == []
    access, opened = os.access, Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:  # the tests' user may be root, who may read all
        if path.name == "x-1.tar":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("x-1.tar") and access(path, mode))
    monkeypatch.setattr(Path, "open", refuse)
    assert found(capsys, folder) == [("tar", "x-1.tar", "", "cannot be read (Permission denied)")]


def test_check_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no such folder or file" in refused(capsys, "data", "check", tmp_path / "nowhere")
