"""Packing: lossless, deterministic and atomic; inconsistent sources are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from mae_dist.commands.data import main
from mae_dist.data import index
from mae_dist.data.pack import Picture, Source, from_cifar100, from_folder, from_synthetic, pack


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_archive(path: Path, **changes: Any) -> Path:
    """A tiny archive in CIFAR-100's layout; `changes` replace whole members, given as objects or as bytes."""
    plain: dict[str, Any] = {
        "meta": {b"fine_label_names": [b"cat", b"dog", b"owl"], b"coarse_label_names": [b"animal"]}
    }
    for split, count in (("train", 7), ("test", 3)):
        data = noise(count, seed=count).transpose(0, 3, 1, 2).reshape(count, 3072)
        labels = [i % 3 for i in range(count)]
        plain[split] = {
            b"data": data,
            b"fine_labels": labels,
            b"coarse_labels": [0] * count,
            b"filenames": [b"f"] * count,
        }
    with tarfile.open(path, "w:gz") as archive:
        for name, value in (plain | changes).items():
            if value is None:
                continue
            content = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def image_file(path: Path, value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value % 256, 7)).save(path, kind)
    return path


# --- the writing


def test_pack_cifar100_roundtrip_is_lossless(tmp_path: Path) -> None:
    source = cifar_archive(tmp_path / "mini-python.tar.gz")
    main(["pack", "cifar100", "--source", str(source), "--out", str(tmp_path / "out"), "--shard-size", "4"])
    dataset = index.Dataset.load(tmp_path / "out")
    assert [shard.num_samples for shard in dataset.splits["train"]] == [4, 3]
    assert (dataset.classes, dataset.num_classes, dataset.image_size) == (["cat", "dog", "owl"], 3, (32, 32))
    for split, count in (("train", 7), ("test", 3)):
        data, expected = index.open_split(str(tmp_path / "out"), split), noise(count, seed=count)
        assert len(data) == count
        for i in range(count):
            sample = data.read(i)
            assert (sample.key, sample.label) == (f"{split}_{i:06d}", i % 3)
            np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(sample.image))), expected[i])
    train = noise(7, seed=7).reshape(-1, 3) / 255
    np.testing.assert_allclose(np.array(dataset.mean), train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(np.array(dataset.std), train.std(0), rtol=1e-12)


def test_pack_shards_are_readable_by_webdataset(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    pack(from_synthetic(12, 4), tmp_path / "out", shard_size=5)
    urls = [str(tar) for tar in sorted((tmp_path / "out").glob("train-*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False)
    found = list(dataset.decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in found] == [f"train_{i:06d}" for i in range(12)]
    assert [label for _, _, label in found] == [i % 10 for i in range(12)]
    assert {image.shape for _, image, _ in found} == {(32, 32, 3)}


def test_pack_is_deterministic_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for number in range(6):
        image_file(source / f"class {number % 2}" / f"{number}.png", number)
    for name, make in {"s": lambda: from_synthetic(9, 3), "f": lambda: from_folder(source, test_share=0.3)}.items():
        for turn in ("1", "2"):
            pack(make(), tmp_path / (name + turn), shard_size=4)
        assert content_of(tmp_path / f"{name}1") == content_of(tmp_path / f"{name}2")
    pack(from_synthetic(9, 3, seed=1), tmp_path / "s3", shard_size=4)
    assert content_of(tmp_path / "s3") != content_of(tmp_path / "s1")


def test_pack_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def pictures(_: str) -> Iterator[Picture]:
        yield Picture("png", b"x", 0, (1, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(Source("s", ["a"], {"train": 5}, pictures), tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_pack_does_not_overwrite_existing_data(tmp_path: Path) -> None:
    out = tmp_path / "100% new"  # a name that ShardWriter would take for a format
    out.mkdir()
    pack(from_synthetic(3, 3), out)
    before = content_of(out)
    with pytest.raises(ValueError, match="not an empty folder"):
        pack(from_synthetic(4, 4), out)
    assert content_of(out) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pack", "synthetic", "--out", "x", "--test", "0"], "--test 0"),
        (["pack", "synthetic", "--out", "x", "--shard-size", "0"], "--shard-size 0"),
        (["pack", "synthetic"], "--out"),
        (["pack", "folder", "--source", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["pack", "cifar100", "--source", "nowhere", "--out", "x"], "nowhere: no such file"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_pack_mistakes_raise_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(argv)
    assert list(tmp_path.iterdir()) == []


# --- CIFAR-100's archive


def test_cifar_other_checksum_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert from_cifar100(cifar_archive(tmp_path / "mini.tar.gz")).name == "mini"
    assert "is not CIFAR-100's" in caplog.text


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("member", ["meta", "train"])
def test_cifar_malicious_pickle_is_refused_before_execution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = cifar_archive(tmp_path / "evil.tar.gz", **{member: {b"data": Evil()}})
    with pytest.raises(ValueError, match=r"posix\.mkdir, which is not plain data"):
        from_cifar100(source)
    assert not (tmp_path / "pwned").exists()


class Huge:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.empty(0).__reduce__()[0], (np.ndarray, (2**40, 2**20), b"f8")


def test_cifar_pickle_cannot_allocate_a_huge_array(tmp_path: Path) -> None:
    source = cifar_archive(tmp_path / "huge.tar.gz", meta={b"fine_label_names": Huge()})
    with pytest.raises(ValueError, match="list of names"):  # an empty array came; NumPy would run out of memory
        from_cifar100(source)


TRAIN = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": None}, "no file cifar-100-python/test"),
        ({"train": b"not a pickle"}, "not a pickle of plain data"),
        ({"train": [1, 2]}, "not a pickle of plain data"),
        ({"train": {b"data": TRAIN[b"data"]}}, "no 'fine_labels'"),
        ({"train": TRAIN | {b"fine_labels": [0, 3]}}, "labels from 0 to 3, but meta names 3 classes"),
        ({"train": TRAIN | {b"fine_labels": [0, -1]}}, "labels from -1"),
        ({"train": TRAIN | {b"fine_labels": [0]}}, "2 images and 1 labels"),
        ({"train": TRAIN | {b"fine_labels": ["a", "b"]}}, "whole numbers"),
        ({"train": TRAIN | {b"data": np.zeros((2, 3071), np.uint8)}}, "3072 columns"),
        ({"train": TRAIN | {b"data": np.zeros((2, 3072))}}, "array of bytes"),
        ({"meta": {b"fine_label_names": 3}}, "list of names"),
    ],
)
def test_cifar_inconsistent_archives_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_cifar100(cifar_archive(tmp_path / "bad.tar.gz", **changes))


def test_cifar_truncated_archives_are_refused(tmp_path: Path) -> None:
    whole = cifar_archive(tmp_path / "a.tar.gz").read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "text": b"<html>not found</html>",
        "short": gzip.compress(gzip.decompress(whole)[:2000]),
        "empty": b"",
    }.items():
        file = tmp_path / f"{name}.tar.gz"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.tar.gz: not a complete .tar.gz"):
            from_cifar100(file)


def test_cifar_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps(TRAIN, protocol=2))
    source = tmp_path / "link.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name in ("train", "test", "meta"):
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(info)
    with pytest.raises(ValueError, match="has no file cifar-100-python/train"):
        from_cifar100(source)


def test_cifar_download_verifies_checksum_and_offline_error_has_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def offline(*_: Any, **__: Any) -> Any:
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match=r"no route to host.*--source"):
        from_cifar100()

    class Response(io.BytesIO):
        headers: dict[str, str] = {}  # noqa: RUF012

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(b"something else"))
    with pytest.raises(ValueError, match="file with md5"):
        from_cifar100()
    assert list((tmp_path / "mae_dist").iterdir()) == []


# --- class folders


def test_pack_folder_keeps_bytes_extension_and_class_order(tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    files = {}
    for number in range(12):
        split, name = ("train", f"im {number}.v2.é") if number < 9 else ("val", f"v{number}")
        kind, extension = [("PNG", "png"), ("JPEG", "JPEG"), ("WEBP", "webp")][number % 3]
        path = image_file(source / split / ("b_dog", "a cat")[number % 2] / f"{name}.{extension}", number, kind=kind)
        files[path.read_bytes()] = (extension.lower(), 1 - number % 2, "test" if split == "val" else split)
    (source / "train" / "a cat" / "Thumbs.db").write_bytes(b"x")
    (source / ".hidden").mkdir()
    os.symlink(source / "train" / "b_dog", tmp_path / "elsewhere")
    pack(from_folder(source), tmp_path / "out")
    dataset = index.Dataset.load(tmp_path / "out")
    assert dataset.classes == ["a cat", "b_dog"]
    found = {}
    for split in ("train", "test"):
        data = index.open_split(str(tmp_path / "out"), split)
        samples = [data.read(i) for i in range(len(data))]
        assert all(name.isascii() and " " not in name and "." not in name for name in (s.key for s in samples))
        found |= {s.image: (s.extension, s.label, split) for s in samples}
    assert found == files


def test_pack_folder_shards_are_not_sorted_by_class(tmp_path: Path) -> None:
    for number in range(40):
        image_file(tmp_path / "in" / str(number // 20) / f"{number}.png", number)
    pack(from_folder(tmp_path / "in"), tmp_path / "out")
    data = index.open_split(str(tmp_path / "out"), "train")
    labels = [data.label(i) for i in range(40)]
    assert sum(labels) == 20
    assert 5 < sum(labels[:20]) < 15


def test_pack_folder_test_share_is_exact_and_complete(tmp_path: Path) -> None:
    written = {image_file(tmp_path / "in" / str(n % 3) / f"{n}.png", n).read_bytes() for n in range(30)}
    pack(from_folder(tmp_path / "in", test_share=0.2), tmp_path / "out")
    parts = {}
    for split in ("train", "test"):
        data = index.open_split(str(tmp_path / "out"), split)
        parts[split] = {data.read(i).image for i in range(len(data))}
    assert (len(parts["train"]), len(parts["test"])) == (24, 6)
    assert parts["train"] | parts["test"] == written


def test_pack_folder_follows_links_to_class_folders(tmp_path: Path) -> None:
    image_file(tmp_path / "elsewhere" / "a.png", 1)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    source = from_folder(tmp_path / "in")
    assert (source.classes, source.counts) == (["linked"], {"train": 1})


def test_pack_folder_leaves_out_unreadable_images_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(150):
        image_file(tmp_path / "in" / "c" / f"{number}.jpg", number, size=(64, 64), kind="JPEG")
    broken = tmp_path / "in" / "c" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-30])
    dataset = pack(from_folder(tmp_path / "in"), tmp_path / "out")
    assert sum(shard.num_samples for shard in dataset.splits["train"]) == 149
    assert "7.jpg" in caplog.text
    assert "1 of 150 images unreadable" in caplog.text
    (tmp_path / "in" / "c" / "8.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="150 images of split 'train'"):
        pack(from_folder(tmp_path / "in"), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_pack_folder_refuses_folders_without_classes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image_file(tmp_path / "flat" / "a.png", 1)
    image_file(tmp_path / "half" / "train" / "c" / "a.png", 1)
    image_file(tmp_path / "half" / "val" / "a.png", 1)
    image_file(tmp_path / "twice" / "val" / "c" / "a.png", 1)
    image_file(tmp_path / "twice" / "test" / "c" / "a.png", 1)
    for name, message in {
        "empty": "no images", "flat": "no images of split 'train'", "half": "no images of split 'test'",
        "twice": "two of its folders",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            from_folder(tmp_path / name)


# --- show


def test_data_show_command_counts_and_draws_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(from_synthetic(80, 20), tmp_path / "out")
    capsys.readouterr()
    main(["show", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "80 images" in printed.out
    assert "10 classes of 8 to 8 images" in printed.out
    assert "32 x 32 (80)" in printed.out
    assert printed.err == ""
    with Image.open(tmp_path / "out" / "sheet-train.png") as sheet:
        assert sheet.width > 10 * 90
        assert len(sheet.getcolors(1 << 20) or []) > 1000
    main(["show", str(tmp_path / "out"), "--split", "test", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").is_file()


def test_data_show_command_handles_unreadable_and_unlabelled_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    main(["index", str(tmp_path / "x.tar")])
    main(["show", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 without a label" in printed
    assert "2 unreadable" in printed


def test_pack_dataset_json_content(tmp_path: Path) -> None:
    pack(from_synthetic(3, 3), tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert plain["format"] == index.FORMAT
    assert plain["splits"]["train"][0]["tar"] == "train-000000.tar"
