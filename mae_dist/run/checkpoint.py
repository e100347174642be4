"""A checkpoint as a folder of safetensors shards and a manifest: written, verified, read on any number of ranks.

A checkpoint holds tensors by name and nothing else, so reading one never executes code. It exists only when complete,
since it is renamed last, and it loads on any number of ranks, however the tensors were sharded when it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mae_dist import dist
from mae_dist.errors import MachineFault
from mae_dist.run import jsonl
from mae_dist.run.layout import MANIFEST

MODEL, OPTIMIZER, EMA, LOSS_SCALE = "model.", "optimizer.", "ema.", "scaler."
"""Prefixes of the names in a checkpoint: parameters and buffers, moments and averages of parameters, the loss scale."""
PIECE = 2**25
"""Largest file in bytes. Writing a file holds Python's lock, which a save in the background must release soon."""


def pieces(state: dict[str, Tensor]) -> dict[str, int]:
    """The number of each tensor's file, from 1. A file has at most PIECE bytes, or one tensor."""
    numbers, number, size = {}, 1, 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > PIECE:
            number, size = number + 1, 0
        numbers[name], size = number, size + num_bytes
    return numbers


def save(path: Path, step: int, state: dict[str, Tensor], group: Any = None) -> None:
    """Write `state` (tensors or DTensors by name) as the checkpoint `path`, all ranks together (of `group`, if given).

    It is written under another name beside `path` and renamed last, so that a kill leaves no part of it. Raises
    MachineFault on every rank where it cannot be written, after removing what is there of it.
    """
    temporary, replaced = path.with_name(f".saving-{step:09d}"), path.with_name(f".replaced-{step:09d}")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        files = {file.name: measure(file, sync=True) for file in sorted(temporary.iterdir())}
        manifest = {"step": step, "world": dist.world(), "num_tensors": len(state), "files": files}
        jsonl.write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        sync_directory(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    writer = dcp.HuggingFaceStorageWriter(str(temporary), pieces(state), save_distributed=True)
    try:
        dist.run_on_rank0(prepare, group)
        dcp.save(state, storage_writer=writer, process_group=group)
        dist.run_on_rank0(publish, group)
    except (ValueError, OSError, MachineFault, dcp.CheckpointException) as error:
        if not dist.is_main():
            raise MachineFault("") from error
        shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise MachineFault(
            f"the checkpoint of step {step} could not be written to {path.parent}: {cause}; is the disk full?"
        ) from error


def verify(path: Path) -> str | None:
    """What is damaged in a checkpoint, or None where its files are those of its manifest, by name, size and sha256."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    if not files or not isinstance(files, dict):
        return f"{MANIFEST}: names no files"
    own = {MANIFEST, *files}
    for file in sorted(path.iterdir()):  # all safetensors files of a folder are read, so none may come from elsewhere
        if file.name not in own and (file.suffix == ".safetensors" or not file.name.startswith(".")):
            return f"{file.name} is not in {MANIFEST}: this save did not write it"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if measure(path / name) != expected:
            return f"{name} is not what was written"
    return None


def names_in(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint, by name."""
    metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    return {name: getattr(entry, "size", torch.Size()) for name, entry in metadata.state_dict_metadata.items()}


def trained(there: Container[str], name: str) -> str:
    """The name, among those `there` in a checkpoint, of the trained weights of parameter `name`: its EMA where there is
    one, else the parameter itself.
    """
    average = f"{EMA}{name}"
    return average if average in there else f"{MODEL}{name}"


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from a checkpoint. Raises ValueError where one is not there or has another
    shape; the checkpoint may hold more.
    """
    there = names_in(path)
    for name, tensor in state.items():
        if name not in there:
            raise ValueError(f"{path}: has no tensor {name}; it was written for another model or by another version")
        if there[name] != tensor.shape:
            raise ValueError(f"{path}: {name} is {tuple(there[name])}, the model's is {tuple(tensor.shape)}")
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def measure(path: Path, sync: bool = False) -> dict[str, Any]:
    """The size and sha256 of a file. ``sync``: wait until it is on the disk."""
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def sync_directory(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
