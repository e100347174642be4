"""From a plan of (epochs, ids) to batches on the device.

Two sources with one interface. `ResidentSource` holds a split of small images of one size in memory as uint8 and crops
whole batches on the device. `TarSource` reads and decodes by byte offset in worker processes. Either way the content of
a batch depends on its (epochs, ids) alone: workers, ranks and prefetching change when it is computed, never its values.

Knows no order and no model.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from mae_dist.batch import Batch
from mae_dist.data.cache import fetch_ahead
from mae_dist.data.changes import Changes
from mae_dist.data.crop import Met, Reader, Rows, log_unreadable
from mae_dist.data.index import ShardIndex
from mae_dist.data.order import share
from mae_dist.data.pixels import RGB, Decoding
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import View
from mae_dist.data.workers import Workers, shared_array

log = logging.getLogger(__name__)

RESIDENT_BYTES = 2**31
"""Size up to which a split of images of one size is held in memory, as uint8."""
CHUNK = 32
"""Samples that a worker reads at once: few, so that all workers share the first batch, and big images even out."""
FETCHERS = 2
"""Processes of a rank that download remote tars before they are needed."""
READ_AHEAD = 2
"""Batches for which there is memory."""
Plan = Iterable[tuple[np.ndarray, np.ndarray]]
"""(epochs, ids) of each batch, int64 (b,) each."""


class Source(Protocol):
    """Gives batches of a split: `ResidentSource`, `TarSource`, or `features.Features`."""

    index: ShardIndex

    def batches(self, plan: Plan, view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order, on the device, with images as `view` shows them."""
        ...


def open_source(
    index: ShardIndex,
    device: torch.device,
    workers: int,
    needs_pil: bool = False,
    quiet: bool = False,
    how: Decoding = RGB,
    changes: Changes | None = None,
) -> ResidentSource | TarSource:
    """ResidentSource for a split that is kept in memory, otherwise TarSource; `how` says how images are decoded. The
    latter counts in `changes`, if given, what that changes; the former logs it at once.
    """
    kept = is_kept_in_memory(index, needs_pil, how)
    return ResidentSource(index, device, quiet, how) if kept else TarSource(index, device, workers, how, changes)


def is_kept_in_memory(index: ShardIndex, needs_pil: bool, how: Decoding = RGB) -> bool:
    """Whether all images of a split have one size, also when turned upright, fit in RESIDENT_BYTES and need no PIL."""
    size = index.dataset.image_size
    if needs_pil or size is None or (how.upright and size[0] != size[1]):
        return False
    return len(index) * size[0] * size[1] * how.channels <= RESIDENT_BYTES


class TarSource:
    """Images of any size, read and decoded by `workers` processes (0: by this one)."""

    def __init__(
        self, index: ShardIndex, device: torch.device, workers: int, how: Decoding = RGB, changes: Changes | None = None
    ):
        self.index, self.device, self.workers, self.how = index, device, workers, how
        self.changes, self.named = changes or Changes(), set[int]()

    def batches(self, plan: Plan, view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order. The workers read ahead from this call on."""
        reader = Reader(self.index, view, self.how)
        return iter(ReadAhead(plan, reader, view, self.workers, self.device, self.changes, self.named))


class ReadAhead:
    """Iterates once over the batches of a plan, which `workers` processes read ahead, CHUNK samples at a time, into
    memory that they share with this rank.

    The memory has room for READ_AHEAD batches like the first. A chunk is copied straight to its place in its batch on
    the device, on a GPU asynchronously. ``changes`` counts those of pixels in what was taken; ``named``: unreadable
    samples that have been logged.
    """

    def __init__(
        self, plan: Plan, reader: Reader, view: View, workers: int, device: torch.device, changes: Changes,
        named: set[int],
    ):  # fmt: skip
        self.index, self.view, self.device, self.changes, self.named = reader.index, view, device, changes, named
        plan = list(itertools.islice(first := iter(plan), 1))
        self.taken = shared_array((1,), np.int64)
        self.fetchers = _fetchers(self.index, itertools.chain(plan, first), self.taken, None if view.training else 2)
        self.plan, ahead = itertools.tee(itertools.chain(plan, first))
        self.chunks = (
            (epochs[i : i + CHUNK], ids[i : i + CHUNK]) for epochs, ids in ahead for i in range(0, len(ids), CHUNK)
        )
        largest = max((len(ids) for _, ids in plan), default=0)
        self.free = deque(range(max(2 * workers, -(-READ_AHEAD * largest // CHUNK)) if workers else 1))
        self.sent, self.copied = deque[int](), deque[tuple[torch.cuda.Event, int]]()
        self.rows = rows = _shared_rows(len(self.free) * CHUNK, (*view.size, reader.how.channels))
        self.images = torch.from_numpy(rows.images)

        def work(task: tuple[int, np.ndarray, np.ndarray]) -> Met:
            slot, epochs, ids = task
            return reader.fill(epochs, ids, rows.part(slot * CHUNK, len(ids)))

        self.workers = Workers(work, workers, partial(torch.set_num_threads, 1))
        self.pinned = device.type == "cuda" and _pin(self.images)
        self._send()

    def __iter__(self) -> Iterator[Batch]:
        kind = torch.uint8 if self.device.type == "cuda" else torch.float32  # what is cheap to copy, or saves a copy
        try:
            for epochs, ids in self.plan:
                images = torch.empty((len(ids), *self.images.shape[1:]), dtype=kind, device=self.device)
                labels, bad = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=bool)
                for first in range(0, len(ids), CHUNK):
                    part = slice(first, first + CHUNK)
                    self._take(images[part], labels[part], bad[part])
                pixels = rearrange(images, "b h w c -> b c h w").float().div_(255)
                facts = (torch.from_numpy(array).to(self.device) for array in (labels, ids, epochs, bad))
                self.taken += 1
                yield Batch(self.view.finish(pixels, epochs, ids), *facts)
        finally:
            self.workers.stop()
            self.fetchers.stop()
            if self.pinned:
                _unpin(self.images)

    def _send(self) -> None:
        """Send chunks to the workers while there is memory for them."""
        while self.copied and (self.copied[0][0].query() or not (self.free or self.sent)):
            event, slot = self.copied.popleft()
            event.synchronize()
            self.free.append(slot)
        while self.free and (chunk := next(self.chunks, None)):
            self.sent.append(self.free.popleft())
            self.workers.send((self.sent[-1], *chunk))

    def _take(
        self, images: UInt8[Tensor, "n h w c"] | Float[Tensor, "n h w c"], labels: np.ndarray, bad: np.ndarray
    ) -> None:
        """Wait for the next chunk and copy it."""
        met = self.workers.wait()
        log_unreadable(self.index, met.unreadable, self.named)
        self.changes.add(self.index, met.changes)
        slot = self.sent.popleft()
        here = slice(slot * CHUNK, slot * CHUNK + len(labels))
        images.copy_(self.images[here], non_blocking=True)
        labels[:], bad[:] = self.rows.labels[here], self.rows.bad[here]
        if self.device.type == "cuda":
            self.copied.append((torch.cuda.Event(), slot))
            self.copied[-1][0].record()
        else:
            self.free.append(slot)
        self._send()


def _fetchers(index: ShardIndex, plan: Plan, taken: np.ndarray, most: int | None) -> Workers:
    """Processes that download the tars of the next batches where tars are remote; each has a copy of the `plan`."""
    cache, total = index.cache, sum(file.size for file in index.remotes if file is not None)

    def work(parent: int) -> None:
        shards = (np.unique(np.searchsorted(index.ends, ids, side="right")) for _, ids in plan)
        files = ([file for shard in needed if (file := index.remotes[shard]) is not None] for needed in shards)
        fetch_ahead(cache, total, files, lambda: int(taken[0]), most, parent)

    fetchers = Workers(work, FETCHERS if total else 0)
    for _ in fetchers.pipes:
        fetchers.send(os.getpid())
    return fetchers


def _shared_rows(count: int, shape: tuple[int, ...]) -> Rows:
    images = shared_array((count, *shape), np.uint8)
    return Rows(images, shared_array((count,), np.int64), shared_array((count,), np.bool_))


def _pin(memory: Tensor) -> bool:
    """Lock memory of this process, so that a GPU copies from it asynchronously. Where that fails, copies are slower."""
    cudart = torch.cuda.cudart()
    assert cudart is not None
    if error := int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        log.warning("the loader's memory cannot be pinned (CUDA error %d): copies to the GPU take longer", error)
    return not error


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()
    cudart = torch.cuda.cudart()
    assert cudart is not None
    cudart.cudaHostUnregister(memory.data_ptr())


def evaluation_plan(num_samples: int, batch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(epochs, ids) of this rank's batches in an evaluation: over all ranks every sample once, in order, in epoch 0.

    Batches have at most `batch` samples. Every rank gets as many batches, since ranks that shard a model compute
    together; with fewer samples than ranks some batches are empty.
    """
    start, stop = share(num_samples, rank, world)
    number = -(-num_samples // (world * batch))
    for part in range(number):
        first, last = share(stop - start, part, number)
        ids = np.arange(start + first, start + last, dtype=np.int64)
        yield np.zeros_like(ids), ids
