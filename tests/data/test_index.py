"""ShardIndex: offsets lead to the members' bytes in any tar; unsuitable tars are refused in one sentence."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dist.commands.data import main
from mae_dist.data import index, indexing, places


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [m for i in range(first, first + count) for m in [(f"s{i}.png", png(i)), (f"s{i}.cls", b"%d" % (i % 3))]]


def indexed(folder: Path, members: list[tuple[str, bytes]], name: str = "x") -> index.ShardIndex:
    tar = write_tar(folder / f"{name}.tar", members)
    indexing.build(tar, tar.with_suffix(".idx"))
    return index.open_split(str(tar), "any")


def test_index_file_has_the_dali_format_and_correct_offsets(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [*samples(3), ("s2.json", b"{}")])
    built = indexing.build(tar, tmp_path / "x.idx")
    shard = built.shard
    lines = (tmp_path / "x.idx").read_text().splitlines()
    assert lines[0] == "v1.2 3"
    assert len(lines) == 4
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        seen = []
        for line in lines[1:]:
            words = line.split(" ")
            for extension, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
                stream = archive.extractfile(name)
                assert stream is not None
                assert content[int(offset) : int(offset) + int(size)] == stream.read()
                assert name.endswith("." + extension)
                seen.append(name)
        assert sorted(seen) == sorted(archive.getnames())
    assert built.labels == [0, 1, 2]
    assert (shard.num_samples, shard.num_labelled, shard.num_bytes) == (3, 3, tar.stat().st_size)


def test_index_read_returns_every_sample_and_label_of_all_shards(tmp_path: Path) -> None:
    for number, first in enumerate((0, 5)):
        tar = write_tar(tmp_path / f"x-{number}.tar", samples(5 - number, first))
        indexing.build(tar, tar.with_suffix(".idx"))
    data = index.open_split(str(tmp_path / "x-*.tar"), "any")
    assert len(data) == 9
    for i in range(9):
        sample = data.read(i)
        assert (sample.key, sample.extension, sample.image, sample.label) == (f"s{i}", "png", png(i), i % 3)
        assert data.label(i) == i % 3


def test_index_pickles_to_dataloader_workers(tmp_path: Path) -> None:
    data = indexed(tmp_path, samples(3))
    data.read(0)
    assert pickle.loads(pickle.dumps(data)).read(2) == data.read(2)


def test_index_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    members = samples(3)
    data = indexed(tmp_path, members[0::2] + members[1::2])
    assert [data.read(i).label for i in range(3)] == [0, 1, 2]
    assert [data.read(i).image for i in range(3)] == [png(i) for i in range(3)]


def test_index_leaves_out_samples_without_image_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "x.tar", [*samples(2), ("lonely.cls", b"1")])
    main(["index", str(tmp_path)])
    data = index.open_split(str(tmp_path), "train")
    assert [data.read(i).key for i in range(len(data))] == ["s0", "s1"]
    assert "samples have no image and are left out: 1 (lonely)" in caplog.text


def test_index_label_of_an_unlabelled_sample_is_minus_one(tmp_path: Path) -> None:
    data = indexed(tmp_path, [("a.png", png(1)), ("b.png", png(2)), ("b.cls", b"7\n")])
    assert [data.read(i).label for i in range(2)] == [-1, 7]
    assert data.num_labelled == 1


def test_index_handles_folders_upper_case_and_double_extensions(tmp_path: Path) -> None:
    data = indexed(tmp_path, [("d/a.seg.png", png(9)), ("d/a.JPEG", png(1)), ("d/b.input.png", png(2))])
    assert [(data.read(i).key, data.read(i).extension, data.read(i).image) for i in range(2)] == [
        ("d/a", "jpeg", png(1)),
        ("d/b", "png", png(2)),
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("a.cls", b"1")], "holds no samples"),
        ([("a.png", png(1)), ("a.png", png(2))], "contains a.png twice"),
        ([("a.png", png(1)), ("a.PNG", png(2))], "contains a.png and a.PNG"),
    ],
)
def test_index_refuses_unsuitable_tars(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=message):
        indexing.build(tar, tmp_path / "x.idx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("keep", [700, 100])
def test_index_refuses_a_truncated_tar(tmp_path: Path, keep: int) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.png", bytes(2000))])
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.tar: (cut short|not a complete)"):
        indexing.build(tar, tmp_path / "x.idx")


def test_index_refuses_a_file_that_is_no_tar(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="not a complete uncompressed tar"):
        indexing.build(tar, tmp_path / "x.idx")


def test_index_refuses_a_tar_changed_since_dataset_json(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(2))
    main(["index", str(tar)])
    write_tar(tar, samples(20))
    with pytest.raises(ValueError, match="was changed or cut"):
        index.open_split(str(tmp_path), "train")


def test_data_index_command_on_existing_webdataset_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_tar(tmp_path / f"x-{number}.tar", samples(4, first=number * 4))
    main(["index", str(tmp_path / "x-*.tar"), "--split", "train"])
    dataset = index.Dataset.load(tmp_path)
    assert (dataset.num_classes, dataset.image_size, dataset.mean) == (3, (4, 4), None)
    assert [shard.tar for shard in dataset.splits["train"]] == ["x-0.tar", "x-1.tar"]
    data = index.open_split(str(tmp_path), "train")
    assert [data.read(i).key for i in range(8)] == [f"s{i}" for i in range(8)]
    assert "next: mae-dist data show" in capsys.readouterr().out


def test_data_index_command_with_out_keeps_tars_and_merges_splits(tmp_path: Path) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    write_tar(tars / "a.tar", samples(3))
    write_tar(tars / "b.tar", [("t.png", png(5, size=(6, 2))), ("t.cls", b"9")])
    main(["index", str(tars / "a.tar"), "--out", str(out)])
    main(["index", str(tars / "b.tar"), "--out", str(out), "--split", "test"])
    assert sorted(f.name for f in tars.iterdir()) == ["a.tar", "b.tar"]
    dataset = index.Dataset.load(out)
    assert dataset.num_classes == 10
    assert dataset.image_size is None  # 4 x 4 in one split, 6 x 2 in the other
    assert [len(index.open_split(str(out), split)) for split in ("train", "test")] == [3, 1]
    assert index.open_split(str(out), "test").read(0).image == png(5, size=(6, 2))


def test_data_index_command_refuses_mistakes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", samples(1))
    pattern = str(tmp_path / "*" / "x.tar")
    with pytest.raises(ValueError, match="no file matches"):
        main(["index", str(tmp_path / "nothing*")])
    with pytest.raises(ValueError, match="--out DIR"):
        main(["index", pattern])
    with pytest.raises(ValueError, match=r"x\.tar is in it twice"):
        main(["index", pattern, str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    main(["index", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    main(["index", str(tmp_path / "a")])
    with pytest.raises(ValueError, match=r"a/x\.tar is in it twice"):
        index.open_split(f"{tmp_path / 'out'}::{tmp_path / 'a/x.tar'}", "train")


def test_data_index_keeps_tars_of_one_name_in_two_folders_apart(tmp_path: Path) -> None:
    """Of one split, and of two splits in the same folder of indexes."""
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", samples(2, first=10 * number))
    main(["index", str(tmp_path / "[ab]" / "x.tar"), "--out", str(tmp_path / "out")])
    main(["index", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--split", "test"])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["b-x.idx", "c-x.idx", "dataset.json", "x.idx"]
    train, test = (index.open_split(str(tmp_path / "out"), split) for split in ("train", "test"))
    assert [train.read(i).key for i in range(4)] == ["s0", "s1", "s10", "s11"]
    assert [test.read(i).key for i in range(2)] == ["s20", "s21"]


def test_index_opens_several_places_as_one_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders with a dataset.json, tars by a brace range, a folder of tars; ids go on from place to place."""
    for number, folder in enumerate(("a", "b", "c/1")):
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "x.tar", samples(2, first=10 * number))
        main(["index", str(tmp_path / folder)])
    (tmp_path / "c/1" / index.FILE).unlink()
    expected = ["s0", "s1", "s10", "s11", "s20", "s21"]
    opened = index.open_split(f"[{tmp_path}/a, {tmp_path}/b, {tmp_path}/c]", "train")
    assert [opened.read(i).key for i in range(6)] == expected
    assert "1 more data sets" not in caplog.text
    braces = index.open_split(f"{tmp_path}/{{a,b}}/x.tar::{tmp_path}/c/1", "any")
    assert [braces.read(i).key for i in range(6)] == expected
    assert [s.sha256 != "" for s in braces.shards] == [True, True, False]
    assert places.splits(f"{tmp_path}/[ab]") == ["train"]
    assert places.splits(f"{tmp_path}/?") == []


def test_fingerprint_tells_tars_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tar = write_tar(tmp_path / folder / "x.tar", samples(2))
        indexing.build(tar, tar.with_suffix(".idx"))
    one, other = (index.open_split(f"{tmp_path}/{names}/x.tar", "any") for names in ("{a,b}", "{b,a}"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("path", ["[]", "[,]", "[ ]"])
def test_empty_list_of_data_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"^data.path=\[.*: names no data; give a folder"):
        index.open_split(path, "train")


@pytest.mark.parametrize("name", ["dataset.json", "x.idx"])
def test_files_beside_tars_are_no_data(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", png(1))])
    main(["index", str(tmp_path / "x.tar")])
    with pytest.raises(ValueError, match=rf"{name}: is no tar; name the folder that it is in"):
        index.open_split(str(tmp_path / name), "train")
