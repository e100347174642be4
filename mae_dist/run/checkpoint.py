"""A checkpoint as a folder of safetensors shards and a manifest: written, verified, read on any number of ranks.

State is tensors only, by name, so that reading a checkpoint never executes anything. `directory.RunDir` decides where
checkpoints lie and which stay. Knows no model and no loop.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

MODEL, OPTIMIZER, EMA, LOSS_SCALE = "model.", "optimizer.", "ema.", "scaler."
"""Prefixes of the names in a checkpoint: parameters and buffers, moments and averages of parameters, the loss scale."""
MANIFEST = "manifest.json"
PIECE = 2**25
"""Bytes of a file, at most. Serialising one holds Python's lock, which a save in the background must give back soon."""


def pieces(state: dict[str, Tensor]) -> dict[str, int]:
    """Tensor -> number of its file, from 1: files of at most PIECE bytes, or of one tensor."""
    numbers, number, size = {}, 1, 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > PIECE:
            number, size = number + 1, 0
        numbers[name], size = number, size + num_bytes
    return numbers


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    if not files or not isinstance(files, dict):
        return f"{MANIFEST}: names no files"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if measure(path / name) != expected:
            return f"{name} is not what was written"
    return None


def names_in(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint."""
    metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    return {name: getattr(entry, "size", torch.Size()) for name, entry in metadata.state_dict_metadata.items()}


def trained(there: Container[str], name: str) -> str:
    """Which of the tensors `there` in a checkpoint is what came out of training for `name`: its average, where there is
    one, else itself.
    """
    average = f"ema.{name}"
    return average if average in there else f"model.{name}"


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from a checkpoint, which may hold more (ValueError when it holds less)."""
    there = names_in(path)
    for name, tensor in state.items():
        if name not in there:
            raise ValueError(f"{path}: has no tensor {name}; it was written for another model or by another version")
        if there[name] != tensor.shape:
            raise ValueError(f"{path}: {name} is {tuple(there[name])}, the model's is {tuple(tensor.shape)}")
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def measure(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
