"""Indexing what can be read in two ways: numbered images of one stem, masks, label arrays, lists, joined tars."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import pytest
from test_index import png, write_tar
from test_indexing import PNG, indexed, npy

from mae_dist.commands.data import main
from mae_dist.data import index, labels


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        ([("img.png", PNG), *((f"img.{i}.png", PNG) for i in (1, 2))], ["img", "img.1", "img.2"]),
        ([("a.png", PNG), ("a.cls", b"0"), ("a.edit.png", PNG), ("a.edit.cls", b"1")], ["a", "a.edit"]),
        ([("0.png", PNG), ("0.mask.png", b""), ("1.mask.png", b"")], ["0"]),
        ([("0.cls.npy", npy(3)), ("0.img.png", PNG)], ["0"]),
    ],
)
def test_images_of_one_stem_are_samples_masks_and_label_arrays_are_none(
    members: list[tuple[str, bytes]], keys: list[str], tmp_path: Path
) -> None:
    assert indexed(tmp_path, members)[0] == keys


def test_sample_with_two_plain_images_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    indexed(tmp_path, [("0.png", PNG), ("0.webp", b"")])
    assert "several images" in caplog.text


def test_labels_of_a_list_follow_folders_and_columns(tmp_path: Path) -> None:
    names = [f"train/{folder}/{number}.png" for folder in "ab" for number in range(2)]
    (tmp_path / "l.csv").write_text("label,where\n" + "".join(f"{name[6] == 'b':d},{name[6:]}\n" for name in names))
    assert indexed(tmp_path, [(name, PNG) for name in names], "--labels", str(tmp_path / "l.csv"))[1] == [0, 0, 1, 1]
    assert labels.columns(Path("x"), [["other", "label"], ["a.png", "3"]]) == [("a.png", "3")]


def test_names_after_numbers_of_another_split_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("a.png", PNG), ("a.cls", b"1")])
    write_tar(tmp_path / "val.tar", [("b.png", PNG), ("b.cls", b"cat")])
    main(["index", str(tmp_path / "train.tar")])
    with pytest.raises(ValueError, match="its labels are names .'cat'.*--classes FILE"):
        main(["index", str(tmp_path / "val.tar"), "--split", "val"])


def test_links_in_joined_tars_lead_to_their_own_tar(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        part = tmp_path / f"{number}.part"
        with tarfile.open(part, "w") as tar:
            for kind, name in ((tarfile.REGTYPE, "x.png"), (tarfile.LNKTYPE, "y.png")):
                info, content = tarfile.TarInfo(name), png(10 * number)
                info.type, info.linkname = kind, "x.png" if kind == tarfile.LNKTYPE else ""
                info.size = len(content) if kind == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(content))
        parts.append(part.read_bytes())
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "x.tar").write_bytes(b"".join(parts))
    main(["index", str(tmp_path / "joined" / "x.tar")])
    data = index.open_split(str(tmp_path / "joined"), "train")
    assert [data.read(i).image for i in range(4)] == [png(0), png(0), png(10), png(10)]
