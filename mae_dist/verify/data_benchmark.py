"""Where the time of loading goes: `mae-dist bench data`, with the settings of a run and its data.

The parts of loading one image are timed on one core of this process, the loader as a run uses it, and a step whose
batches are in memory already: the rate at which the step could go, and what stands in its way.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from mae_dist import dist, environment
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from mae_dist.data import loader
from mae_dist.data.crop import Reader, Rows, decode_crop
from mae_dist.data.decode import Memory, decode, stored_size
from mae_dist.data.decoding import completed, decoding
from mae_dist.data.index import Sample, ShardIndex, open_split
from mae_dist.data.pixels import Decoding, Pixels
from mae_dist.data.views import View
from mae_dist.verify.benchmarks import one_step
from mae_dist.verify.measurement import Measurement, Result, Runner
from mae_dist.verify.step_benchmark import mae_of

STEP_IMAGES = 256
"""Most images of the step that is timed; on a CPU a 16th."""
ENOUGH = 1.1
"""How many times as fast as the step a loader should be."""


def data(runner: Runner) -> Result:
    """Images per second of each part of loading on one core, of the loader with its workers, and of the step."""
    settings, device = runner.settings, dist.setup()
    index = open_split(settings.data.path, settings.data.split)
    settings = completed(settings, None, index.dataset, None)
    how = decoding(settings)
    channels = how.channels
    mean, std = (values if channels == 3 else values[:1] * channels for values in (IMAGENET_MEAN, IMAGENET_STD))
    view = View(settings.view, settings.model.image_size, mean, std, settings.train.seed, True)
    source = loader.open_source(index, device, settings.machine.workers, view.needs_pil, how=how)
    resident = not isinstance(source, loader.TarSource)
    if runner.options["images"] < 2:
        raise ValueError("--images 1: the first batch starts the loader and does not count; give 2 or more")
    ids = np.arange(runner.options["images"], dtype=np.int64) % len(index)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {} if resident else parts_of_loading(index, view, how, ids, runner.options["rounds"])
    torch.set_num_threads(threads)
    rates = [loader_rate(source, view, ids, settings.train.global_batch) for _ in range(runner.options["rounds"])]
    step = step_rate(settings, device)
    core = 1 / sum(parts.values()) if parts else 0.0
    measurements = [Measurement(f"{name}: one core", 1 / seconds, f"images/s, {seconds * core:.0%}")
                    for name, seconds in parts.items()]  # fmt: skip
    if parts:
        measurements.append(Measurement("all parts: one core", core, "images/s"))
    what = "data in memory" if resident else f"loader, machine.workers={settings.machine.workers}"
    measurements += [
        Measurement(what, median(rates), "images/s"),
        Measurement(f"step with batches in memory ({device})", step, "images/s"),
        Measurement("loader / step", median(rates) / step, at_least=ENOUGH),
    ]
    raw = {"seconds": parts, "loader": rates, "step": step}
    title = f"{settings.model.name}, {len(ids)} images of {settings.data.path}"
    workers = None if resident else settings.machine.workers
    return Result(title, measurements, raw, advice(median(rates), step, core, index, view, workers))


class Cropping:
    """The parts of cropping the samples `ids`, which `get` reads, as a view shows them, each for all by one call."""

    def __init__(self, get: Callable[[int], Sample], view: View, how: Decoding, ids: np.ndarray):
        self.get, self.how, self.ids, self.epochs = get, how, ids, np.zeros_like(ids)
        self.samples = [get(number) for number in ids.tolist()]
        self.sizes = [stored_size(sample, how) or (1, 1) for sample in self.samples]
        drawn = view.boxes(torch.from_numpy(self.epochs), torch.from_numpy(ids), torch.tensor(self.sizes))
        self.boxes, self.flips = drawn[0].tolist(), drawn[1].tolist()
        self.readable = [i for i, sample in enumerate(self.samples) if _readable(sample, how)]
        self.memory, self.out = Memory(), np.empty((loader.CHUNK, *view.size, how.channels), dtype=np.uint8)

    def read(self) -> None:
        """Read the bytes."""
        for number in self.ids.tolist():
            self.get(number)

    def decode(self) -> None:
        """Decode whole images."""
        for i in self.readable:
            self._decode(self.samples[i], 1)

    def _decode(self, sample: Sample, shrink: int) -> Pixels:
        return decode(sample, shrink, self.memory, self.how)

    def decode_and_crop(self) -> None:
        """Decode, and resize the box."""
        for i in self.readable:
            decode_crop(self.samples[i], self.sizes[i], self.boxes[i], self.flips[i], self.out[0], self._decode)


class Loading(Cropping):
    """All parts of loading the samples `ids` of an index, each for all samples by one call."""

    def __init__(self, index: ShardIndex, view: View, how: Decoding, ids: np.ndarray):
        super().__init__(index.read, view, how, ids)
        self.view, self.augmentation, self.reader = view, view.augment(), Reader(index, view, how)

    def augment(self) -> None:
        """RandAugment, if the view has it."""
        for seeds in self.augmentation.seeds(self.epochs, self.ids) if self.augmentation else ():
            assert self.augmentation is not None
            self.augmentation(self.out[0], seeds)

    def fill(self) -> None:
        """All of these parts as a worker does them, with the headers, the boxes and the copies between them."""
        rows = Rows(self.out, np.empty(loader.CHUNK, np.int64), np.empty(loader.CHUNK, np.bool_))
        for first in range(0, len(self.ids), loader.CHUNK):
            part = slice(first, first + loader.CHUNK)
            self.reader.fill(self.epochs[part], self.ids[part], rows.part(0, len(self.ids[part])))

    def finish(self) -> None:
        """Normalise, and erase if the view does."""
        pixels = torch.from_numpy(self.out[:1]).permute(0, 3, 1, 2)
        for _ in self.ids:
            self.view.finish(pixels.float().div_(255), self.epochs[:1], self.ids[:1])


def parts_of_loading(index: ShardIndex, view: View, how: Decoding, ids: np.ndarray, rounds: int) -> dict[str, float]:
    """CPU seconds an image of each part of loading."""
    parts = Loading(index, view, how, ids)
    actions = (parts.read, parts.decode, parts.decode_and_crop, parts.augment, parts.fill, parts.finish)
    read, decoded, cropping, augmenting, whole, finishing = (value / len(ids) for value in timed(actions, rounds))
    found = {
        "read": read, "decode": decoded, "crop, resize, flip": cropping - decoded,
        "augment": augmenting if parts.augmentation else 0.0,
        "sizes, boxes, rest": whole - read - cropping - augmenting, "normalise, erase": finishing,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value > 0}


def timed(actions: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """CPU seconds of each action: the median of `rounds` in which they take turns, after one that warms up."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(1 + rounds):
        for action, values in zip(actions, seconds, strict=True):
            began = time.process_time()
            action()
            values.append(time.process_time() - began)
    return [median(values[1:]) for values in seconds]


def _readable(sample: Any, how: Decoding) -> bool:
    try:
        decode(sample, how=how)
    except ValueError:
        return False
    return True


def loader_rate(source: Any, view: View, ids: np.ndarray, batch: int) -> float:
    """Images per second of wall time of a source, its start left out: from its first batch on."""
    plan = [(np.zeros_like(part), part) for part in np.array_split(ids, max(2, len(ids) // batch))]
    return rate_of(source.batches(iter(plan), view))


def rate_of(batches: Iterator[Batch], seconds: float = math.inf, started: int = 1, least: int = 0) -> float:
    """Images per second of wall time of batches, from the one of number `started` on: for so many seconds and at least
    so many images, or five times as long. The start, in which workers read ahead, is left out.
    """
    first = list(itertools.islice(batches, started))
    began, took, count = time.perf_counter(), 0.0, 0
    for batch in batches:
        count, took = count + batch.size, time.perf_counter() - began
        if took > seconds and (count >= least or took > 5 * seconds):
            break
    if first and first[0].images.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def step_rate(settings: Any, device: torch.device) -> float:
    """Images per second of forward and backward passes of MAE on batches in memory, without the optimizer."""
    images = min(settings.train.global_batch, STEP_IMAGES if device.type == "cuda" else STEP_IMAGES // 16)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, global_batch=images))
    objective = mae_of(settings).to(device)
    one_step(objective, settings, device)
    return images / min(one_step(objective, settings, device) for _ in range(3))


def advice(rate: float, step: float, core: float, index: ShardIndex, view: View, workers: int | None) -> str:
    """What to change, in a sentence. ``core``: one core's rate; ``workers``: the loader's, None for data in memory."""
    if rate >= ENOUGH * step:
        return f"The loader is fast enough, {rate / step:.1f} times the rate of the step: nothing here needs a change."
    if workers is None:
        return "The data are in memory already; the step waits for the crops, which are computed where it is computed."
    cores = environment.cores()
    needed = int(-(-ENOUGH * step // core))
    if workers < needed <= cores:
        return f"The step waits for data: set machine.workers={needed} (this machine has {cores} cores)."
    sides = [min(stored_size(index.read(i)) or (0, 0)) for i in np.linspace(0, len(index) - 1, 50).astype(int).tolist()]
    wanted = round(min(view.size) * 8 / 7)
    if median(sides) > 1.2 * wanted:
        return (
            f"The step waits for data, and {needed} free cores would be needed: pack the images smaller once, with "
            f"`mae-dist data pack tars --short-side {wanted}` (their shorter side is {median(sides):.0f} pixels now)."
        )
    return (
        f"The step waits for data, and {needed} free cores would be needed: pack the images as raw pixels once, with "
        f"`mae-dist data pack tars --format npy`."
    )
