"""From a plan of (epochs, ids) to batches on the device.

Two sources with one interface. `InMemorySource` holds a split of small images of one size in memory as uint8 and crops
whole batches on the device. `TarSource` reads and decodes by byte offset in worker processes. Either way the content of
a batch depends on its (epochs, ids) alone: workers, ranks and prefetching change when it is computed, never its values.

Knows no order and no model.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from mae_dist import signals
from mae_dist.batch import Batch, to_device
from mae_dist.data.decode import decode
from mae_dist.data.index import ChangedError, ShardIndex
from mae_dist.data.order import share
from mae_dist.data.views import View, crop, resample
from mae_dist.errors import MachineFault, RankError, WorkerLost, from_os_error

log = logging.getLogger(__name__)

RESIDENT_BYTES = 2**31
"""Size up to which a split of images of one size is held in memory, as uint8."""
LOST_WORKER = (
    "a loader process of this rank was killed (out of memory? try machine.workers=1, or 0); "
    "the same command resumes from the last checkpoint"
)
Plan = Iterable[tuple[np.ndarray, np.ndarray]]
"""(epochs, ids) of each batch, int64 (b,) each."""


class Source(Protocol):
    """Gives batches of a split: `InMemorySource`, `TarSource`, or `features.Features`."""

    index: ShardIndex

    def batches(self, plan: Plan, view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order, on the device, with images as `view` shows them."""
        ...


def open_source(
    index: ShardIndex, device: torch.device, workers: int, needs_pil: bool = False, quiet: bool = False
) -> InMemorySource | TarSource:
    """InMemorySource if all images have one size, fit in RESIDENT_BYTES and need no PIL; otherwise TarSource."""
    size = index.dataset.image_size
    if not needs_pil and size is not None and len(index) * size[0] * size[1] * 3 <= RESIDENT_BYTES:
        return InMemorySource(index, device, quiet)
    return TarSource(index, device, workers)


class InMemorySource:
    """A whole split in the device's memory: images uint8 (n, h, w, 3), labels (n,), bad (n,)."""

    def __init__(self, index: ShardIndex, device: torch.device, quiet: bool = False):
        assert index.dataset.image_size is not None
        self.index, self.device = index, device
        images = np.empty((len(index), *index.dataset.image_size, 3), dtype=np.uint8)
        labels, bad = np.empty(len(index), dtype=np.int64), np.zeros(len(index), dtype=bool)
        for i in track(
            range(len(index)), f"reading {index.dataset.name}", disable=quiet or not sys.stderr.isatty(), transient=True
        ):
            image, labels[i], bad[i] = read(index, i)
            if (image.height, image.width) != index.dataset.image_size:
                raise ValueError(
                    f"{index.sample_name(i)}: {image.height}x{image.width}, but image_size in dataset.json is "
                    f"{index.dataset.image_size}; index the data again"
                )
            images[i] = np.asarray(image)
        self.images, self.labels, self.bad = (torch.from_numpy(a).to(device) for a in (images, labels, bad))

    def batches(self, plan: Plan, view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order; cropping and resizing run on the device."""
        height, width = self.images.shape[1:3]
        for epochs, ids in plan:
            sizes = torch.tensor([[height, width]]).expand(len(ids), 2)
            boxes, flips = view.boxes(torch.from_numpy(epochs), torch.from_numpy(ids), sizes)
            where = torch.from_numpy(ids).to(self.device)
            images = resample(self.images[where], boxes.numpy(), flips.numpy(), view.image_size)
            images = view.finish(images, epochs, ids)
            yield Batch(images, self.labels[where], where, torch.from_numpy(epochs).to(self.device), self.bad[where])


class TarSource:
    """Images of any size, read and decoded by `workers` processes (0: in this process)."""

    def __init__(self, index: ShardIndex, device: torch.device, workers: int):
        self.index, self.device, self.workers = index, device, workers

    def batches(self, plan: Plan, view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order; the next batch is copied to the device while one is in use."""
        loader = DataLoader(
            Decoder(self.index, view), sampler=plan, batch_size=None, num_workers=self.workers,  # pyright: ignore
            pin_memory=self.device.type == "cuda", prefetch_factor=2 if self.workers else None,
            worker_init_fn=_leave_signals_to_the_rank,
        )  # fmt: skip
        waiting = None
        for cpu in _with_rank_errors(loader):
            batch = to_device(cpu, self.device)
            if waiting is not None:
                yield _finish(*waiting, view)
            waiting = batch, cpu
        if waiting is not None:
            yield _finish(*waiting, view)


class Decoder(Dataset[Batch]):
    """Maps (epochs, ids) to a Batch of cropped uint8 images (b, c, h, w) on the CPU; runs in worker processes."""

    def __init__(self, index: ShardIndex, view: View):
        self.index, self.view, self.augment = index, view, view.augment()

    def __getitem__(self, item: tuple[np.ndarray, np.ndarray]) -> Batch:
        epochs, ids = item
        size = self.view.image_size
        images = np.empty((len(ids), size, size, 3), dtype=np.uint8)
        labels, bad = np.empty(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
        for i, sample in enumerate(ids):
            image, labels[i], bad[i] = read(self.index, int(sample))
            epoch, id_ = torch.from_numpy(epochs[i : i + 1]), torch.from_numpy(ids[i : i + 1])
            boxes, flips = self.view.boxes(epoch, id_, torch.tensor([[image.height, image.width]]))
            pixels = crop(image, boxes[0].numpy(), bool(flips[0]), size)
            images[i] = self.augment(pixels, int(epochs[i]), int(sample)) if self.augment else pixels
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pixels, *(torch.from_numpy(a) for a in (labels, ids, epochs, bad)))


def read(index: ShardIndex, sample: int) -> tuple[Image.Image, int, bool]:
    """Read and decode a sample: (image, label, bad).

    An unreadable sample is replaced by the next readable one of its shard, with a warning and `bad` set. Raises
    ValueError when no sample of the shard is readable, or when the tar is shorter than its index says, and MachineFault
    when the storage fails.
    """
    first = sample
    while True:
        try:
            content = index.read(sample)
            return decode(content), content.label, sample != first
        except ChangedError:
            raise
        except OSError as error:
            where = error.filename or index.sample_name(sample)
            raise from_os_error(error, f"{where}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            log.warning("unreadable: %s (%s); the next sample of its tar replaces it", index.sample_name(sample), error)
            sample = index.neighbour(sample)
            if sample == first:
                raise ValueError(f"{index.sample_name(sample)}: no sample of this tar can be read ({error})") from error


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


def _leave_signals_to_the_rank(_: int) -> None:
    signals.ignore_once()


def _with_rank_errors(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of a loader. Raises a worker's ValueError as RankError and its MachineFault without its traceback, and
    WorkerLost when a worker was killed.
    """
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    _WorkerLostHandler.install()
    try:
        yield from batches
    except (ValueError, MachineFault) as error:
        message = re.sub(r"^[\w.]*(Error|Fault): ", "", str(error).strip().splitlines()[-1])
        raise (RankError if isinstance(error, ValueError) else type(error))(message) from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while it handed a batch over
        if isinstance(error, RuntimeError) and not any(worker.exitcode for worker in workers):
            raise
        raise WorkerLost(LOST_WORKER) from error


class _WorkerLostHandler:
    """torch's handler of SIGCHLD, raising WorkerLost where it raises a RuntimeError: at any place in this rank."""

    def __init__(self, torch_handler: Callable[[int, FrameType | None], object]):
        self.torch_handler = torch_handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.torch_handler(number, frame)
        except RuntimeError as error:
            raise WorkerLost(LOST_WORKER) from error

    @staticmethod
    def install() -> None:
        """Replace torch's handler, which torch sets once, when a loader with workers first starts."""
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and not isinstance(current, _WorkerLostHandler):
            signal.signal(signal.SIGCHLD, _WorkerLostHandler(current))


@atexit.register
def end_workers() -> None:
    """Kill the loader's worker processes when a rank exits; they have nothing to save.

    Without this, `multiprocessing` would send them one SIGTERM at exit, which they ignore, and wait forever.
    """
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for worker in workers:
            worker.kill()


def _finish(batch: Batch, cpu: Batch, view: View) -> Batch:
    return batch._replace(images=view.finish(batch.images.float() / 255, cpu.epochs.numpy(), cpu.ids.numpy()))
