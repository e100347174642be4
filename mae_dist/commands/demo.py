"""`mae-dist demo`: all stages on the embedded data set: pack, pretrain, kNN, probe, fine-tune, report.

kNN, probe and fine-tuning run twice with equal settings: from the pretrained backbone and from random initialisation.
Every step is the command that a user would type, in a process of its own. After an interruption, running the demo again
continues it.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mae_dist import environment
from mae_dist.cli import Parser
from mae_dist.run.directory import RunDir
from mae_dist.schema import RANDOM

NUM_TRAIN, NUM_TEST = 6000, 1500
TITLE = "mae_dist: a masked autoencoder on the embedded data set"
MODEL = ["model.name=vit_demo4", "model.image_size=32", "view.test_crop=1"]
PRETRAIN = [
    "view.crop=pad", "mae.decoder_dim=64", "mae.decoder_depth=1", "mae.decoder_heads=4", "train.epochs=11",
    "train.global_batch=64", "optim.base_lr=6e-3", "optim.warmup_epochs=1", "track.evaluate_every=3",
    "checkpoint.every=500",
]  # fmt: skip
KNN = ["model.pool=avg"]
PROBE = [
    "model.pool=avg", "view.crop=center", "train.epochs=2", "train.global_batch=128", "optim.name=adamw",
    "optim.base_lr=4e-2", "track.evaluate_every=1",
]  # fmt: skip
FINETUNE = [
    "model.pool=avg", "model.position=learned", "view.crop=pad", "train.epochs=2.5", "train.global_batch=64",
    "train.label_smoothing=0.1", "optim.base_lr=4e-3", "optim.warmup_epochs=0.25", "optim.layer_decay=0.75",
    "track.evaluate_every=1",
]  # fmt: skip
MEASURES = {"knn": ("nearest neighbours", KNN), "probe": ("linear probe", PROBE), "finetune": ("fine-tuning", FINETUNE)}


def main(argv: list[str]) -> int:
    """Run `mae-dist demo ARGV`; return 0, or the exit status of the first step that failed."""
    parser = Parser(prog="mae-dist demo", description="Run all stages on the embedded data set, in minutes.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for data, runs and report (default runs/demo)"
    )
    parser.add_argument("--processes", type=int, help="number of ranks (default: one per GPU, or two on CPUs)")
    options = parser.parse_args(argv)
    began, out = time.perf_counter(), options.out
    data, pretrained = out / "data", out / "pretrain"
    processes = options.processes or default_processes()

    if not (data / "dataset.json").is_file():
        counts = ["--train", str(NUM_TRAIN), "--test", str(NUM_TEST)]
        if status := step("data", "pack", "synthetic", "--out", str(data), *counts):
            return status
    common = [f"data.path={data}", *MODEL, f"machine.processes={processes}"]
    if status := step("pretrain", *common, *PRETRAIN, f"out={pretrained}"):
        return status
    runs = [pretrained]
    for verb, (_, settings) in MEASURES.items():
        for start, suffix in ((str(pretrained), "pretrained"), (RANDOM, RANDOM)):
            runs.append(out / f"{verb}-{suffix}")
            if status := step(verb, *common, *settings, f"init_from={start}", f"out={runs[-1]}"):
                return status
    report = out / "report.html"
    if status := step("report", *map(str, runs), "--out", str(report), "--title", TITLE):
        return status
    Console().print(table(out))
    print(f"{time.perf_counter() - began:.0f} s; report with pictures and curves: {report.resolve()}")
    return 0


def step(*argv: str) -> int:
    """Print and run `mae-dist ARGV`; return its exit status."""
    print(f"\n$ mae-dist {shlex.join(argv)}", flush=True)
    return subprocess.run([*environment.python(), *argv], check=False).returncode


def default_processes() -> int:
    """One rank per GPU, or two on CPUs."""
    import torch

    return torch.cuda.device_count() or 2


def table(out: Path) -> Table:
    """Table of top-1 for random and pretrained weights, from the result.json of the runs."""
    table = Table("measure", "from random", "pretrained", "gain", title="top-1 on the test split, percent")
    for verb, (label, _) in MEASURES.items():
        top1 = {suffix: (RunDir(out / f"{verb}-{suffix}").result() or {})["top1"] for suffix in (RANDOM, "pretrained")}
        gain = top1["pretrained"] - top1[RANDOM]
        table.add_row(label, f"{top1[RANDOM]:.1f}", f"{top1['pretrained']:.1f}", f"{gain:+.1f}")
    return table
