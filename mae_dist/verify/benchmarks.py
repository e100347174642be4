"""The benchmarks of runs and of model steps in `mae-dist bench`: one function each, from a Runner to a Result.

Runs are measured as a user would see them: processes of their own, read through their metrics.jsonl. Forward and
backward passes alone are measured in this process, without data or optimizer. Variants that are compared take turns,
so that a machine that becomes busy slows down all of them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mae_dist import errors, models, parallel
from mae_dist.batch import Batch
from mae_dist.model_sizes import sides
from mae_dist.objectives.mae import MAE
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import MANIFEST
from mae_dist.verify import bench_open, processes
from mae_dist.verify.measurement import Measurement, Result, Runner

FAR_STEP = 1_000_000
FAR_POSITION = 10**12 // 7


def resume(runner: Runner) -> Result:
    """Seconds from the start of the process to its first step, for a new run, a resumed run, and that run at FAR_STEP.

    The run at FAR_STEP is a copy: its checkpoint is renamed, and its metrics.jsonl is as long as so many steps make it.
    """
    origin, far = runner.new_folder("origin"), runner.new_folder("far")
    time_to_first_step(runner, origin)
    copy_to_far_step(origin, far)
    fill_metrics(far / "metrics.jsonl")
    new, near = "step 0 (a new run)", f"step {processes.reached(origin)} (resumed)"
    there = f"step {FAR_STEP:,} (resumed)"
    seconds: dict[str, list[float]] = {new: [], near: [], there: []}
    for number in range(runner.options["rounds"]):
        for name, template in ((new, None), (near, origin), (there, far)):
            run = runner.new_folder("run")
            if template is not None:
                shutil.copytree(template, run)
            seconds[name].append(time_to_first_step(runner, run))
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    middle = {name: median(values) for name, values in seconds.items()}
    measurements = [Measurement(f"time to the first step, from {name}", value, "s") for name, value in middle.items()]
    measurements += [
        Measurement("ratio to a new run", middle[there] / middle[new], at_most=1.1),
        Measurement("ratio to a resume near the start", middle[there] / middle[near]),
    ]
    return Result("time until a run trains again", measurements, {"seconds": seconds})


def time_to_first_step(runner: Runner, run: Path) -> float:
    """Seconds from the start of a process until its first step is in metrics.jsonl; the run is stopped then."""
    before = max([0, *(int(path.name.removeprefix("step-")) for path in RunDir(run).checkpoints())])
    began = time.perf_counter()
    with runner.start(run) as process:
        arrived = processes.wait_for_step(process, run, before + 1)
        seconds = time.perf_counter() - began
        if arrived:
            process.terminate()
        runner.finish(process, errors.STOPPED)
    return seconds


def copy_to_far_step(origin: Path, run: Path) -> None:
    """Copy the run `origin` to `run` and rename its only checkpoint to that of FAR_STEP."""
    shutil.copytree(origin, run)
    (saved,) = RunDir(run).checkpoints()
    manifest = json.loads((saved / MANIFEST).read_text()) | {"step": FAR_STEP}
    (saved / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    saved.rename(saved.with_name(f"step-{FAR_STEP:09d}"))


def fill_metrics(path: Path) -> None:
    """Repeat the first line of a metrics.jsonl for each step up to FAR_STEP."""
    first = json.loads(path.read_text().splitlines()[0])
    before, after = json.dumps(first | {"step": "STEP"}).split('"STEP"')
    with path.open("w") as stream:
        stream.writelines(f"{before}{step}{after}\n" for step in range(1, FAR_STEP + 1))


def order(runner: Runner) -> Result:
    """Memory and time to the first batch of the order of samples over many shards, in new processes."""
    window, batch = runner.settings.data.shuffle_window, runner.settings.train.global_batch
    found: dict[int, list[dict[str, float]]] = {0: [], FAR_POSITION: []}
    for _ in range(runner.options["rounds"]):
        for position, costs in found.items():
            numbers = (runner.options["samples"], runner.options["shards"], window, position, batch)
            costs.append(_costs("bench_order", *numbers))
    measurements = []
    for position, costs in found.items():
        middle = {name: median(cost[name] for cost in costs) for name in costs[0]}
        where = f"at position {position:,}"
        measurements += [
            Measurement(f"first batch {where}", middle["seconds"], "s", at_most=1.0),
            Measurement(f"resident memory {where}", middle["resident_mb"], "MB", at_most=300.0),
            Measurement("of which not Python and NumPy", middle["increase_mb"], "MB"),
        ]
    first, far = (median(cost["seconds"] for cost in costs) for costs in found.values())
    measurements.append(Measurement("time, far / first", far / first))
    title = f"{runner.options['samples']:,} samples in {runner.options['shards']:,} shards"
    return Result(title, measurements, {"by_position": found})


def _costs(module: str, *words: object) -> dict[str, float]:
    """What a module of this package measures in a new process."""
    command = [sys.executable, "-m", f"mae_dist.verify.{module}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{module} {' '.join(map(str, words))}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def opening(runner: Runner) -> Result:
    """Memory and time of opening a data set of many tars, in new processes."""
    num_samples, num_shards = (runner.options[name] for name in ("samples", "shards"))
    folder = runner.new_folder("shards")
    try:
        bench_open.simulate(folder, num_samples, num_shards)
        costs = [_costs("bench_open", folder) for _ in range(runner.options["rounds"])]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    middle = {name: median(cost[name] for cost in costs) for name in costs[0]}
    measurements = [
        Measurement("opened in", middle["seconds"], "s", at_most=2.0),
        Measurement("of which the processor computed", middle["cpu_seconds"], "s"),
        Measurement("resident memory", middle["resident_mb"], "MB", at_most=300.0),
    ]
    return Result(f"{num_samples:,} samples in {num_shards:,} shards", measurements, {"rounds": costs})


def save(runner: Runner) -> Result:
    """Seconds of a step while a checkpoint is written in the background, and while none is."""
    run, cores = runner.new_folder("run"), os.cpu_count() or 1
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, cores - 1))}
    with runner.start(run, **threads) as process:
        runner.finish(process, 0)
    records, batch = runner.records(run), runner.settings.train.global_batch
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for record in records:  # a line with a stall is the first after a save began, which may have ended within it
        seconds["saving" in record or "stall" in record].append(batch / record["images_per_second"])
    writing, quiet = seconds[True], seconds[False]
    if not writing or not quiet:
        raise ValueError(
            f"{len(writing)} steps were made during a save and {len(quiet)} outside, but both are needed: give more "
            f"train.steps, and a checkpoint.every that is longer than a save"
        )
    size = sum(file.stat().st_size for file in RunDir(run).checkpoints()[-1].iterdir()) / 1e6
    measurements = [
        Measurement("size of a checkpoint", size, "MB"),
        Measurement(f"step while none is written (median of {len(quiet)})", median(quiet), "s"),
        Measurement(f"step while one is written (median of {len(writing)})", median(writing), "s"),
        Measurement("ratio", median(writing) / median(quiet), at_most=1.1),
    ]
    if stalls := [record["stall"] for record in records if "stall" in record]:
        what = f"stall of the step that starts a save (median of {len(stalls)})"
        measurements.append(Measurement(what, median(stalls), "s"))
    raw = {"quiet": quiet, "writing": writing, "stall": stalls}
    return Result("cost of a checkpoint for the steps during its save", measurements, raw)


def scaling(runner: Runner) -> Result:
    """Images per second of several ranks and of one process, at one global batch; on CPUs with as many cores."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus == 1:
        raise ValueError("bench scaling: this machine has one GPU; two or more are needed")
    ranks = gpus or 2
    parts = {
        "1 process": (["machine.processes=1"], ranks),
        f"DDP, {ranks} ranks": ([f"machine.processes={ranks}", "machine.strategy=ddp"], 1),
        f"FSDP2, {ranks} ranks": ([f"machine.processes={ranks}", "machine.strategy=fsdp"], 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(runner.options["rounds"]):
        for name, (words, threads) in parts.items():
            run = runner.new_folder("run")
            with runner.start(run, *words, **({} if gpus else {"OMP_NUM_THREADS": str(threads)})) as process:
                runner.finish(process, 0)
            rates[name].append(median(record["images_per_second"] for record in runner.records(run)))
            print(f"round {number + 1}, {name}: {rates[name][-1]:.0f} images/s", flush=True)
    alone = rates["1 process"]
    measurements = [Measurement(name, median(values), "images/s") for name, values in rates.items()]
    share, what = (ranks, "efficiency of a GPU") if gpus else (1, "ratio on the same cores")
    for name, values in list(rates.items())[1:]:
        by_round = [many / single / share for many, single in zip(values, alone, strict=True)]
        measurements.append(Measurement(f"{name}: {what}, median of {len(by_round)} rounds", median(by_round)))
        measurements.append(Measurement(f"{name}: {what}, best round of each", max(values) / max(alone) / share))
    return Result("several ranks against one process", measurements, {"images_per_second": rates})


GRID = [
    "heads.lars=[0.1,0.3,1,3,10]", "heads.sgd=[0.01,0.03,0.1,0.3,1]", "heads.adamw=[1e-4,3e-4,1e-3,3e-3,1e-2]",
    "heads.features=[cls,mean]",
]  # fmt: skip
"""30 heads."""


def heads(runner: Runner) -> Result:
    """Time of a step, and of the whole command, of a probe with 30 heads and of one with the paper's single head.

    The 30 heads are also trained on stored features (fixed views). The whole command includes its start, the features
    and the evaluation.
    """
    one, many, stored = "one head", "30 heads", "30 heads, stored features"
    variants = {one: [], many: GRID, stored: [*GRID, "view.crop=center", "view.flip=0"]}
    steps: dict[str, list[float]] = {name: [] for name in variants}
    whole: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(runner.options["rounds"]):
        for name, words in variants.items():
            run, began = runner.new_folder("run"), time.perf_counter()
            with runner.start(run, *words) as process:
                runner.finish(process, 0)
            whole[name].append(time.perf_counter() - began)
            rate = median(record["images_per_second"] for record in runner.records(run))
            steps[name].append(runner.settings.train.global_batch / rate)
            took = f"step {steps[name][-1]:.3f} s, whole command {whole[name][-1]:.1f} s"
            print(f"round {number + 1}, {name}: {took}", flush=True)
    measurements = []
    for what, seconds in (("step", steps), ("whole command", whole)):
        measurements += [Measurement(f"{what}, {name}", median(values), "s") for name, values in seconds.items()]
        for name, most in ((many, 1.2), (stored, None)):
            ratio = median(a / b for a, b in zip(seconds[name], seconds[one], strict=True))
            measurements.append(Measurement(f"{what}: {name}, ratio to {one}", ratio, at_most=most))
            best = min(seconds[name]) / min(seconds[one])
            measurements.append(Measurement(f"{what}: {name}, ratio to {one}, best round of each", best))
    return Result("a probe with 30 heads and with one", measurements, {"step": steps, "whole": whole})


def mixer(runner: Runner) -> Result:
    """A step of MAE on a Mixer that drops hidden patches, and on one with a mask token for each."""
    return steps(runner, "hidden=drop", {"hidden": "drop"}, "hidden=token", {"hidden": "token"}, at_most=1 / 2)


def decoder(runner: Runner) -> Result:
    """A step of MAE with a cross-attention decoder of a quarter of the hidden patches, and with the paper's decoder."""
    cross, full = {"decoder": "cross", "predict": 0.25}, {"decoder": "full", "predict": 1.0}
    return steps(runner, "decoder=cross, predict=0.25", cross, "decoder=full", full, at_most=1 / 1.5)


def steps(
    runner: Runner, name: str, mae: dict[str, Any], other: str, other_mae: dict[str, Any], at_most: float
) -> Result:
    """Seconds of a forward and backward pass of a global batch with the fields `mae` and with `other_mae`.

    The two take turns; the ratio is the median of the rounds' ratios. On CPUs, CPU time of one thread is measured, so
    other processes on the machine do not count.
    """
    settings, device = runner.settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    model, objectives = settings.model, {}
    for key, fields in ((name, mae), (other, other_mae)):
        backbone = models.build(model.name, image_size=model.image_size)
        objectives[key] = MAE(backbone, replace(settings.mae, **fields), seed=0).to(device)
    seconds: dict[str, list[float]] = {key: [] for key in objectives}
    for number in range(1 + runner.options["rounds"]):
        for key, objective in objectives.items():
            took = one_step(objective, settings, device)
            if number > 0:  # the first round warms up
                seconds[key].append(took)
                print(f"round {number}, {key}: {took:.2f} s", flush=True)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    measurements = [Measurement(f"step with {key}", median(values), "s") for key, values in seconds.items()]
    measurements += [
        Measurement("ratio", median(ratios), at_most=at_most),
        Measurement("times as fast", 1 / median(ratios)),
    ]
    where = "GPU" if device.type == "cuda" else "one CPU thread"
    title = f"{model.name}, {settings.train.global_batch} images a step, {settings.train.precision}, {where}"
    return Result(title, measurements, {"seconds": seconds})


def one_step(objective: MAE, settings: Any, device: torch.device) -> float:
    """Seconds of a forward and backward pass of a batch of noise."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    backbone = objective.backbone
    batch = noise(settings.train.global_batch, backbone.image_size, device, backbone.channels)
    synchronize(device)
    began = clock()
    with parallel.autocast(settings.train.precision, device):
        loss = objective(batch).loss.mean()
    loss.backward()
    synchronize(device)
    took = clock() - began
    objective.zero_grad()
    return took


def noise(count: int, size: int | tuple[int, int], device: torch.device, channels: int = 3) -> Batch:
    """A batch of noise without labels, on the device; on the meta device with ids on the CPU, where masks are drawn."""
    ids = torch.arange(count, device="cpu" if device.type == "meta" else device)
    images = torch.randn(count, channels, *sides(size), device=device)
    return Batch(images, -torch.ones_like(ids), ids, ids * 0, ids < 0)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
