"""`mae-dist bench step CONFIG.yaml`: what a step of MAE costs, part by part, beside other people's implementations.

Variants take turns, round by round; medians are reported, and how far apart the rounds were. On a CPU the time is that
of one thread, so other processes on the machine do not count. On a GPU a step is one of several that follow each other
without a wait, as in training. The share of the peak is that of the largest rate of matrix products measured here, in
the same precision. The committed table `configs/steps.jsonl` says what it was before.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_dist import cost, devices, dist, forecast, models, optim, parallel
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from mae_dist.cuda_graphs import GraphedPasses
from mae_dist.data.views import View
from mae_dist.forecast import TABLE
from mae_dist.model_sizes import sides
from mae_dist.models import short_attention
from mae_dist.objectives.mae import MAE
from mae_dist.run import jsonl
from mae_dist.verify.benchmarks import noise, synchronize
from mae_dist.verify.measurement import Measurement, Result, Runner
from mae_dist.verify.other_maes import others

SLOWER = 0.95
"""Share of the table's value below which a step counts as slower than it was."""
PEAK_SECONDS = 0.5
"""For which products of matrices are repeated, the fastest of which is taken as the device's peak."""
OWN = ("eager", "compiled", "compiled, short attention, CUDA graph")
"""Variants of our own step."""
MOST_WORK = {"cpu": 5e11, "cuda": 3e13}
"""FLOPs of a step at most, where the command does not give train.global_batch: a recipe's is that of many ranks."""
IN_A_ROW = 10
"""Steps that follow each other without a wait on a GPU, whose mean is a measurement."""
TARGETS = {"vit_b16": 0.95, "vit_ti4": 0.88}
"""Model -> the largest ratio to the faster of the others, eager, in fp32 on one core."""


class Variant(NamedTuple):
    """One implementation: a module, and the loss that it has of a batch. `graphed`: its passes are a CUDA graph."""

    name: str
    module: nn.Module
    loss: Callable[[Batch], Tensor]
    graphed: GraphedPasses | None = None


def step(runner: Runner) -> Result:
    """The measurements of `measure`, compared with the committed table or, with --record, written there."""
    device, settings, options = dist.setup(), runner.settings, runner.options
    if device.type == "cpu":
        torch.set_num_threads(1)
    batch, counted = settings.train.global_batch, cost.of_run(settings)
    most = max(1, int(MOST_WORK[device.type] // counted.training_flops)) if counted else batch
    if batch > most and not any(word.startswith("train.global_batch=") for word in runner.overrides):
        print(f"a step of {most} images instead of the recipe's {batch:,}; train.global_batch=N takes N", flush=True)
        settings = replace(settings, train=replace(settings.train, global_batch=most))
    raw: dict[str, Any] = {}
    found = []
    for row in measure(settings, device, options["rounds"], not options["eager"], raw):
        print(f"{row.name}: {row.value:,.4g} {row.unit}", flush=True)
        found.append(row)
    shares = [key_of(settings, device, name) | {"share": share} for name, share in raw["shares"].items()]
    if options["record"]:
        rows = [row for row in jsonl.read(TABLE) if without_share(row) not in map(without_share, shares)]
        jsonl.write_atomic(TABLE, "".join(json.dumps(row) + "\n" for row in [*rows, *shares]))
    where = "one thread" if device.type == "cpu" else "one GPU"
    model = f"{settings.model.name}, {settings.train.global_batch} images of {settings.model.image_size} px"
    return Result(f"{model}, {settings.train.precision}, {where} of {devices.name_of(device)}", found, raw)


def measure(
    settings: Any, device: torch.device, rounds: int, compiled: bool, raw: dict[str, Any]
) -> Iterator[Measurement]:
    """Rows of a step of `settings`, the most informative first; every single measurement goes into `raw`."""
    images, clock = settings.train.global_batch, time.perf_counter if device.type == "cuda" else time.process_time
    dtype = parallel.DTYPES.get(settings.train.precision, torch.float32)
    peak = devices.measured_peak(device, dtype, PEAK_SECONDS)
    yield Measurement("largest rate of matrix products", peak / 1e9, "GFLOP/s")
    counted = cost.of_run(settings) or cost.Cost()
    yield Measurement("forward and backward, counted", counted.training_flops / 1e9, "GFLOP/image")
    ours = mae_of(settings).to(device)
    update = updating(ours, settings, device)
    batch, found = batch_of(images, settings, device), variants(settings, ours, compiled)
    seconds: dict[str, dict[str, list[float]]] = {}
    raw |= {"seconds": seconds, "peak": peak, "shares": {}}
    for variant in list(found):
        variant.module.to(device)
        warm_up = timed(variant, batch, settings, device, clock)
        if variant.graphed:
            whole_step(variant, batch, settings, device, warm_up)
        seconds[variant.name] = {}
    for _ in range(rounds):
        for variant in found:
            parts = {} if variant.graphed else timed(variant, batch, settings, device, clock)
            parts["step"] = whole_step(variant, batch, settings, device, parts)
            if variant is found[0]:
                parts["update"] = clocked(update, device, clock)
            variant.module.zero_grad()  # gradients of all variants at once may not fit
            for part, value in parts.items():
                seconds[variant.name].setdefault(part, []).append(value)
    yield from rows_of(settings, device, raw, counted.training_flops)
    for name, draw in draws(settings, ours, batch).items():
        draw()
        yield Measurement(f"draw of {name}", 1e3 * median(clocked(draw, device, clock) for _ in range(rounds)), "ms")
    yield from memory_of(found[0], batch, settings, device, counted)
    for part in (images // 2, images // 4):
        if part:
            batch = batch_of(part, settings, device)
            found[0].module.zero_grad()
            each = (timed(found[0], batch, settings, device, clock) for _ in range(1 + rounds))
            took = median(whole_step(found[0], batch, settings, device, parts) for parts in each)
            yield Measurement(f"eager, {part} at once", part / took, "images/s")


def rows_of(settings: Any, device: torch.device, raw: dict[str, Any], flops: int) -> Iterator[Measurement]:
    """What follows from the seconds of all variants: rates, shares of the peak, ratios, and the parts of our step."""
    images, seconds, peak = settings.train.global_batch, raw["seconds"], raw["peak"]
    known = {json.dumps(without_share(row)): row["share"] for row in jsonl.read(TABLE) if "share" in row}
    whole = {name: parts["step"] for name, parts in seconds.items()}
    own = [name for name in whole if name in OWN]
    for name, values in whole.items():
        took = median(values)
        yield Measurement(f"{name}: forward and backward", images / took, "images/s")
        if len(values) > 1:
            yield Measurement(f"{name}: spread of {len(values)} rounds", 100 * (max(values) - min(values)) / took, "%")
        if name in own:
            share = flops * images / took / peak
            raw["shares"][name] = round(share, 4)
            before = known.get(json.dumps(key_of(settings, device, name)))
            yield Measurement(f"{name}: of the peak", share, at_least=before and SLOWER * before)
    rivals = [name for name in whole if name not in own]
    for name in own:
        ratios = {r: median(a / b for a, b in zip(whole[name], whole[r], strict=True)) for r in rivals}
        target = TARGETS.get(settings.model.name) if (name, device.type) == ("eager", "cpu") else None
        for rival, ratio in ratios.items():
            bound = target if ratio == max(ratios.values()) else None
            yield Measurement(f"{name}: time as a share of that of {rival}", ratio, at_most=bound)
        for part, values in seconds[name].items():
            if part not in ("step", "host") or device.type == "cuda":
                yield Measurement(f"{name}: {part}", 1e3 * median(values), "ms")


def variants(settings: Any, ours: MAE, compiled: bool) -> list[Variant]:
    """Ours first, eager and, where asked for, with compiled blocks; then the others."""
    device = next(ours.parameters()).device
    eager, with_blocks, with_all = OWN
    found = [Variant(eager, ours, lambda batch: ours(batch).loss.mean())]
    if compiled:
        blocks = copy.deepcopy(ours)
        parallel.compile_blocks(blocks, is_sharded=False)
        found.append(Variant(with_blocks, blocks, lambda batch: blocks(batch).loss.mean()))
        if device.type == "cuda":
            found.append(graphed(with_all, ours, settings, device))
    with device:  # made there: a large model takes a CPU seconds
        theirs = list(others(settings))
    for name, module, loss in theirs:
        found.append(Variant(name, module, lambda batch, loss=loss: loss(batch.images)))
    return found


def graphed(name: str, ours: MAE, settings: Any, device: torch.device) -> Variant:
    """Our step with all that machine.* has for a GPU."""
    module = copy.deepcopy(ours)
    if short_attention.fits(device):
        parallel.use_short_attention(module)
    parallel.compile_blocks(module, is_sharded=False)
    plain = Variant(name, module, lambda batch: module(batch).loss.mean())
    graphs = GraphedPasses(partial(passes, plain, settings, device), module, list(module.parameters()))
    return plain._replace(graphed=graphs)


def timed(
    variant: Variant, batch: Batch, settings: Any, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of the forward and of the backward pass, and of both those until the host had launched all of it."""
    variant.module.zero_grad()
    synchronize(device)
    began = clock()
    with parallel.autocast(settings.train.precision, device):
        loss = variant.loss(batch)
    launched = clock()
    synchronize(device)
    middle = clock()
    loss.backward()
    host = launched - began + clock() - middle
    synchronize(device)
    return {"forward": middle - began, "backward": clock() - middle, "host": host}


def whole_step(
    variant: Variant, batch: Batch, settings: Any, device: torch.device, parts: dict[str, float]
) -> float:  # fmt: skip
    """Seconds of a forward and backward pass: the sum of those in `parts`, or on a GPU, where the host runs ahead, the
    mean of several passes in a row.
    """
    if device.type == "cpu":
        return parts["forward"] + parts["backward"]

    def in_a_row() -> None:
        for _ in range(IN_A_ROW):
            variant.module.zero_grad()
            variant.graphed(batch) if variant.graphed else passes(variant, settings, device, batch)

    return clocked(in_a_row, device, time.perf_counter) / IN_A_ROW


def passes(variant: Variant, settings: Any, device: torch.device, batch: Batch) -> Tensor:
    """A forward and backward pass; the loss."""
    with parallel.autocast(settings.train.precision, device):
        loss = variant.loss(batch)
    loss.backward()
    return loss.detach()


def clocked(action: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of an action, the device's work included."""
    synchronize(device)
    began = clock()
    action()
    synchronize(device)
    return clock() - began


def mae_of(settings: Any) -> MAE:
    """The MAE of a run's settings, on the CPU or on the device of the context."""
    model = settings.model
    backbone = models.build(model.name, image_size=model.image_size, channels=settings.data.channels or 3)
    return MAE(backbone, settings.mae, seed=0)


def batch_of(images: int, settings: Any, device: torch.device) -> Batch:
    return noise(images, settings.model.image_size, device, settings.data.channels or 3)


def updating(objective: MAE, settings: Any, device: torch.device) -> Callable[[], object]:
    """A function that updates an objective by the gradients that it has."""
    groups = optim.param_groups(objective, settings.optim, objective.backbone.depth, no_decay_tokens=False)
    optimizer = optim.build(settings.optim, groups)
    optim.init_optimizer_state(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scale = optim.LossScale(device, enabled=False)
    return lambda: optim.update(optimizer, trained, parallel.gradient_norm(trained), settings.train.clip_grad, scale)


def draws(settings: Any, ours: MAE, batch: Batch) -> dict[str, Callable[[], object]]:
    """What a step draws at random on the device."""
    view = View(settings.view, settings.model.image_size, IMAGENET_MEAN, IMAGENET_STD, seed=0, training=True)
    sizes = torch.tensor([sides(settings.model.image_size)], device=batch.ids.device).expand(batch.size, 2)
    return {"masks": lambda: ours.mask(batch), "crops": lambda: view.boxes(batch.epochs, batch.ids, sizes)}


def memory_of(
    variant: Variant, batch: Batch, settings: Any, device: torch.device, counted: cost.Cost
) -> Iterator[Measurement]:
    """The most memory that a forward and backward pass takes on a GPU; on a CPU what autograd keeps, counted."""
    if device.type == "cpu":
        yield Measurement("kept for the backward pass, counted", batch.size * counted.activations / 1e9, "GB")
        return
    torch.cuda.reset_peak_memory_stats(device)
    timed(variant, batch, settings, device, time.perf_counter)
    yield Measurement("most memory", torch.cuda.max_memory_allocated(device) / 1e9, "GB")


def key_of(settings: Any, device: torch.device, variant: str) -> dict[str, Any]:
    """What a row of the table is for."""
    known = {"device": devices.name_of(device)} | forecast.row_key(settings)
    return known | {
        "images": settings.train.global_batch, "precision": settings.train.precision, "variant": variant
    }  # fmt: skip


def without_share(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "share"}
