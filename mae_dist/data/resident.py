"""Resident splits: images of one size that are kept in memory, from a file into which they are decoded once.

    DIR/train.resident   beside dataset.json: safetensors, see `Pixels`; for a glob of tars DIR/tars-HASH.resident.
                         Images that are decoded otherwise (data.channels, data.white, ...): DIR/train-HASH.resident

The file is written whole or not at all, by one process while the others wait, and all processes of a machine map it
read-only into memory. It is made anew when a tar has changed since, or when its header or length is damaged (its pixels
have no checksum, which would cost reading them). Where it cannot be written, the images are decoded at every start.

Knows no order and no model.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_dist import environment, small_files
from mae_dist.atomic import leftovers, open_lock, replacing, sync, try_lock
from mae_dist.batch import Batch
from mae_dist.data import resample
from mae_dist.data.crop import Met, Reader, Rows, log_unreadable
from mae_dist.data.dataset import MOST_CLASSES
from mae_dist.data.index import ShardIndex
from mae_dist.data.pixels import RGB, Decoding
from mae_dist.data.views import View
from mae_dist.data.workers import ordered_map, shared_array
from mae_dist.watchdog import progress

log = logging.getLogger(__name__)

FORMAT = "mae_dist resident 3"
"""Changes when other pixels are decoded from the same tars, or when they are stored in another way."""
CHUNK = 64
"""Images that a worker decodes at once."""
WORTH_A_WORKER = 1000
"""Images that are decoded in the time that it takes to start a worker process, or in more."""
WAIT_FOR_LOCK = 300.0
"""Seconds to wait for another process that decodes the images. (If it dies, the kernel frees its lock at once.)"""
DRAWN_TOGETHER = 8
"""Batches whose boxes are drawn at once: the cost of a draw is that of its many small operations."""


TENSORS = {"labels": "I64", "bad": "BOOL", "images": "U8"}
"""The tensors in the file, with their types."""


class Unusable(Exception):
    """A file of a resident split that is missing, stale or damaged."""


class Pixels(NamedTuple):
    """All images of a split, their labels (-1: none), whether another sample replaces an unreadable one (bad), and in
    how many images decoding has changed what.
    """

    labels: Int[Tensor, " n"]
    bad: Bool[Tensor, " n"]
    images: UInt8[Tensor, "n c h w"]
    changes: Mapping[str, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Labels, bad and images by name."""
        return {name: getattr(self, name) for name in TENSORS}


class ResidentSource:
    """A whole split in the device's memory; batches are cropped and resized there. On a CPU it is the file, mapped."""

    def __init__(self, index: ShardIndex, device: torch.device, quiet: bool = False, how: Decoding = RGB):
        self.index, self.device = index, device
        pixels = open_resident(index, quiet, how)
        self.labels, self.bad, self.images = (tensor.to(device) for tensor in pixels.tensors.values())

    def batches(self, plan: Iterable[tuple[np.ndarray, np.ndarray]], view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order. The host never waits for the device."""
        height, width = self.images.shape[2:]
        show = resample.cut if view.keeps_pixels(height, width) else resample.resize
        size, plan = torch.tensor([[height, width]], device=self.device), iter(plan)
        while drawn := list(itertools.islice(plan, DRAWN_TOGETHER)):
            epochs, ids = (self._to_device(np.concatenate(parts)) for parts in zip(*drawn, strict=True))
            counts = [len(part) for _, part in drawn]
            parts = (part.split(counts) for part in (epochs, ids, *view.boxes(epochs, ids, size.expand(len(ids), 2))))
            for places, epoch, id_, box, flip in zip(drawn, *parts, strict=True):
                images = show(self.images.index_select(0, id_), box, flip, view.size)
                progress()
                yield Batch(view.finish(images, *places), self.labels[id_], id_, epoch, self.bad[id_])

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)


def open_resident(index: ShardIndex, quiet: bool = False, how: Decoding = RGB) -> Pixels:
    """The images of a split, mapped from its file, which is made where it is missing, stale or damaged.

    Where the file cannot be written, or another process does not finish it within WAIT_FOR_LOCK s, they are decoded
    into memory, with a warning. Raises what `Reader.fill` raises.
    """
    pixels = _open(index, path_of(index, how), quiet, how)
    if num_bad := int(pixels.bad.sum()):
        first = index.sample_name(int(pixels.bad.byte().argmax()))
        log.warning(
            "%s: %d of %d images are unreadable, %s first",
            index.dataset.name, num_bad, len(index), first,
        )  # fmt: skip
    for what, count in pixels.changes.items():
        log.warning("%s: %d of %d images: %s", index.dataset.name, count, len(index), what)
    return pixels


def _open(index: ShardIndex, path: Path, quiet: bool, how: Decoding) -> Pixels:
    with suppress(Unusable):
        return load(path, index, how)
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        lock = open_lock(lock_path)
    except OSError as error:
        _warn(index, path, error)
        return decode(index, quiet, how)
    with lock:
        try:
            return _load_or_make(index, path, lock, quiet, how)
        finally:
            with suppress(OSError):
                lock_path.unlink()


def _load_or_make(index: ShardIndex, path: Path, lock: IO[bytes], quiet: bool, how: Decoding) -> Pixels:
    """Load the file that another process has made, or make it."""
    alone = _wait_for(lock, path)
    try:
        return load(path, index, how)
    except Unusable as unusable:
        reason = unusable
    if not alone:
        log.warning("%s: not finished after %g s by another process; decoding into memory", path, WAIT_FOR_LOCK)
        return decode(index, quiet, how)
    log.info("%s: %s; decoding %d images into it, once", path, reason, len(index))
    for leftover in leftovers(path.parent, path.name):  # of a process that was killed
        if leftover.name.partition("-")[2] == path.name:
            leftover.unlink(missing_ok=True)
    pixels = decode(index, quiet, how)
    try:
        write(path, key_of(index, how), pixels)
        return load(path, index, how)
    except (OSError, Unusable) as error:  # a file system that maps no files, say
        _warn(index, path, error)
        return pixels


def _wait_for(lock: IO[bytes], path: Path) -> bool:
    """Wait for a lock; whether this process has it now."""
    deadline = time.monotonic() + WAIT_FOR_LOCK
    if locked := try_lock(lock):
        return True
    log.info("%s: another process decodes the images; waiting for it, up to %g s", path, WAIT_FOR_LOCK)
    while not locked and time.monotonic() < deadline:
        time.sleep(0.1)
        locked = try_lock(lock)
    return locked


def _warn(index: ShardIndex, path: Path, error: OSError | Unusable) -> None:
    log.warning(
        "%s: cannot be written (%s), so %d images are decoded at every start; make room or the folder writable, or "
        "index the tars into a folder of your own: `mae-dist data index 'TARS' --out FOLDER`",
        path, getattr(error, "strerror", None) or error, len(index),
    )  # fmt: skip


def path_of(index: ShardIndex, how: Decoding = RGB) -> Path:
    """The file of a split of a dataset.json beside it, SPLIT.resident; for other tars tars-HASH.resident beside the
    first one's index, by a hash of all paths. Each other way of decoding has a file of its own.
    """
    folder = index.indexes[0].parent
    name = next((name for name, shards in index.dataset.splits.items() if shards == index.shards), "")
    if not re.fullmatch(r"\w[\w.-]*", name):
        tars = "\n".join(os.path.relpath(tar, folder) for tar in index.tars)
        name = f"tars-{hashlib.sha256(tars.encode()).hexdigest()[:16]}"
    decoded = "" if how == RGB else f"-{hashlib.sha256(json.dumps(astuple(how)).encode()).hexdigest()[:8]}"
    return folder / f"{name}{decoded}.resident"


def key_of(index: ShardIndex, how: Decoding = RGB) -> str:
    """A hash of all that the file depends on: of the index, how images are decoded, and the size and modification time
    of each tar.
    """
    tars = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, index.local_tars.texts)]
    facts = [FORMAT, index.fingerprint, index.dataset.image_size, astuple(how), tars]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load(path: Path, index: ShardIndex, how: Decoding = RGB) -> Pixels:
    """Map the file of a split. Raises Unusable when it is missing, damaged, of another split, or of tars that have
    changed since.
    """
    if not path.is_file():
        raise Unusable("there is no such file yet")
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            if known.get("key") != key_of(index, how):
                raise Unusable("its tars or their index have changed")
            labels, bad, images = map(file.get_tensor, TENSORS)
            pixels = Pixels(labels, bad, images, small_files.parse_json(known["changes"], path))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Unusable(f"damaged ({error})") from error
    shape = (len(index), how.channels, *(index.dataset.image_size or ()))
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in pixels.tensors.values()]
    if kinds != [(torch.int64, shape[:1]), (torch.bool, shape[:1]), (torch.uint8, shape)]:
        raise Unusable("damaged (not the labels and images of this split)")
    (low, high), least = pixels.labels.aminmax(), 0 if index.num_labelled == len(index) else -1
    if low < least or high >= (index.dataset.num_classes or MOST_CLASSES):
        raise Unusable(f"damaged (labels from {low} to {high})")
    if not all(type(count) is int for count in pixels.changes.values()):
        raise Unusable("damaged (numbers of changes)")
    return pixels


def write(path: Path, key: str, pixels: Pixels) -> None:
    """Write the file of a split, whole or not at all. Raises OSError."""
    header: dict[str, object] = {"__metadata__": {"key": key, "changes": json.dumps(pixels.changes)}}
    end = 0
    for name, tensor in pixels.tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TENSORS[name], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as work, work.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in pixels.tensors.values():
            stream.write(tensor.numpy().data)
        stream.flush()
        sync(stream.fileno(), path)


def decode(index: ShardIndex, quiet: bool = False, how: Decoding = RGB) -> Pixels:
    """Decode a split on the cores that this process may use, with a progress bar unless `quiet`."""
    assert index.dataset.image_size is not None
    labels, bad = shared_array((len(index),), np.int64), shared_array((len(index),), np.bool_)
    images = shared_array((len(index), how.channels, *index.dataset.image_size), np.uint8)
    reader, rows = Reader(index, None, how), Rows(images.transpose(0, 2, 3, 1), labels, bad)

    def work(first: int) -> tuple[Met]:
        ids = np.arange(first, min(first + CHUNK, len(index)))
        return (reader.fill(np.zeros_like(ids), ids, rows.part(first, len(ids))),)

    starts, number = range(0, len(index), CHUNK), min(environment.cores(), len(index) // WORTH_A_WORKER)
    done, hidden = ordered_map(work, starts, max(1, number)), quiet or not sys.stderr.isatty()
    named, changes = set[int](), Counter[str]()
    for met in track(done, f"decoding {index.dataset.name}", len(starts), disable=hidden, transient=True):
        log_unreadable(index, met.unreadable, named)
        changes.update({what: count for what, (count, _) in met.changes.items()})
    tensors = map(torch.from_numpy, (labels, bad, images))
    return Pixels(*tensors, changes=dict(sorted(changes.items())))
