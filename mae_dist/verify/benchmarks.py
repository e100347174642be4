"""What `mae-dist bench` measures: one function a bench, Task -> Report.

Runs are measured as a user would see them: processes of their own, read through their metrics.jsonl. A model's steps
alone are measured here, without data or optimizer. Things that are compared take turns, so that a machine that grows
busy slows down both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mae_dist import models, parallel, signals
from mae_dist.batch import Batch
from mae_dist.objectives.mae import MAE
from mae_dist.run import tracker
from mae_dist.run.checkpoint import MANIFEST
from mae_dist.run.directory import RunDir
from mae_dist.verify import processes

FAR_STEP = 1_000_000
FAR_POSITION = 10**12 // 7
WARM_UP = 5
"""Steps at the start of a run that count for no speed."""


@dataclass(frozen=True)
class Measure:
    """One row of the table: what was measured, and the value that it should not exceed, if there is one."""

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None


@dataclass(frozen=True)
class Report:
    """What a bench found; `samples` are all single measurements by name."""

    title: str
    measures: list[Measure]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a bench is given: a folder, the verb of its runs, their settings as words (all but out=) and read, and its
    options."""

    folder: Path
    verb: str
    words: list[str]
    settings: Any
    sizes: dict[str, int]

    def fresh(self, name: str) -> Path:
        """A folder for a run, without what an earlier bench left there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def start(self, run: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a run into `run`."""
        return processes.start([self.verb, *self.words, *words, f"out={run}"], self.folder / "runs.log", **environment)

    def finish(self, process: subprocess.Popen[bytes], expected: int) -> None:
        """Wait for a run to end as it should (ValueError with its last words when it does not)."""
        if (status := process.wait()) != expected:
            said = processes.last_line(self.folder / "runs.log")
            raise ValueError(f"a run of this bench ended with status {status}, not {expected}: {said}")

    def records(self, run: Path) -> list[dict[str, Any]]:
        """The lines of a run's steps after WARM_UP."""
        return [record for record in tracker.read(run / "metrics.jsonl") if "lr" in record][WARM_UP:]


def resume(task: Task) -> Report:
    """Time from the start of the process to the line of its first step: of a new run, of one that was stopped at once,
    and of that one at FAR_STEP, which its checkpoint is then called, with a metrics.jsonl as so many steps make it.
    """
    origin, far = task.fresh("origin"), task.fresh("far")
    first_line(task, origin)
    fake_position(origin, far)
    fill_metrics(far / "metrics.jsonl")
    new, near, there = (
        "step 0 (a new run)",
        f"step {processes.reached(origin)} (resumed)",
        f"step {FAR_STEP:,} (resumed)",
    )
    seconds: dict[str, list[float]] = {new: [], near: [], there: []}
    for number in range(task.sizes["rounds"]):
        for name, template in ((new, None), (near, origin), (there, far)):
            run = task.fresh("run")
            if template is not None:
                shutil.copytree(template, run)
            seconds[name].append(first_line(task, run))
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    middle = {name: median(values) for name, values in seconds.items()}
    measures = [Measure(f"first step's line, from {name}", value, "s") for name, value in middle.items()]
    measures += [
        Measure("ratio to a new run", middle[there] / middle[new], at_most=1.1),
        Measure("ratio to a resume near the start", middle[there] / middle[near]),
    ]
    return Report("how long a run takes to be at work again", measures, {"seconds": seconds})


def first_line(task: Task, run: Path) -> float:
    """Seconds from the start of a process until its first step is in metrics.jsonl; it is stopped then."""
    before = max([0, *(int(path.name.removeprefix("step-")) for path in RunDir(run).checkpoints())])
    began = time.perf_counter()
    with task.start(run) as process:
        arrived = processes.watch(process, run, before + 1)
        seconds = time.perf_counter() - began
        if arrived:
            process.terminate()
        task.finish(process, signals.REQUEUE)
    return seconds


def fake_position(origin: Path, run: Path) -> None:
    """Copy a run so that its checkpoint is that of FAR_STEP."""
    shutil.copytree(origin, run)
    (saved,) = RunDir(run).checkpoints()
    manifest = json.loads((saved / MANIFEST).read_text()) | {"step": FAR_STEP}
    (saved / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    saved.rename(saved.with_name(f"step-{FAR_STEP:09d}"))


def fill_metrics(path: Path) -> None:
    """Fill metrics.jsonl with its own first line, once for each of the steps up to FAR_STEP."""
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("w") as stream:
        stream.writelines(json.dumps(first | {"step": step}) + "\n" for step in range(1, FAR_STEP + 1))


def order(task: Task) -> Report:
    """Memory, and time to the first batch, of the order of samples over many shards, each time in a new process."""
    window, batch = task.settings.data.shuffle_window, task.settings.train.global_batch
    command = [sys.executable, "-m", "mae_dist.verify.bench_order"]
    found: dict[int, list[dict[str, float]]] = {0: [], FAR_POSITION: []}
    for _ in range(task.sizes["rounds"]):
        for position, costs in found.items():
            numbers = (task.sizes["samples"], task.sizes["shards"], window, position, batch)
            done = subprocess.run([*command, *map(str, numbers)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"order at position {position}: {done.stderr.strip().splitlines()[-1]}")
            costs.append(json.loads(done.stdout))
    measures = []
    for position, costs in found.items():
        middle = {name: median(cost[name] for cost in costs) for name in costs[0]}
        where = f"at position {position:,}"
        measures += [
            Measure(f"first batch {where}", middle["seconds"], "s", at_most=1.0),
            Measure(f"resident memory {where}", middle["resident_mb"], "MB", at_most=300.0),
            Measure("of which not Python and NumPy", middle["increase_mb"], "MB"),
        ]
    first, far = (median(cost["seconds"] for cost in costs) for costs in found.values())
    measures.append(Measure("time, far / first", far / first))
    title = f"{task.sizes['samples']:,} samples in {task.sizes['shards']:,} shards"
    return Report(title, measures, {"by_position": found})


def save(task: Task) -> Report:
    """Time of a step while a checkpoint is being written in the background, and while none is."""
    run, cores = task.fresh("run"), os.cpu_count() or 1
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, cores - 1))}
    with task.start(run, **threads) as process:
        task.finish(process, 0)
    records, batch = task.records(run), task.settings.train.global_batch
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for record in records:  # a line with a stall is the first after a save began, which may have ended within it
        seconds["saving" in record or "stall" in record].append(batch / record["images_per_second"])
    writing, quiet = seconds[True], seconds[False]
    if not writing or not quiet:
        raise ValueError(
            f"{len(writing)} steps were made during a save and {len(quiet)} were not, but both are needed: give more "
            f"train.steps, and a checkpoint.every that is longer than a save"
        )
    size = sum(file.stat().st_size for file in RunDir(run).checkpoints()[-1].iterdir()) / 1e6
    measures = [
        Measure("size of a checkpoint", size, "MB"),
        Measure(f"step while none is written (median of {len(quiet)})", median(quiet), "s"),
        Measure(f"step while one is written (median of {len(writing)})", median(writing), "s"),
        Measure("ratio", median(writing) / median(quiet), at_most=1.1),
    ]
    if stalls := [record["stall"] for record in records if "stall" in record]:
        measures.append(Measure(f"stall of the step that starts a save (median of {len(stalls)})", median(stalls), "s"))
    return Report(
        "what a checkpoint costs the steps beside it", measures, {"quiet": quiet, "writing": writing, "stall": stalls}
    )


def scaling(task: Task) -> Report:
    """Images a second of several ranks against one process: the same global batch, on CPUs the same cores."""
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
    for number in range(task.sizes["rounds"]):
        for name, (words, threads) in parts.items():
            run = task.fresh("run")
            with task.start(run, *words, **({} if gpus else {"OMP_NUM_THREADS": str(threads)})) as process:
                task.finish(process, 0)
            rates[name].append(median(record["images_per_second"] for record in task.records(run)))
            print(f"round {number + 1}, {name}: {rates[name][-1]:.0f} images/s", flush=True)
    alone = rates["1 process"]
    measures = [Measure(name, median(values), "images/s") for name, values in rates.items()]
    share, what = (ranks, "efficiency of a GPU") if gpus else (1, "ratio on the same cores")
    for name, values in list(rates.items())[1:]:
        by_round = [many / single / share for many, single in zip(values, alone, strict=True)]
        measures.append(Measure(f"{name}: {what}, median of {len(by_round)} rounds", median(by_round)))
        measures.append(Measure(f"{name}: {what}, best round of each", max(values) / max(alone) / share))
    return Report("several ranks against one process", measures, {"images_per_second": rates})


GRID = [
    "heads.lars=[0.1,0.3,1,3,10]", "heads.sgd=[0.01,0.03,0.1,0.3,1]", "heads.adamw=[1e-4,3e-4,1e-3,3e-3,1e-2]",
    "heads.features=[cls,mean]",
]  # fmt: skip
"""A board of 30 heads."""


def board(task: Task) -> Report:
    """Time of a probe board of 30 heads, on images shown anew in each epoch and on features kept on disk, against one
    head trained the paper's way: of a step, and of the whole command with its start, features and evaluation.
    """
    one, many, kept = "one head", "30 heads", "30 heads, features kept"
    variants = {one: [], many: GRID, kept: [*GRID, "view.crop=center", "view.flip=0"]}
    steps: dict[str, list[float]] = {name: [] for name in variants}
    whole: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(task.sizes["rounds"]):
        for name, words in variants.items():
            run, began = task.fresh("run"), time.perf_counter()
            with task.start(run, *words) as process:
                task.finish(process, 0)
            whole[name].append(time.perf_counter() - began)
            rate = median(record["images_per_second"] for record in task.records(run))
            steps[name].append(task.settings.train.global_batch / rate)
            took = f"step {steps[name][-1]:.3f} s, whole command {whole[name][-1]:.1f} s"
            print(f"round {number + 1}, {name}: {took}", flush=True)
    measures = []
    for what, seconds in (("step", steps), ("whole command", whole)):
        measures += [Measure(f"{what}, {name}", median(values), "s") for name, values in seconds.items()]
        for name, most in ((many, 1.2), (kept, None)):
            ratio = median(a / b for a, b in zip(seconds[name], seconds[one], strict=True))
            measures.append(Measure(f"{what}: {name}, ratio to {one}", ratio, at_most=most))
            best = min(seconds[name]) / min(seconds[one])
            measures.append(Measure(f"{what}: {name}, ratio to {one}, best round of each", best))
    return Report("a probe board against one probe", measures, {"step": steps, "whole": whole})


def mixer(task: Task) -> Report:
    """A step of MAE on a Mixer with hidden patches absent against one with a token in their places."""
    return steps(task, "hidden=drop", {"hidden": "drop"}, "hidden=token", {"hidden": "token"}, at_most=1 / 2)


def decoder(task: Task) -> Report:
    """A step of MAE with the cross-attention decoder of a quarter of the hidden patches against the paper's decoder."""
    cross, full = {"decoder": "cross", "predict": 0.25}, {"decoder": "full", "predict": 1.0}
    return steps(task, "decoder=cross, predict=0.25", cross, "decoder=full", full, at_most=1 / 1.5)


def steps(task: Task, name: str, mae: dict[str, Any], other: str, other_mae: dict[str, Any], at_most: float) -> Report:
    """Seconds of a forward and backward pass of `train.global_batch` images with these fields of `mae` and with others,
    in turns. The ratio is the median of the rounds' ratios. On CPUs one thread's own time is taken: others' work on the
    machine does not count.
    """
    settings, device = task.settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    model, objectives = settings.model, {}
    for key, fields in ((name, mae), (other, other_mae)):
        backbone = models.build(model.name, image_size=model.image_size)
        objectives[key] = MAE(backbone, replace(settings.mae, **fields), seed=0).to(device)
    seconds: dict[str, list[float]] = {key: [] for key in objectives}
    for number in range(1 + task.sizes["rounds"]):
        for key, objective in objectives.items():
            took = one_step(objective, settings, device)
            if number > 0:  # the first round warms up
                seconds[key].append(took)
                print(f"round {number}, {key}: {took:.2f} s", flush=True)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    measures = [Measure(f"step with {key}", median(values), "s") for key, values in seconds.items()]
    measures += [Measure("ratio", median(ratios), at_most=at_most), Measure("times as fast", 1 / median(ratios))]
    where = "GPU" if device.type == "cuda" else "one CPU thread"
    title = f"{model.name}, {settings.train.global_batch} images a step, {settings.train.precision}, {where}"
    return Report(title, measures, {"seconds": seconds})


def one_step(objective: MAE, settings: Any, device: torch.device) -> float:
    """Seconds that forward and backward pass of a batch of noise take."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ids, side = torch.arange(settings.train.global_batch, device=device), settings.model.image_size
    batch = Batch(torch.randn(len(ids), 3, side, side, device=device), -torch.ones_like(ids), ids, ids * 0, ids < 0)
    finish(device)
    began = clock()
    with parallel.autocast(settings.train.precision, device):
        loss = objective(batch).loss.mean()
    loss.backward()
    finish(device)
    took = clock() - began
    objective.zero_grad()
    return took


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Bench:
    """A bench: its function, a line about it, its settings, its options (default, help), whether it trains, and the
    verb of its runs."""

    measure: Callable[[Task], Report]
    text: str
    options: dict[str, tuple[int, str]]
    settings: list[str] = field(default_factory=list)
    trains: bool = True
    verb: str = "pretrain"


AT_224 = ["model.image_size=224", "train.global_batch=4"]
ROUNDS = {"rounds": (3, "how often each is measured; medians are reported")}
BENCHES = {
    "resume": Bench(
        resume, f"time to the first step of a run at step {FAR_STEP:,} against a new one", ROUNDS,
        ["train.steps=2000000", "machine.processes=1"],
    ),
    "order": Bench(
        order, "memory and start-up time of the order of samples",
        ROUNDS | {"samples": (10**9, "samples"), "shards": (10**5, "shards")}, trains=False,
    ),
    "save": Bench(
        save, "time of a step while a checkpoint is written in the background against a quiet step", {},
        ["model.name=vit_s4", "train.steps=80", "checkpoint.every=10", "machine.processes=1"],
    ),
    "scaling": Bench(
        scaling, "images per second of several ranks against one process", ROUNDS,
        ["model.name=vit_ti4", "train.global_batch=64", "train.steps=20", "checkpoint.every=1000"],
    ),
    "board": Bench(
        board, "time of a probe board of 30 heads against one probe", {"rounds": (2, ROUNDS["rounds"][1])},
        ["model.name=vit_ti4", "train.global_batch=128", "train.epochs=2", "machine.processes=1"], verb="probe",
    ),
    "mixer": Bench(
        mixer, "a step of MAE on a Mixer that drops hidden patches against one that sees a token for each", ROUNDS,
        ["model.name=mixer_b16", *AT_224, "mae.decoder_dim=512", "mae.decoder_depth=4"], trains=False,
    ),
    "decoder": Bench(
        decoder, "a step of MAE with the cross-attention decoder of a quarter against the paper's", ROUNDS,
        ["model.name=vit_b16", *AT_224, "mae.decoder_dim=512", "mae.decoder_depth=8", "mae.decoder_heads=16"],
        trains=False,
    ),
}  # fmt: skip
"""Name -> bench."""
