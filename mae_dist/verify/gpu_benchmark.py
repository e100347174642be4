"""`mae-dist bench gpu [DATA]`: what to measure first on a machine with a GPU, in a few minutes.

The parts run one after another, the most informative first, until the time is used up. Every value is appended to
rows.jsonl in the bench's folder as soon as it is known, so a command that is cut off loses nothing; a part that fails
is named there with the reason, and the others go on. Without a GPU what a CPU can do runs with a tiny model, to try it.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mae_dist import devices, dist, parallel
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.data import loader
from mae_dist.data.index import open_split
from mae_dist.data.views import View
from mae_dist.run import jsonl
from mae_dist.verify import data_benchmark, processes, step_benchmark
from mae_dist.verify.benchmarks import noise
from mae_dist.verify.measurement import Measurement, Result, Runner

PAPER = (512, 8, 16)
"""Width, depth and heads of the decoder (He et al. 2022, table 8)."""
MODELS = {
    "vit_l16": (224, 256, PAPER), "vit_b16": (224, 512, PAPER), "vit_h14": (224, 192, PAPER),
    "vit_ti2": (32, 1024, (192, 4, 3)),
}  # fmt: skip
"""Model -> (pixels a side, images at once, decoder), as in the recipes of configs/."""
TINY = {"vit_demo4": (32, 8, (32, 1, 4))}
RESIDENT_IMAGES = 2000
TEST_SECONDS = 180.0
TRIED = (RuntimeError, ImportError, ValueError, OSError, subprocess.SubprocessError)
"""Errors of a part after which the others go on; running out of memory is a RuntimeError."""


def gpu(runner: Runner) -> Result:
    """Steps of models against the peak, a step without a wait, loading, and the tests for GPUs."""
    device, rows = dist.setup(), runner.folder / "rows.jsonl"
    runner = runner if device.type == "cuda" else dataclasses.replace(runner, settings=tiny(runner.settings))
    rows.unlink(missing_ok=True)
    deadline, found = time.monotonic() + 60 * runner.options["minutes"], []
    for name, part in parts(runner, device).items():
        began, reason = time.monotonic(), ""
        if began > deadline:
            reason = f"the {runner.options['minutes']} minutes were used up"
        else:
            try:
                for row in part():
                    found.append(row)
                    jsonl.append(rows, {"part": name, **dataclasses.asdict(row)})
                    print(f"{row.name}: {row.value:,.4g} {row.unit}", flush=True)
            except TRIED as error:
                reason = str(error).partition("\n")[0]
        if reason:
            jsonl.append(rows, {"part": name, "left_out": reason})
            print(f"left out: {name} ({reason})", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Result(f"{devices.name_of(device)}, {runner.settings.train.precision}", found, {"rows": str(rows)})


def tiny(settings: Any) -> Any:
    """Settings that any CPU computes in seconds."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision="fp32"))
    return sized(settings, "vit_demo4", TINY["vit_demo4"])


def parts(runner: Runner, device: torch.device) -> dict[str, Callable[[], Iterator[Measurement]]]:
    """Name of a part -> its measurements, which are made while they are iterated over."""
    settings, sizes = runner.settings, MODELS if device.type == "cuda" else TINY
    first, *others = sizes
    found: dict[str, Callable[[], Iterator[Measurement]]] = {}
    for name in (first, *others):
        of_size = sized(settings, name, sizes[name])
        found[name] = partial(steps, of_size, device, runner.options["rounds"])
        if name == first:
            found["step without a wait"] = partial(quiet_step, of_size, device)
            found["loading"] = partial(loading, runner)
            found["images in memory"] = partial(resident, runner, device)
            if device.type == "cuda":
                found["tests for GPUs"] = partial(gpu_tests, runner.folder / "tests.log")
    return found


def sized(settings: Any, name: str, size: tuple[int, int, tuple[int, int, int]]) -> Any:
    """Settings with another model and its `size`, as in MODELS."""
    side, images, (dim, depth, heads) = size
    model = dataclasses.replace(settings.model, name=name, image_size=side)
    train = dataclasses.replace(settings.train, global_batch=images)
    mae = dataclasses.replace(settings.mae, decoder_dim=dim, decoder_depth=depth, decoder_heads=heads)
    return dataclasses.replace(settings, model=model, train=train, mae=mae)


def steps(settings: Any, device: torch.device, rounds: int) -> Iterator[Measurement]:
    """The rows of `bench step` for a model, compiled too where there is a GPU."""
    model, images = settings.model, settings.train.global_batch
    for row in step_benchmark.measure(settings, device, rounds, device.type == "cuda", {}):
        yield dataclasses.replace(row, name=f"{model.name}, {images} images of {model.image_size} px: {row.name}")


def quiet_step(settings: Any, device: torch.device) -> Iterator[Measurement]:
    """A forward and backward pass and an update with torch's check that the host waits for nothing.

    The row counts the waits: 0, or this part fails with the first one. Without a GPU nothing is checked.
    """
    objective = step_benchmark.mae_of(settings).to(device)
    update = step_benchmark.updating(objective, settings, device)
    batch = noise(settings.train.global_batch, settings.model.image_size, device)

    def step() -> None:
        with parallel.autocast(settings.train.precision, device):
            loss = objective(batch).loss.mean()
        loss.backward()
        update()

    step()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield Measurement("waits of the host in a step", 0, at_most=0)


def loading(runner: Runner) -> Iterator[Measurement]:
    """The measurements of `bench data` on the data of the command line."""
    yield from data_benchmark.data(runner).measurements


def resident(runner: Runner, device: torch.device) -> Iterator[Measurement]:
    """Batches of images of 32 px that the device holds, shifted, and as resized crops."""
    folder = runner.folder / "images"
    processes.embedded_data(folder, RESIDENT_IMAGES)
    index = open_split(str(folder), "train")
    source, ids = loader.open_source(index, device, 0), np.arange(4 * len(index), dtype=np.int64) % len(index)
    for crop in ("pad", "resized"):
        settings = dataclasses.replace(runner.settings.view, crop=crop, pad=4)
        view = View(settings, 32, IMAGENET_MEAN, IMAGENET_STD, seed=0, training=True)
        rate = median(data_benchmark.loader_rate(source, view, ids, 256) for _ in range(runner.options["rounds"]))
        yield Measurement(f"images in memory, view.crop={crop}", rate, "images/s")


def gpu_tests(log: Path) -> Iterator[Measurement]:
    """The exit status of the tests that need a GPU, where this package lies in a clone."""
    tests = Path(__file__).parents[2] / "tests"
    if not tests.is_dir():
        raise ValueError(f"{tests}: no such folder; the tests are in a clone of the repository only")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(tests)]
    with log.open("wb") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=stream, timeout=TEST_SECONDS, check=False, cwd=tests.parent
        )
    yield Measurement(f"exit status of the tests for GPUs ({processes.last_line(log)})", done.returncode, at_most=0)
