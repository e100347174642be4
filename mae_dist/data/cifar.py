"""Read CIFAR-100's archive (its python version), or any archive in that layout, into arrays.

Nothing is extracted to disk, and links in the archive are not followed. A pickle may contain only arrays, strings,
numbers, lists and dicts: any other is refused before it is executed. Shapes, lengths and label ranges are checked.
Knows no shards. Imports no torch.

Source of the data: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist.atomic import replacing

log = logging.getLogger(__name__)

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER = "cifar-100-python"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Archive:
    """Name, names of the fine labels, and per split the images uint8 (n, 32, 32, 3) and labels int64 (n,)."""

    name: str
    classes: list[str]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]


def read(archive: Path) -> Archive:
    """Read all images and their fine labels, in the archive's order; coarse labels are left out.

    An archive with another checksum than the official one is read with a warning. Raises ValueError when the archive is
    cut short, lacks a member or holds anything but plain data, or when its arrays do not fit each other.
    """
    if not archive.is_file():
        raise ValueError(f"{archive}: no such file; expected CIFAR-100's python version, {FOLDER}.tar.gz")
    with archive.open("rb") as stream:
        md5 = hashlib.file_digest(stream, "md5").hexdigest()
    if md5 != MD5:
        log.warning("%s: md5 %s is not CIFAR-100's (%s): read as another data set in its layout", archive, md5, MD5)
    members = _members(archive)
    where = f"{archive}: meta"
    names = _field(_unpickle(members["meta"], where), "fine_label_names", where)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{where}: 'fine_label_names' must be a list of names")
    classes = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names]
    splits = {split: _arrays(members[split], len(classes), f"{archive}: {split}") for split in SPLITS}
    return Archive("cifar100" if md5 == MD5 else archive.name.partition(".")[0], classes, splits)


def download(tick: Callable[[int, int], None]) -> Path:
    """Path of the official archive in the user's cache folder, downloaded once; calls `tick(bytes, total bytes)`.

    Raises ValueError when the download fails or its checksum is wrong.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_dist"
    target = cache / f"{FOLDER}.tar.gz"
    if target.is_file():
        return target
    md5 = hashlib.md5(usedforsecurity=False)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            with urllib.request.urlopen(URL, timeout=30) as response, part.open("wb") as stream:
                total = int(response.headers.get("Content-Length") or 0)
                while block := response.read(1 << 20):
                    stream.write(block)
                    md5.update(block)
                    tick(stream.tell(), total)
            if md5.hexdigest() != MD5:
                raise ValueError(
                    f"{URL}: downloaded a file with md5 {md5.hexdigest()}, not {MD5}; try again, or pass --source FILE"
                )
    except OSError as error:
        raise ValueError(
            f"{URL}: cannot be downloaded ({error}); download it elsewhere and pass --source {target.name}"
        ) from error
    return target


def _members(archive: Path) -> dict[str, bytes]:
    wanted = {f"{FOLDER}/{name}": name for name in (*SPLITS, "meta")}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as stream:
            for member in stream:
                name = wanted.get(member.name.removeprefix("./"))
                if name is not None and member.isreg():
                    content = stream.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: not a complete .tar.gz ({error}); download it again") from error
    for path, name in wanted.items():
        if name not in found:
            raise ValueError(f"{archive}: has no file {path}; expected CIFAR-100's python version")
    return found


def _empty_array(*_: Any) -> np.ndarray:
    return np.empty(0, dtype=np.uint8)


def _latin1(text: str, _: str) -> bytes:
    return text.encode("latin-1")


PLAIN = {
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.ndarray": None,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
}
"""The globals that a pickled array refers to, and the harmless functions that are used in their place."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PLAIN:
            raise ValueError(f"it contains {module}.{name}, which is not plain data")
        return PLAIN[f"{module}.{name}"]


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        plain = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in plain.items()}
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{where}: refused, not a pickle of plain data ({' '.join(str(error).split())})") from error


def _field(plain: dict[str, Any], name: str, where: str) -> Any:
    if name not in plain:
        raise ValueError(f"{where}: has no {name!r}, only {', '.join(sorted(plain)) or 'nothing'}")
    return plain[name]


def _arrays(content: bytes, num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    plain = _unpickle(content, where)
    data = _field(plain, "data", where)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{where}: 'data' must be an array of bytes with 3072 columns (32 x 32 x 3)")
    given = _field(plain, "fine_labels", where)
    if not isinstance(given, list | np.ndarray) or not all(isinstance(label, int | np.integer) for label in given):
        raise ValueError(f"{where}: 'fine_labels' must be a list of whole numbers")
    labels = np.array(given, dtype=np.int64)
    if len(labels) != len(data) or not len(data):
        raise ValueError(f"{where}: {len(data)} images and {len(labels)} labels; there must be one label an image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}, but meta names {num_classes} classes")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
