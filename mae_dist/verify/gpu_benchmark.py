"""`mae-dist bench gpu [DATA]`: what to measure first on a machine with a GPU, in a few minutes.

The parts run one after another, the most informative first, until the time is used up. Every value is appended to
rows.jsonl in the bench's folder as soon as it is known, so a command that is cut off loses nothing; a part that fails
is named there with the reason, and the others go on. Without a GPU what a CPU can do runs with a tiny model, to try it.
"""

from __future__ import annotations

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

from mae_dist import cost, dist, models, optim, parallel
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.data import loader
from mae_dist.data.index import open_split
from mae_dist.data.views import View
from mae_dist.model_sizes import size_of
from mae_dist.objectives.mae import MAE
from mae_dist.run import jsonl
from mae_dist.verify import data_benchmark, processes
from mae_dist.verify.benchmarks import noise, one_step, synchronize
from mae_dist.verify.measurement import Measurement, Result, Runner

MODELS = {"vit_b16": (224, 256), "vit_l16": (224, 128), "vit_h14": (224, 64), "vit_ti2": (32, 256)}
"""Model -> (pixels a side, images at once)."""
TINY = {"vit_demo4": (32, 8)}
MATRIX, TINY_MATRIX = 8192, 512
"""Side of the square matrices whose product is taken as the device's peak."""
RESIDENT_IMAGES = 2000
TEST_SECONDS = 180.0
TRIED = (RuntimeError, ImportError, ValueError, OSError, subprocess.SubprocessError)
"""Errors of a part after which the others go on; running out of memory is a RuntimeError."""


def gpu(runner: Runner) -> Result:
    """Matrix products, steps of models against the peak, a step without a wait, loading, and the tests for GPUs."""
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
    return Result(f"{device_name(device)}, {runner.settings.train.precision}", found, {"rows": str(rows)})


def tiny(settings: Any) -> Any:
    """Settings that any CPU computes in seconds."""
    mae = dataclasses.replace(settings.mae, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    train = dataclasses.replace(settings.train, precision="fp32")
    return sized(dataclasses.replace(settings, mae=mae, train=train), "vit_demo4", *TINY["vit_demo4"])


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parts(runner: Runner, device: torch.device) -> dict[str, Callable[[], Iterator[Measurement]]]:
    """Name of a part -> its measurements, which are made while they are iterated over."""
    settings, sizes = runner.settings, MODELS if device.type == "cuda" else TINY
    first, *others = sizes
    peak = Peak(device, settings.train.precision)
    found: dict[str, Callable[[], Iterator[Measurement]]] = {"matrix product": peak.measure}
    for name in (first, *others):
        for compiled in (False, True) if device.type == "cuda" else (False,):
            found[f"{name}, {'compiled' if compiled else 'eager'}"] = partial(
                steps, settings, name, *sizes[name], compiled, peak, device, runner.options["rounds"]
            )
        if name == first:
            found["step without a wait"] = partial(quiet_step, settings, name, *sizes[name], device)
            found["another implementation"] = partial(
                other, settings, name, *sizes[name], device, runner.options["rounds"]
            )
            found["loading"] = partial(loading, runner)
            found["images in memory"] = partial(resident, runner, device)
            if device.type == "cuda":
                found["tests for GPUs"] = partial(gpu_tests, runner.folder / "tests.log")
    return found


class Peak:
    """The rate of a large matrix product in a precision, in FLOP/s; measured once, 0 before."""

    def __init__(self, device: torch.device, precision: str):
        self.device, self.kind, self.flops = device, parallel.DTYPES.get(precision, torch.float32), 0.0

    def measure(self) -> Iterator[Measurement]:
        """Time products of square matrices; the best of ten is the peak."""
        side = MATRIX if self.device.type == "cuda" else TINY_MATRIX
        a = torch.randn(side, side, device=self.device, dtype=self.kind)
        self.flops = 2 * side**3 / min(clocked(lambda: a @ a, self.device) for _ in range(10))
        yield Measurement(f"matrix product of {side} x {side}", self.flops / 1e12, "TFLOP/s")


def clocked(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def sized(settings: Any, name: str, side: int, images: int) -> Any:
    """Settings with another model and batch."""
    model = dataclasses.replace(settings.model, name=name, image_size=side)
    train = dataclasses.replace(settings.train, global_batch=images)
    return dataclasses.replace(settings, model=model, train=train)


def steps(
    settings: Any, name: str, side: int, images: int, compiled: bool, peak: Peak, device: torch.device, rounds: int
) -> Iterator[Measurement]:
    """Forward and backward passes of MAE: images/s, share of the peak, and memory; then the optimizer's update."""
    settings = sized(settings, name, side, images)
    objective = MAE(models.build(name, image_size=side), settings.mae, seed=0).to(device)
    if compiled:
        for block in parallel.blocks_of(objective):
            block.compile()
    for _ in range(3):
        one_step(objective, settings, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median(one_step(objective, settings, device) for _ in range(3 * rounds))
    what = f"{name}, {'compiled' if compiled else 'eager'}, {images} images of {side} px"
    yield Measurement(f"{what}: forward and backward", images / seconds, "images/s")
    image = cost.pretraining(name, settings.mae, side)
    if peak.flops and image:
        yield Measurement(f"{what}: of the peak", 100 * image.training_flops * images / seconds / peak.flops, "%")
    if device.type == "cuda":
        yield Measurement(f"{what}: memory", torch.cuda.max_memory_allocated(device) / 1e9, "GB")
    if not compiled:
        update = updating(objective, settings, device)
        seconds = median(clocked(update, device) for _ in range(3 * rounds))
        yield Measurement(f"{name}: update of the optimizer", 1e3 * seconds, "ms")


def updating(objective: MAE, settings: Any, device: torch.device) -> Callable[[], object]:
    """A function that updates an objective with gradients of zeros."""
    optimizer = optim.build(
        settings.optim, optim.param_groups(objective, settings.optim, objective.backbone.depth, True)
    )
    optim.init_optimizer_state(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scale = optim.LossScale(device, enabled=False)

    def update() -> None:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optim.update(optimizer, trained, parallel.gradient_norm(trained), settings.train.clip_grad, scale)

    return update


def quiet_step(settings: Any, name: str, side: int, images: int, device: torch.device) -> Iterator[Measurement]:
    """A forward and backward pass and an update with torch's check that the host waits for nothing.

    The row counts the waits: 0, or this part fails with the first one. Without a GPU nothing is checked.
    """
    settings = sized(settings, name, side, images)
    objective = MAE(models.build(name, image_size=side), settings.mae, seed=0).to(device)
    update, batch = updating(objective, settings, device), noise(images, side, device)

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


def other(settings: Any, name: str, side: int, images: int, device: torch.device, rounds: int) -> Iterator[Measurement]:
    """Forward and backward passes of transformers' ViTMAE of the size of a model of ours, eager."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size, mae = size_of(name), settings.mae
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=size["dim"], num_hidden_layers=size["depth"], num_attention_heads=size["num_heads"],
            intermediate_size=4 * size["dim"], image_size=side, patch_size=size["patch"], mask_ratio=mae.mask_ratio,
            decoder_num_attention_heads=mae.decoder_heads, decoder_hidden_size=mae.decoder_dim,
            decoder_num_hidden_layers=mae.decoder_depth, decoder_intermediate_size=4 * mae.decoder_dim,
        )
    )  # fmt: skip
    torch.nn.Module.to(theirs, device)
    pixels = noise(images, side, device).images

    def step() -> None:
        with parallel.autocast(settings.train.precision, device):
            loss = theirs(pixels).loss
        loss.backward()
        theirs.zero_grad()

    for _ in range(3):
        step()
    seconds = median(clocked(step, device) for _ in range(3 * rounds))
    yield Measurement(f"transformers' ViTMAE as {name}, eager: forward and backward", images / seconds, "images/s")


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
