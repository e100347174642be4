"""Indexing what can be read in two ways: numbered images of one stem, masks, label arrays, lists, joined tars."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from pathlib import Path

import pytest
from test_index import png, write_tar
from test_indexing import PNG, indexed, npy

from mae_dist.commands import data_index
from mae_dist.commands.data import main
from mae_dist.data import folder_files, folder_layout, index, indexing, label_list


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


def test_index_counts_hidden_members_that_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = [(name, PNG) for name in (".a.png", "d/._b.png", "__MACOSX/d/c.png", "Thumbs.db")]
    _, labels = indexed(tmp_path, [("d/a.png", PNG), *hidden, ("./b.png", PNG)])
    assert len(labels) == 2
    assert "hidden members, and those of an operating system, are left out: 4 (.a.png)" in caplog.text


def test_sample_with_two_plain_images_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    indexed(tmp_path, [("0.png", PNG), ("0.webp", b"")])
    assert "several images" in caplog.text


def test_labels_of_a_list_follow_folders_and_columns(tmp_path: Path) -> None:
    names = [f"train/{folder}/{number}.png" for folder in "ab" for number in range(2)]
    (tmp_path / "l.csv").write_text("label,where\n" + "".join(f"{name[6] == 'b':d},{name[6:]}\n" for name in names))
    assert indexed(tmp_path, [(name, PNG) for name in names], "--labels", str(tmp_path / "l.csv"))[1] == [0, 0, 1, 1]
    assert label_list.columns(Path("x"), [["other", "label"], ["a.png", "3"]]) == [("a.png", "3")]


@pytest.mark.parametrize("column", ["split", "set"])
def test_split_column_of_a_list_is_told_to_be_unread(column: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [["id", "label", column, "view"], ["a.png", "3", "Train", "test"], ["b.png", "4", "val", "side"]]
    assert label_list.columns(Path("x.csv"), rows) == [("a.png", "3"), ("b.png", "4")]
    (record,) = caplog.records
    assert f"column {column} is not read" in record.getMessage()


def test_index_refuses_to_replace_a_split_unless_it_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", PNG)])
    train, val = str(tmp_path / "train-*.tar"), str(tmp_path / "val-0.tar")
    main(["index", train])
    with pytest.raises(ValueError, match=r"2 images in other tars .first train-0.tar.; --split val makes"):
        main(["index", val])
    main(["index", val, "--split", "val"])
    main(["index", train])
    assert len(index.open_split(str(tmp_path), "train")) == 2
    (tmp_path / "train-1.tar").rename(tmp_path / "train-2.tar")
    main(["index", train])
    main(["index", val, "--split", "train"])
    assert "split train has 2 images in other tars" in caplog.text
    main(["index", val, "--out", str(tmp_path / "out")])
    assert "become split train, though by name they are val" in caplog.text


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


LISTS = {
    "l.csv": "class_id,id,file_name,class_name\n1,0,train/cat/1.png,cat\n0,1,train/dog/1.png,dog\n9,2,no.png,x\n",
    "l.tsv": "/data/train/cat/1.png\t1\n/data/train/dog/1.JPEG\t0\n7.png\t0\n",
    "l.json": '{"cat/1": 1, "dog/1": 0, "cow/1": null, "none": 3}',
    "l.jsonl": '{"file_name": "cat/1.png", "label": 1}\n{"file_name": "dog/1.png", "label": 0.0}\n{"file_name": "_"}',
    "pandas.csv": ",image,label\n0,train\\cat\\1.png,1.0\n1,train\\dog\\1.png,0.0\n2,z.png,2.0\n",
    "stylegan.json": '{"labels": [["cat/1.png", 1], ["dog/1.png", 0], ["z", 2]]}',
    "rows": '[{"image": "x/cat/1", "label": 1, "w": 3}, {"image": "x/dog/1", "label": 0}, {"image": "y", "label": 4}]',
}


@pytest.mark.parametrize("name", LISTS)
def test_labels_of_a_list_are_the_same_in_folders_and_in_tars(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows and images without each other are counted in both; so are columns that are not read."""
    (tmp_path / name).write_text(LISTS[name])
    images = ["train/cat/1.png", "train/cow/1.png", "train/dog/1.png", "train/dog/2.png"]
    for image in images:
        (tmp_path / "in" / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / image).write_bytes(PNG)
    layout = folder_layout.read(tmp_path / "in", folder_files.find(tmp_path / "in"), labels=tmp_path / name)
    in_folders, told = [label for _, label in layout.splits["train"]], caplog.text
    caplog.clear()
    assert in_folders == indexed(tmp_path, [(i, PNG) for i in images], "--labels", str(tmp_path / name))[1]
    assert in_folders == [1, -1, 0, -1]
    for text in (told, caplog.text):
        assert "1 of 4 images" in text if name == "l.json" else "2 of 4 images" in text
        assert f"{name}: 1 of {4 if name == 'l.json' else 3} of its rows are of no image of" in text
        assert ("a row without a label" in text) == (name == "l.json")
        assert ("files from column file_name and labels from column class_id, not id, class_name" in text) == (
            name == "l.csv"
        )


@pytest.mark.parametrize(
    ("rows", "members", "message"),
    [
        ("1.png,3\n", ["a/1.png", "b/1.png"], "1.png may be .*x.tar/a/1.png or .*x.tar/b/1.png; write paths"),
        ("1.png,3.5\n", ["1.png"], "'1.png' holds b'3.5', expected a class number"),
        ("cat\ndog\n", ["1.png"], "gives no sample a label"),
        ('{"cat": ["1.png"]}', ["1.png"], "expected an object from file to label"),
        ("[1, 2", ["1.png"], "--labels .*l.csv: "),
        (f"1.png,{'x' * 200_000}\n", ["1.png"], "--labels .*l.csv: field larger than field limit"),
    ],
)
def test_labels_of_a_list_in_doubt_are_refused(tmp_path: Path, rows: str, members: list[str], message: str) -> None:
    (tmp_path / "l.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        indexed(tmp_path, [(name, PNG) for name in members], "--labels", str(tmp_path / "l.csv"))


def test_labels_of_a_list_with_words_for_none_and_other_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["nan", "None", "", "NULL", "-1", "nano"]
    (tmp_path / "l.csv").write_text("file,label\n" + "".join(f"d/{i}.png,{word}\n" for i, word in enumerate(words)))
    names = [f"other/{i}.png" for i in range(6)]
    assert indexed(tmp_path, [(n, PNG) for n in names], "--labels", str(tmp_path / "l.csv"))[1] == [-1] * 5 + [0]
    assert "5 of 6 images have a row without a label" in caplog.text
    assert "6 of 6 images are in other folders than their row" in caplog.text
    assert index.Dataset.load(tmp_path).classes == ["nano"]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["images/1.png", "masks/1.png"], "folder", "images, masks may be parts of samples"),
        (["d/traindata/1.png", "d/testdata/1.png"], "folder", "testdata, traindata may be splits"),
        (["train/a/1.png", "val/a/1.png"], "folder", "train, val may be splits"),
        (["images/1.png", "masks/1.png"], "folder:1", [0, 1]),
        (["train/a/1.png", "val/b/1.png"], "folder:2", [0, 1]),
        (["a/x/1.png", "b/y/x/1.png", "c.png"], "folder:-1", [0, 0, -1]),
        (["a/1.png"], "folder:", "write folder:1 for the first"),
    ],
)  # fmt: skip
def test_labels_from_folders_that_may_be_no_classes_are_asked_about(
    tmp_path: Path, names: list[str], labels: str, expected: str | list[int]
) -> None:
    members = [(name, PNG) for name in names]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"--labels {labels}: .*{expected}"):
            indexed(tmp_path, members, "--labels", labels)
    else:
        assert indexed(tmp_path, members, "--labels", labels)[1] == expected


def test_index_warns_of_folders_and_names_that_speak_of_splits_or_masks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert indexed(tmp_path, [("train/a.png", PNG), ("val/b.png", PNG), ("val/b_mask.png", PNG)])[1] == [-1, -1, -1]
    assert (
        "folders in the tars: train, val may be splits or classes; all their images become split train" in caplog.text
    )
    assert "samples may be parts of others, as masks are, and are taken as images: 1 (val/b_mask)" in caplog.text
    caplog.clear()
    indexed(tmp_path, [("train/a/1.png", PNG), ("train/b/2.png", PNG), ("train/b/2.seg.png", PNG)])
    assert not any(words in caplog.text for words in ("become split", "parts of others", "labels seg"))


def test_labels_from_folders_of_a_second_split_are_at_the_level_of_known_classes(tmp_path: Path) -> None:
    indexed(tmp_path, [("train/cat/1.png", PNG), ("train/dog/1.png", PNG)], "--labels", "folder")
    write_tar(tmp_path / "v.tar", [("val/dog/a/1.png", PNG), ("val/dog/b/1.png", PNG)])
    main(["index", str(tmp_path / "v.tar"), "--split", "val", "--labels", "folder"])
    data = index.open_split(str(tmp_path), "val")
    assert [data.label(i) for i in range(2)] == [1, 1]


def test_index_does_not_lose_a_split_that_another_command_has_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", [(f"{split}.png", PNG)])

    def slow_build(tar: Path, idx: Path, source: str) -> indexing.Indexed:
        monkeypatch.undo()
        main(["index", str(tmp_path / "train.tar")])
        return indexing.build(tar, idx, source)

    monkeypatch.setattr(data_index.indexing, "build", slow_build)
    with pytest.raises(ValueError, match=r"dataset.json: another command has written it meanwhile; run this one again"):
        main(["index", str(tmp_path / "val.tar"), "--split", "val"])
    main(["index", str(tmp_path / "val.tar"), "--split", "val"])
    assert index.Dataset.load(tmp_path).splits.keys() == {"train", "val"}


@pytest.mark.parametrize("names", ["{}-0.tar", "{}/0.tar", "x-{}-0.tar"])
def test_index_makes_a_split_of_each_that_the_names_of_tars_speak_of(tmp_path: Path, names: str) -> None:
    counts = {"train": [1, 0], "val": [0, 1], "test": [0, 0, 1]}
    for split, kinds in counts.items():
        tar = tmp_path / names.format({"val": "validation"}.get(split, split))
        tar.parent.mkdir(exist_ok=True)
        members = [((f"{i}.png", PNG), (f"{i}.cls", b"cd"[kind : kind + 1])) for i, kind in enumerate(kinds)]
        write_tar(tar, [member for pair in members for member in pair])
    main(["index", str(tmp_path)])
    dataset = index.Dataset.load(tmp_path)
    assert {name: sum(s.num_samples for s in shards) for name, shards in dataset.splits.items()} == {
        split: len(kinds) for split, kinds in counts.items()
    }
    assert [index.open_split(str(tmp_path), "test").label(i) for i in range(3)] == [0, 0, 1]
    write_tar(tmp_path / "more.tar", [("0.png", PNG)])
    with pytest.raises(
        ValueError, match=r"by name .*train, val.*, and some of none .*more.tar first.; index the tars of"
    ):
        main(["index", str(tmp_path)])
    main(["index", str(tmp_path), "--split", "train", "--labels", "none"])
    assert sum(shard.num_samples for shard in index.Dataset.load(tmp_path).splits["train"]) == 8


def test_index_moves_labels_of_a_list_from_one_to_zero_unless_other_splits_have_more_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [(f"{kind}/{i}.png", PNG) for i, kind in enumerate("abb")]
    (tmp_path / "l.txt").write_text("a/0.png 1\nb/1.png 2\nb/2.png 2\n")
    assert indexed(tmp_path, members, "--labels", str(tmp_path / "l.txt"))[1] == [0, 1, 1]
    assert "l.txt: labels 1 to 2 become classes 0 to 1" in caplog.text
    write_tar(tmp_path / "v.tar", members)
    main(["index", str(tmp_path / "v.tar"), "--split", "val", "--labels", str(tmp_path / "l.txt")])
    assert index.open_split(str(tmp_path), "val").label(2) == 1
    indexed(tmp_path, [m for i in range(3) for m in ((f"{i}.png", PNG), (f"{i}.cls", b"%d" % i))])
    before = (tmp_path / index.FILE).read_bytes()
    with pytest.raises(
        ValueError, match="l.txt: its labels are 1 to 2, and those of other splits 0 to 2: those without 0 may begin "
        "with 1, or lack class 0; index all splits with one list that has the rows of all of them",
    ):  # fmt: skip
        main(["index", str(tmp_path / "v.tar"), "--split", "val", "--labels", str(tmp_path / "l.txt")])
    assert (tmp_path / index.FILE).read_bytes() == before


def test_tar_replaced_by_one_of_the_same_size_is_named_and_a_copy_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def written(label: bytes, seconds: int) -> None:
        tar = write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.cls", label)])
        os.utime(tmp_path / index.FILE, ns=(0, tar.stat().st_mtime_ns - seconds * 10**9))

    indexed(tmp_path, [("a.png", PNG), ("a.cls", b"3")])
    caplog.clear()
    caplog.set_level("INFO")
    written(b"3", 5)
    index.open_split(str(tmp_path), "train")
    assert [record.getMessage()[len(str(tmp_path)) :] for record in caplog.records] == [
        ": 1 tar newer than dataset.json, compared with it at each start, 1024 MiB at most, until you run "
        "`mae-dist data index` again"
    ]
    main(["index", str(tmp_path / "x.tar")])
    caplog.clear()
    index.open_split(str(tmp_path), "train")
    written(b"4", -5)
    index.open_split(str(tmp_path), "train")
    assert not caplog.text
    written(b"4", 5)
    index.open_split(str(tmp_path), "train", checked=True)
    assert not caplog.text
    index.open_split(str(tmp_path / "x.tar"), "train")
    assert "x.tar: is not the file that was indexed, though as large (`mae-dist data check`); run" in caplog.text
