"""A checkpoint as a folder of safetensors shards and a manifest: written, verified, read on any number of ranks.

A checkpoint holds tensors by name and nothing else, so reading one never executes code. It exists only when complete,
since it is renamed last, and it loads on any number of ranks, however the tensors were sharded when it was written.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_dist import dist
from mae_dist.atomic import remove, sync, sync_folder
from mae_dist.checksum import sha256
from mae_dist.errors import MachineFault
from mae_dist.run import jsonl, layout
from mae_dist.run.layout import MANIFEST
from mae_dist.tensor_bytes import bytes_of
from mae_dist.watchdog import progress

MODEL, OPTIMIZER, EMA, LOSS_SCALE = "model.", "optimizer.", "ema.", "scaler."
"""Prefixes of the names in a checkpoint: parameters and buffers, moments and averages of parameters, the loss scale."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of data types."""


class Part(NamedTuple):
    """What one rank writes of a tensor: values, which begin at these offsets in the whole tensor."""

    values: Tensor
    offsets: tuple[int, ...]


def share(state: dict[str, Tensor]) -> dict[str, Part]:
    """What this rank writes of `state` (tensors, which all ranks have alike, or DTensors, by name).

    Each value is written by one of the ranks that have it, and these ranks write about as many bytes each.
    """
    parts: dict[str, Part] = {}
    written: dict[int, list[int]] = {}
    for name, tensor in state.items():
        num_copies, own_copy = copies(tensor)
        sizes = written.setdefault(num_copies, [0] * num_copies)
        chosen = sizes.index(min(sizes))
        sizes[chosen] += tensor.numel() * tensor.element_size()
        if chosen != own_copy:
            continue
        if not dist.is_sharded(tensor):
            parts[name] = Part(tensor.detach(), (0,) * tensor.ndim)
        elif (local := tensor.to_local()).numel():  # a rank beyond the last row has nothing
            parts[name] = Part(local.detach(), tuple(tensor.__create_chunk_list__()[0].offsets))
    return parts


def copies(tensor: Tensor) -> tuple[int, int]:
    """(How many copies of a tensor the ranks have together; of which of them this rank has all, or a shard)."""
    if not dist.is_sharded(tensor):
        return dist.world(), dist.rank()
    here, mesh = tensor.device_mesh.get_coordinate(), tensor.device_mesh
    assert here is not None
    num_copies, own_copy = 1, 0
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            num_copies, own_copy = num_copies * mesh.size(axis), own_copy * mesh.size(axis) + here[axis]
    return num_copies, own_copy


def save(path: Path, step: int, parts: dict[str, Part], group: Any = None) -> None:
    """Write the checkpoint `path`, all ranks together (of `group`, if given), each its own `parts` (see `share`).

    It is written under another name beside `path` and renamed last, so that a kill leaves no part of it. Python's lock
    is held for milliseconds, so a thread may save beside training. Raises MachineFault on every rank where it cannot be
    written, after removing what is there of it.
    """
    temporary = path.with_name(f".saving-{step:09d}")

    def prepare() -> None:
        if temporary.exists():
            remove(temporary)
        temporary.mkdir(parents=True)

    def publish() -> None:
        files = {name: facts for each in written for name, facts in each["files"].items()}
        num_tensors = sum(each["num_tensors"] for each in written)
        manifest = {"step": step, "world": dist.world(), "num_tensors": num_tensors, "files": files}
        jsonl.write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if path.exists():
            remove(path)
        temporary.rename(path)
        sync_folder(path.parent)

    try:
        dist.run_on_rank0(prepare, group)
        written = dist.gather_objects(write(temporary, parts), group)
        if failures := [each["error"] for each in written if "error" in each]:
            raise MachineFault(failures[0])
        dist.run_on_rank0(publish, group)
    except (ValueError, OSError, MachineFault) as error:
        if not dist.is_main():
            raise MachineFault("") from error
        shutil.rmtree(temporary, ignore_errors=True)
        raise MachineFault(f"the checkpoint of step {step} could not be written to {path.parent}: {error}.") from error


def write(folder: Path, parts: dict[str, Part]) -> dict[str, Any]:
    """Write this rank's file: {"files": {its name: its size and sha256}, "num_tensors": how many tensors begin in it},
    or {"error": why it could not be written}.
    """
    if not parts:
        return {"files": {}, "num_tensors": 0}
    file = folder / f"shard-{dist.rank() + 1:05d}-of-{dist.world():05d}.safetensors"
    places = {name: {"saved_offsets": list(part.offsets)} for name, part in parts.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}  # torch's reader's
    try:
        facts = write_safetensors(file, {name: part.values for name, part in parts.items()}, metadata)
    except (OSError, MemoryError, RuntimeError) as error:  # this rank must answer the others all the same
        return {"error": str(error) or type(error).__name__}
    return {"files": {file.name: facts}, "num_tensors": sum(not any(part.offsets) for part in parts.values())}


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write tensors on the CPU to a file and wait until it is on the disk; its size and sha256.

    safetensors' own function is not used because a thread that calls it slows training three times as much: the file
    must then be read again for its checksum. Here bytes are written and hashed where they lie, without Python's lock.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text, *map(bytes_of, tensors.values())):
            progress()
            stream.write(piece)
            digest.update(piece)
        stream.flush()
        sync(stream.fileno(), file)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def verify(path: Path) -> str | None:
    """What is damaged in a checkpoint, or None where its files are those of its manifest, by name, size and sha256."""
    try:
        manifest = layout.manifest(path)
    except ValueError as error:
        return str(error)
    if manifest["step"] != layout.step_of(path):
        return f"{MANIFEST} is of step {manifest['step']}"
    files = manifest["files"]
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


def read_named(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names, which the checkpoint has, by name; read by this process by itself."""
    entries = _entries(path)
    state = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
    read(path, state)
    return state


def names_in(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint, by name."""
    return {name: entry.size for name, entry in _entries(path).items()}


def _entries(path: Path) -> dict[str, Any]:
    """What torch's reader says of the tensors in a checkpoint, by name. Raises ValueError where its files, though they
    may be those of its manifest, are none of a checkpoint, or of smaller tensors.
    """
    try:
        entries = _reader(path).read_metadata().state_dict_metadata
        sizes = [math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values()]
        if any(side < 0 for entry in entries.values() for side in entry.size):
            raise ValueError("a tensor has a negative size")
        if sum(sizes) > sum(file.stat().st_size for file in path.iterdir()):
            raise ValueError("its tensors are larger than its files")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({brief(error)}); choose another checkpoint") from error
    return entries


def trained(there: Container[str], name: str) -> str:
    """The name, among those `there` in a checkpoint, of the trained weights of parameter `name`: its EMA where there is
    one, else the parameter itself.
    """
    average = f"{EMA}{name}"
    return average if average in there else f"{MODEL}{name}"


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from a checkpoint, all ranks together. Where tensors are sharded, each rank
    reads what it needs by itself, as torch's common plan is pickled; where every rank has all of `state`, rank 0 reads
    it for all. Raises ValueError where a tensor is not there or has another shape; the checkpoint may hold more.
    """
    there = dist.run_on_rank0(lambda: {name: list(shape) for name, shape in names_in(path).items()})
    for name, tensor in state.items():
        if name not in there:
            raise ValueError(f"{path}: has no tensor {name}; it was written for another model or by another version")
        if there[name] != list(tensor.shape):
            raise ValueError(f"{path}: {name} is {tuple(there[name])}, the model's is {tuple(tensor.shape)}")
    if any(map(dist.is_sharded, state.values())):
        read(path, state)
        return
    dist.run_on_rank0(lambda: read(path, state))
    for tensor in state.values():
        dist.broadcast(tensor)


def read(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from a checkpoint that has all of them; this process by itself."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes a rank that reads by itself for the only one
        try:
            dcp.load(state, storage_reader=_reader(path), no_dist=True)
        except dcp.CheckpointException as failure:  # which is no Exception
            error = next(iter(failure.failures.values()), (failure,))[0]
            if isinstance(error, OSError):
                raise error from failure
            raise ValueError(f"{path}: cannot be read ({brief(error)}); choose another checkpoint") from failure


def brief(error: BaseException) -> str:
    """The first line of an error of another library, in 200 characters at most."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _reader(path: Path) -> Any:
    """torch's reader of a checkpoint, imported here, since a run that reads none does not need it, nor DTensors."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path))


def measure(path: Path) -> dict[str, Any]:
    """The size and sha256 of a file."""
    progress()
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
