"""Indexing tars of others: names, the bytes of the index, labels from wherever they stand, and what is said of them."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index import png, write_tar

from mae_dist.commands.data import main
from mae_dist.data import index, indexing
from mae_dist.data import labels as labels_of

PNG = png(1)


def npy(value: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(value))
    return stream.getvalue()


def indexed(folder: Path, members: list[tuple[str, bytes]], *options: str) -> tuple[list[str], list[int]]:
    """The names and labels of the samples after `data index`, read back."""
    write_tar(folder / "x.tar", members)
    main(["index", str(folder / "x.tar"), *options])
    data = index.open_split(str(folder), "train")
    assert data.num_labelled == sum(data.label(i) >= 0 for i in range(len(data)))
    assert all(data.read(i).image == PNG for i in range(len(data)))
    return [data.read(i).key for i in range(len(data))], [data.label(i) for i in range(len(data))]


def pairs(count: int, image: str, label: str) -> list[tuple[str, bytes]]:
    return [m for i in range(count) for m in ((image.format(i), PNG), (label.format(i), b"%d" % (i % 2)))]


@pytest.mark.parametrize(
    ("members", "keys", "labels"),
    [
        ([(f"clip.{i:04d}.png", PNG) for i in range(3)], ["clip.0000", "clip.0001", "clip.0002"], [-1] * 3),
        ([*[(f"clip.{i}.png", PNG) for i in range(2)], ("clip.cls", b"5")], ["clip.0", "clip.1"], [5, 5]),
        (pairs(2, "img.v{}.png", "img.v{}.cls"), ["img.v0", "img.v1"], [0, 1]),
        (pairs(2, "a{}.v2.png", "a{}.v2.cls"), ["a0", "a1"], [0, 1]),
        (pairs(2, "{}.input.png", "{}.output.cls"), ["0", "1"], [0, 1]),
        (pairs(2, "{}.left.png", "{}.cls") + [(f"{i}.right.png", b"") for i in range(2)], ["0", "1"], [0, 1]),
        (pairs(2, "d.e/x{}.PNG", "d.e/x{}.Cls"), ["d.e/x0", "d.e/x1"], [0, 1]),
        (pairs(2, "./{}.png", "{}.cls"), ["./0", "./1"], [0, 1]),
        (pairs(2, "{}.png", "{}.cls.txt"), ["0", "1"], [0, 1]),
        (pairs(2, "{}.png", "{}.png.cls"), ["0", "1"], [0, 1]),
        (pairs(2, "a b\n{}\u2028.png", "a b\n{}\u2028.cls"), ["a b\n0\u2028", "a b\n1\u2028"], [0, 1]),
        (pairs(2, os.fsdecode(b"caf\xe9%20{}.png"), os.fsdecode(b"caf\xe9%20{}.cls")),
         [os.fsdecode(b"caf\xe9%200"), os.fsdecode(b"caf\xe9%201")], [0, 1]),
        ([("a.png", PNG), ("a.cls", b" -1\n"), ("b.png", PNG), ("b.cls", b"\xef\xbb\xbf7\r\n"), ("c.png", PNG),
          ("c.cls", b""), ("d.png", PNG), ("d.cls", b"3.0")], ["a", "b", "c", "d"], [-1, 7, -1, 3]),
        ([("a.png", PNG), ("a.cls", b"[unk]"), ("b.png", PNG), ("b.cls", b"{x")], ["a", "b"], [0, 1]),
        ([("a.png", PNG), ("a.cls", b"707-320"), ("b.png", PNG), ("b.cls", b"2020-01-01")], ["a", "b"], [1, 0]),
    ],
)  # fmt: skip
def test_index_names_and_labels_of_tars_of_others(
    tmp_path: Path, members: list[tuple[str, bytes]], keys: list[str], labels: list[int]
) -> None:
    assert indexed(tmp_path, members) == (keys, labels)


def test_index_bytes_are_those_of_dalis_wds2idx(tmp_path: Path) -> None:
    """Its rule: extension from the first dot, as it is written, offset, size and name of each member in their order."""
    members = [("./d/a.JPG", b"12345"), ("./d/a.cls", b"1"), ("b.seg.PNG", PNG), ("b.Json", b"{}"), ("b.cls", b"0")]
    members += [(os.fsdecode(b"caf\xe9.png"), PNG)]
    tar = write_tar(tmp_path / "x.tar", members)
    assert not indexing.build(tar, tmp_path / "x.idx").notes
    size = len(PNG)
    assert (tmp_path / "x.idx").read_bytes().split(b"\n") == [
        b"v1.2 3",
        b"JPG 512 5 ./d/a.JPG cls 1536 1 ./d/a.cls",
        b"seg.PNG 2560 %d b.seg.PNG Json 3584 2 b.Json cls 4608 1 b.cls" % size,
        b"png 6656 %d caf\xe9.png" % size,  # behind 1,024 bytes of a pax header with that name
        b"",
    ]


def test_index_that_dali_cannot_read_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert indexed(tmp_path, [("a b.png", PNG), ("a b.cls", b"3")]) == (["a b"], [3])
    assert "DALI cannot read" in caplog.text
    assert (tmp_path / "x.idx").read_text() == f"v1.2-quoted 1\npng 512 {len(PNG)} a%20b.png cls 1536 1 a%20b.cls\n"


def test_index_of_joined_tars_keeps_samples_of_one_key_apart(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.cls", b"0")], [("a.png", PNG), ("a.cls", b"1")]
    both = b"".join(write_tar(tmp_path / f"{i}.tar", part).read_bytes() for i, part in enumerate(members))
    (tmp_path / "x.tar").write_bytes(both)
    main(["index", str(tmp_path / "x.tar")])
    data = index.open_split(str(tmp_path), "train")
    assert [data.label(i) for i in range(len(data))] == [0, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"9" * 30, "more than the number of any class"),
        (b"10000000", "more than the number of any class"),
        *((text, "expected a class number") for text in (b"-2", b"1,2", b"1 2;", b"1e5", b"-", b"+.5|3")),
        (b"0.5", "expected a class number"),
        (b"\xff\xfe7\x00", "expected a class number"),
        (b"x" * 10**4, "b'xxxxxxxxxxxxxxxxxxxx'..."),
        *((text, "expected a class number like 7, or a name") for text in (b'{"label": 3}', b"[3]", b'"cat"')),
    ],
)
def test_index_refuses_labels_that_are_none_with_a_short_piece_of_them(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"x\.tar: a\.cls holds .*{re.escape(words)}") as caught:
        indexed(tmp_path, [("a.png", PNG), ("a.cls", content)])
    assert len(str(caught.value)) < len(str(tmp_path)) + 150
    assert indexed(tmp_path, [("a.png", PNG), ("a.cls", content)], "--labels", "none") == (["a"], [-1])


def test_index_labels_that_are_names_get_numbers_that_other_splits_keep(tmp_path: Path) -> None:
    names = ["n02", "n01", "n02"]
    members = [m for i, n in enumerate(names) for m in ((f"{i}.png", PNG), (f"{i}.cls", n.encode()))]
    assert indexed(tmp_path, members)[1] == [1, 0, 1]
    assert index.Dataset.load(tmp_path).classes == ["n01", "n02"]
    write_tar(tmp_path / "v.tar", [("0.png", PNG), ("0.cls", b"n02"), ("1.png", PNG), ("1.cls", b"a")])
    main(["index", str(tmp_path / "v.tar"), "--split", "test"])
    data = index.open_split(str(tmp_path), "test")
    assert [data.label(i) for i in range(2)] == [1, 2]
    assert (data.dataset.classes, data.dataset.num_classes) == (["n01", "n02", "a"], 3)
    with pytest.raises(ValueError, match=r"some labels are names .* and some numbers"):
        indexed(tmp_path, [("0.png", PNG), ("0.cls", b"7"), ("1.png", PNG), ("1.cls", b"n01")])


ONE_HOT = [npy([0, 0, 1.0]), npy([1.0, 0, 0])]
JSONS = [b'{"meta": {"y": 2}, "id": "a"}', b'{"meta": {"y": 0}, "id": "b"}']


@pytest.mark.parametrize(
    ("names", "extra", "options", "labels"),
    [
        (("t/cat/2/0.png", "t/dog/1.png"), {}, ["--labels", "folder"], [0, 1]),
        (("0.png", "1.png"), {".txt": [b"dog", b"cat"]}, ["--labels", "txt"], [1, 0]),
        (("t/dog.2.png", "t/cat_17.png"), {}, ["--labels", "name"], [1, 0]),
        (("0.png", "1.png"), {".json": JSONS}, ["--labels", "json:meta.y"], [2, 0]),
        (("0.png", "1.png"), {".json": JSONS}, ["--labels", "json:id"], [0, 1]),
        (("0.png", "1.png"), {".npy": ONE_HOT}, ["--labels", "npy"], [2, 0]),
        (("0.png", "1.png"), {".y.npy": [npy(3), npy([1])]}, ["--labels", "y.npy"], [3, 1]),
        (("0.png", "1.png"), {".cls": [b"0", b"1"]}, ["--labels", "none"], [-1, -1]),
        (("d/0.png", "1.png"), {".cls": [b"7", b"7"]}, ["--labels", "LIST.csv"], [1, 0]),
        (("d/0.png", "1.png"), {}, ["--labels", "LIST.txt"], [4, -1]),
        (("d/0.png", "1.png"), {}, ["--labels", "LIST.json", "--classes", "NAMES.txt"], [1, 0]),
        (("0.png", "1.png"), {".cls": [b"dog", b"n01"]}, ["--classes", "NAMES.txt"], [0, 1]),
        (("0.png", "1.png"), {".cls": [b"dog", b"cat"]}, ["--classes", "NAMES.json"], [1, 0]),
    ],
)
def test_index_labels_from_other_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], extra: dict[str, list[bytes]],
    options: list[str], labels: list[int],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("LIST.csv").write_text("image_id,split,label\nx/0.png,a,wolf\n1.png,b,ape\n9.png,b,zebra\n")
    Path("LIST.txt").write_text("0 4\n7 5\n")
    Path("LIST.json").write_text(json.dumps({"d/0": "n01", "1": "dog"}))
    Path("NAMES.txt").write_text("dog\nn01 tench, Tinca tinca\n")
    Path("NAMES.json").write_text(json.dumps({"cat": 0, "dog": 1}))
    members = []
    for i, name in enumerate(names):
        members += [(name, PNG), *((name[:-4] + end, contents[i]) for end, contents in extra.items())]
    assert indexed(Path(), members, *options)[1] == labels
    before = index.open_split(".", "train").fingerprint
    main(["index", "x.tar"]) if ".cls" not in extra else None
    assert (index.open_split(".", "train").fingerprint != before) == (".cls" not in extra)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "txt"], "--labels txt: gives no sample a label; perhaps --labels json:label"),
        (["--labels", "d/none.csv"], "--labels d/none.csv: no such file"),
        (["--labels", ".json"], "--labels .json: name the field, json:FIELD, or json:A.B of an object A"),
        (["--labels", "three.csv"], "three.csv: expected two columns"),
        (["--labels", "two.csv"], "three.csv|two.csv: a has two labels, 1 and 2"),
        (["--labels", "other.csv"], "--labels other.csv: gives no sample a label"),
        (["--labels", "json:label", "--classes", "names.txt"], "--classes names.txt: label 3 is none of the 2 classes"),
        (["--classes", "none.txt"], "--classes none.txt: cannot be read .No such file"),
        (["--split", "../x"], "--split '../x': names files"),
        (["--classes", "bad.json"], "--classes bad.json: no list of class names"),
    ],
)
def test_index_label_options_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.csv").write_text("a,b,c\n")
    Path("two.csv").write_text("a,1\na,2\n")
    Path("other.csv").write_text("z,1\n")
    Path("names.txt").write_text("x\ny\n")
    Path("bad.json").write_text('{"a": 3}')
    with pytest.raises(ValueError, match=words):
        indexed(tmp_path, [("a.png", PNG), ("a.json", b'{"label": 3}')], *options)
    assert not (tmp_path / index.FILE).exists()


def test_index_tells_of_labels_elsewhere_and_of_classes_that_do_not_occur(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(
        tmp_path, [("n1/a.png", PNG), ("n1/a.json", b'{"label": 3, "w": 9}'), ("n2/b.png", PNG), ("n2/b.txt", b"x")]
    )
    assert "--labels json:label or --labels folder (2 folders in the tars: n1, n2, ...) or --labels txt" in caplog.text
    nested = b'{"id": 4, "meta": {"label": 1, "w": 3}, "tags": [1]}'
    indexed(tmp_path, [("a.png", PNG), ("a.json", nested)])
    assert "perhaps --labels json:meta.label;" in caplog.text
    captions = [m for i in range(6) for m in ((f"{i}.png", PNG), (f"{i}.txt", b"photo %d of a cat" % i))]
    assert indexed(tmp_path, captions, "--labels", "txt")[1] == [*range(6)]
    assert "6 classes of 6 images: these labels may be captions or ids" in caplog.text
    indexed(tmp_path, [("a.png", PNG), ("a.cls", b"3"), ("b.png", PNG), ("b.cls", b"10985")])
    assert "only 2 of the 10,986 classes 0 to 10,985 occur" in caplog.text


def test_labels_that_changed_since_they_were_indexed_are_refused(tmp_path: Path) -> None:
    indexed(tmp_path, [("a.png", PNG), ("a.cls", b"cat")])
    (tmp_path / "x.labels.npy").write_bytes(npy([5]))
    with pytest.raises(ValueError, match=r"x\.labels\.npy: not the labels that dataset\.json speaks of"):
        index.open_split(str(tmp_path), "train").label(0)


def test_names_as_labels_without_an_index_of_them_do_not_stop_pretraining(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tars with an index of DALI's beside them."""
    tar = write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.cls", b"cat")])
    indexing.build(tar, tar.with_suffix(".idx"))
    data = index.open_split(str(tar), "any")
    assert (data.read(0).image, data.label(0)) == (PNG, -1)
    assert caplog.text.count("its labels are names") == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1 001.Auk\n2 002.Owl bird\n", ["001.Auk", "002.Owl bird"]), ("0: cat\n1: dog\n", ["cat", "dog"]),
        ("/a/air 0\n/b/bay/open 1\n", ["/a/air", "/b/bay/open"]), ("class 0\nclass 1\n", ["class 0", "class 1"]),
        ("7 up\n9 up\n", ["7 up", "9 up"]), ("0\n1\n", ["0", "1"]),
        ("n01 tench, Tinca\nn02 x\n", ["n01 tench, Tinca", "n02 x"]),
    ],
)  # fmt: skip
def test_names_of_a_list_of_classes_are_without_numbers_that_count_them(
    tmp_path: Path, text: str, names: list[str]
) -> None:
    (tmp_path / "c.txt").write_text(text)
    assert labels_of.names_of_file(tmp_path / "c.txt") == {name: number for number, name in enumerate(names)}


def test_index_of_what_is_no_tar_of_images_says_what_is_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("n01.tar", b""), ("n02.tar", b""), ("a.cls", b"")])
    with pytest.raises(
        ValueError, match="no samples .*only 2 .tar, 1 .cls; a tar of tars is for .mae-dist data pack im"
    ):
        main(["index", str(tmp_path / "x.tar")])
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(2000))
    with pytest.raises(
        ValueError, match="x.parquet: not a complete uncompressed tar .*; `mae-dist data pack` makes tars"
    ):
        main(["index", str(tmp_path / "x.parquet")])
