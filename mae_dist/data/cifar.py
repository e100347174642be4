"""Read CIFAR-100's archive (its python version), or any archive in that layout, into arrays.

Nothing is extracted to disk, and links in the archive are not followed. A pickle may contain only arrays, strings,
numbers, lists and dicts: nothing in it is imported, called or given a state. Shapes, lengths and labels are checked.
Knows no shards. Imports no torch.

Source of the data: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).
"""

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
from typing import Any, ClassVar

import numpy as np

from mae_dist.atomic import replacing

log = logging.getLogger(__name__)

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER = "cifar-100-python"
SPLITS = ("train", "test")
MOST_GROWTH = 20
"""How many times the size of the archive a member may unpack to, beside 256 MiB."""


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
                    if member.size > MOST_GROWTH * archive.stat().st_size + 2**28:
                        raise ValueError(f"{archive}: {name} unpacks to {member.size:,} bytes, which no images do")
                    content = stream.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: not a complete .tar.gz ({error}); download it again") from error
    for path, name in wanted.items():
        if name not in found:
            raise ValueError(f"{archive}: has no file {path}; expected CIFAR-100's python version")
    return found


ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
NAMES = (*ARRAYS, *SCALARS, *BUFFERS, "numpy.ndarray", "numpy.dtype", "_codecs.encode")
"""The globals that pickled arrays and numbers of NumPy refer to. Each stays a name: none is imported or called."""
REFUSED = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2,
    pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
"""Opcodes that make other objects."""


class _Name(str):
    """The name of a global."""


class _Array:
    """An array, whose values follow in an opcode BUILD."""

    values: np.ndarray | None = None


class _PlainUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's own unpickler in Python, which no bytes can crash, without what imports, calls or changes objects."""

    stack: list[Any]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = {
        key: do
        for key, do in pickle._Unpickler.dispatch.items()
        if bytes([key]) not in REFUSED  # pyright: ignore
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NAMES:
            raise ValueError(f"it contains {module}.{name}, which is not plain data")
        return _Name(f"{module}.{name}")

    def load_reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        self.append(_called(name, arguments))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Array):
            _, shape, kind, by_columns, content = state
            made.values = np.frombuffer(_bytes(content), _kind(kind)).reshape(shape, order="F" if by_columns else "C")
        elif not isinstance(made, np.dtype) or state[1] == ">":
            raise ValueError(f"it sets the state of a {type(made).__name__}, which is not plain data")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def _called(name: Any, arguments: Any) -> Any:
    """What one of NAMES would give: for an array, a place for it."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no name of NumPy's")
    if name in ARRAYS:
        return _Array()
    if name in BUFFERS:
        content, kind, shape, order = arguments
        return np.frombuffer(_bytes(content), _kind(kind)).reshape(shape, order="F" if order == "F" else "C")
    if name in SCALARS:
        return np.frombuffer(_bytes(arguments[1]), _kind(arguments[0]), 1)[0]
    if name == "numpy.dtype":
        return _kind(np.dtype(str(arguments[0])))
    if name == "_codecs.encode":
        return arguments[0].encode("latin-1")
    raise ValueError(f"it calls {name}, which is not plain data")


def _kind(kind: Any) -> np.dtype:
    if not isinstance(kind, np.dtype) or kind.kind not in "buif":
        raise ValueError("it holds an array of something else than numbers")
    return kind


def _bytes(content: Any) -> bytes:
    return content.encode("latin-1") if isinstance(content, str) else bytes(memoryview(content))


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        plain = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        plain = {key: value.values if isinstance(value, _Array) else value for key, value in plain.items()}
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in plain.items()}
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(
            f"{where}: refused, not a pickle of plain data ({' '.join(str(error).split())[:200]})"
        ) from error


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
    try:
        labels = np.array(given, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"{where}: 'fine_labels' has a number that is none of a class") from error
    if len(labels) != len(data) or not len(data):
        raise ValueError(f"{where}: {len(data)} images and {len(labels)} labels; there must be one label an image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}, but meta names {num_classes} classes")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
