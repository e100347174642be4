"""Files of other houses, read without executing what is in them, and files of ours, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mae_dist.weights.checks import brief

IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""What the file with the tensors is called where a checkpoint is a folder."""

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz")
"""What names of single files end in."""


def kind(path: Path) -> str:
    """ "safetensors", "npz" or "pth", by content. ValueError for anything else."""
    with path.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        return "safetensors"
    with naming_damage(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return "npz" if all(name.endswith(".npy") for name in archive.namelist()) else "pth"
    if head[:1] == b"\x80":  # PyTorch before 1.6: bare pickle
        return "pth"
    raise ValueError(f"{path}: no checkpoint: neither safetensors nor .npz nor a file that torch.save wrote")


def pth(path: Path) -> Any:
    """What torch.save wrote, of tensors and plain values. ValueError when reading it would execute anything else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        if "weights only" not in str(error).lower():
            raise ValueError(f"{path}: damaged: {one_line(error)}") from None
        try:
            asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # a bare pickle
            asked = []
        raise ValueError(
            f"{path}: reading it would execute code ({', '.join(asked) or 'other than tensors'}), which mae-dist never "
            "does; ask for a file of tensors alone, for example .safetensors"
        ) from None


def safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata."""
    with naming_damage(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def npz(path: Path) -> dict[str, Tensor]:
    """Arrays of floats."""
    with (
        naming_damage(path, "damaged, or objects, which are never unpickled"),
        np.load(path, allow_pickle=False) as archive,
    ):
        arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}


@contextmanager
def naming_damage(path: Path, words: str = "damaged") -> Iterator[None]:
    """Whatever damaged bytes raise becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {words}: {one_line(error)}") from error


def json_file(path: Path) -> dict[str, Any]:
    """What a small JSON file says; {} where there is none."""
    return json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def json_object(content: str | bytes, origin: str) -> dict[str, Any]:
    """A JSON object, parsed; ValueError, which begins with `origin`, for anything else."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON: {one_line(error)}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{origin}: not a JSON object, but {brief(parsed)}")
    return parsed


def one_line(error: Exception) -> str:
    """The first line of what an exception says."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def refuse_existing(path: Path, field: str) -> None:
    """Nothing is overwritten (ValueError naming the `field`)."""
    if path.exists():
        raise ValueError(f"{field} {path}: exists already; choose another place")


@contextmanager
def whole(path: Path, field: str) -> Iterator[Path]:
    """A place beside `path` to write a file or folder to, which becomes `path` in the end and vanishes after an error.

    Raises ValueError, naming the `field`, when there is something at `path` already.
    """
    refuse_existing(path, field)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
