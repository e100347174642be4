"""CIFAR-100 from its archive: without loss, nothing in it is executed, inconsistent ones are refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from mae_dist.commands.data import main
from mae_dist.data import index
from mae_dist.data.sources import from_cifar100


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
