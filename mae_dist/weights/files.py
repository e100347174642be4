"""Checkpoint files read without executing anything in them, and output files and folders written atomically."""

import argparse
import datetime
import hashlib
import logging
import os
import pathlib
import re
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mae_dist import small_files
from mae_dist.atomic import replacing
from mae_dist.tensor_bytes import bytes_of
from mae_dist.weights.checks import brief, listed

log = logging.getLogger(__name__)

SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
"""The functions by which pickle makes NumPy's scalars and arrays of bytes."""
INERT: tuple[Any, ...] = (
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, datetime.datetime, datetime.timedelta, Counter,
    np.dtype, np.ndarray, SCALAR, ARRAY, (SCALAR, "numpy.core.multiarray.scalar"),
    (ARRAY, "numpy.core.multiarray._reconstruct"),
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"),
)  # fmt: skip
"""Types that lie beside weights and execute nothing when they are read."""
SETTINGS = re.compile(
    r"(omegaconf|lightning|lightning_fabric|pytorch_lightning|yacs|ml_collections|easydict|mmengine|deepspeed)\..*"
    r"|typing\.Any|collections\.defaultdict|builtins\.(dict|list|tuple|str|int|float|bool)"
)
"""Names of types that keep a trainer's settings. `Skipped` stands for each: none is imported."""
OTHERS = {
    b"\x1f\x8b": "compressed by gzip; unpack it first", b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first", b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"version ": "a pointer of Git LFS; `git lfs pull` fetches the file", b"<": "a web page; download the file itself",
    b"\x89HDF": "an HDF5 file; save its weights with torch.save or as .safetensors",
}  # fmt: skip
"""How files begin that people take for checkpoints -> what they are, and what to do."""

DIGEST = "sha256"
"""Key in the metadata of a .safetensors file that we write: `digest` of its tensors."""
MOST_TENSORS, MOST_GROWTH = 100_000, 20
"""Tensors of a file, and how many times its size an archive may unpack to, beside 1 GiB."""


class Skipped:
    """Stands for the types of a trainer's settings: makes a dictionary, which takes items and executes nothing."""

    def __new__(cls, *_: object) -> OrderedDict:  # the kind of dictionary that torch.load fills
        return OrderedDict()


def detect(path: Path) -> str:
    """Return "safetensors", "npz" or "pth" by the content of a file. ValueError for anything else."""
    with path.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        return "safetensors"
    names = []
    with refuse_damaged(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [Path(name).name for name in archive.namelist()]
    if "constants.pkl" in names:
        raise ValueError(f"{path}: is a TorchScript archive, which holds code; save its state_dict() alone")
    if "data.pkl" in names or head[:1] == b"\x80":  # PyTorch before 1.6: bare pickle
        return "pth"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if names or tarfile.is_tarfile(path):
        raise ValueError(f"{path}: is an archive of other files; unpack it, and give the checkpoint that it holds")
    other = next((what for start, what in OTHERS.items() if head.startswith(start)), None)
    kinds = "neither safetensors nor .npz nor a file that torch.save wrote"
    raise ValueError(f"{path}: is {other}" if other else f"{path}: is no checkpoint: {kinds}")


def check_zip(path: Path) -> None:
    """Raise ValueError where members of an archive do not match their checksums, share a name, are too many or unpack
    to much more than the file has. torch can be told to write no checksums: then all are 0.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST_TENSORS or len({member.filename for member in members}) < len(members):
            raise ValueError(f"{len(members)} members, of which some share a name, or more than {MOST_TENSORS:,}")
        if (total := sum(member.file_size for member in members)) > MOST_GROWTH * path.stat().st_size + 2**30:
            raise ValueError(f"unpacks to {total:,} bytes, far more than the {path.stat().st_size:,} that it has")
        if any(member.CRC for member in members) and (bad := archive.testzip()):
            raise ValueError(f"{brief(bad)} does not match its checksum")


def read_pth(path: Path) -> Any:
    """Read what torch.save wrote, if it is tensors and plain values. ValueError if reading it would execute code."""
    with refuse_damaged(path):
        if zipfile.is_zipfile(path):
            check_zip(path)
    names: list[str] = []
    with torch.serialization.safe_globals([*INERT]), suppress(Exception):  # a bare pickle has no list of them
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(Skipped, name) for name in names if SETTINGS.fullmatch(name)]
    try:
        with torch.serialization.safe_globals([*INERT, *stand_ins]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # raised by weights_only alone
        unsafe = listed(sorted(name for name in names if not SETTINGS.fullmatch(name))) or "other than tensors"
        raise ValueError(
            f"{path}: reading it would execute code ({unsafe}), which mae-dist never does; load it "
            "with torch where you trust it, and save its state dict alone"
        ) from None
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(f"{path}: damaged: {first_line(error)}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of a .safetensors file."""
    with refuse_damaged(path), safe_open(path, framework="pt") as file:
        if len(file.keys()) > MOST_TENSORS:
            raise ValueError(f"{len(file.keys()):,} tensors, more than {MOST_TENSORS:,}")
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get(DIGEST) not in (None, digest(tensors)):
            raise ValueError("its tensors are not those that were written (sha256)")
        return tensors, metadata


def digest(tensors: dict[str, Tensor]) -> str:
    """The sha256 of tensors: of their names, types, shapes and bytes, for the metadata DIGEST of a file."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read the floating-point arrays of an .npz file as tensors."""
    with refuse_damaged(path):
        check_zip(path)
    with (
        refuse_damaged(path, "damaged, or holds objects, which are never unpickled"),
        np.load(path, allow_pickle=False) as archive,
    ):
        arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}


def shards(index: Path) -> list[Path]:
    """The files of a sharded checkpoint, from its index. ValueError where one is missing or outside its folder."""
    names = small_files.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: has no weight_map, so it lists no parts of a checkpoint")
    parts = [*dict.fromkeys(str(name) for name in names.values())]
    for name in parts:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: lists {brief(name)}, and there is no such file beside it")
    return [index.parent / name for name in parts]


@contextmanager
def refuse_damaged(path: Path, problem: str = "damaged") -> Iterator[None]:
    """Context manager: turns any exception, which damaged bytes may raise, into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {problem}: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a small JSON file; {} if there is no such file."""
    return small_files.read_json(path) if path.is_file() else {}


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def refuse_existing(path: Path, field: str) -> None:
    """Raise ValueError, naming `field`, if there is something at `path`: nothing is overwritten."""
    if path.exists():
        raise ValueError(f"{field} {path}: already exists; choose another path")


@contextmanager
def atomic_output(path: Path, field: str) -> Iterator[Path]:
    """Context manager: a temporary path for a new file or folder, renamed to `path` at the end, deleted on an error.

    Raises ValueError, naming `field`, if there is something at `path` already.
    """
    refuse_existing(path, field)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        yield temporary
        os.umask(umask := os.umask(0))
        for file in (temporary, *temporary.rglob("*")):  # safetensors writes files that only their owner reads
            if file.is_file() and file.stat().st_mode & 0o666 != 0o666 & ~umask:
                try:
                    file.chmod(0o666 & ~umask)
                except OSError as error:  # some file systems have one mode for all files
                    name = file.name if file != temporary else path.name
                    log.warning("%s: who may read %s is up to its file system (%s)", path, name, error.strerror)
