"""`mae-dist bench NAME`: measure one cost of mae_dist on this machine, against a target where there is one.

Reads the command line, prints the table and writes bench-NAME.json, which holds every single measurement with the
machine, date, command and versions. The measurements themselves are in `benchmarks`.
"""

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, devices, dist, errors, recipes
from mae_dist.cli import Parser
from mae_dist.run import directory, identity, jsonl
from mae_dist.verify import benchmarks, data_benchmark, gpu_benchmark, loader_benchmarks, processes, step_benchmark
from mae_dist.verify.measurement import Bench, Result, Runner

log = logging.getLogger(__name__)

AT_PHOTOS = ["model.name=vit_b16", "model.image_size=224", "train.global_batch=64"]
AT_224 = ["model.image_size=224", "train.global_batch=4"]
ROUNDS = {"rounds": (3, "how often each variant is measured; medians are reported")}
SHARDS = {"samples": (10**9, "samples"), "shards": (10**5, "shards")}
IMAGES = {"images": (512, "images that each measurement loads")}
BENCHES = {
    "resume": Bench(
        benchmarks.resume, f"time to the first step of a run at step {benchmarks.FAR_STEP:,} and of a new one", ROUNDS,
        ["train.steps=2000000", "machine.processes=1"],
    ),
    "order": Bench(
        benchmarks.order, "memory and start-up time of the order of samples",
        ROUNDS | SHARDS, needs_data=False,
    ),
    "open": Bench(
        benchmarks.opening, "memory and time of opening a data set of many tars, which are simulated",
        ROUNDS | SHARDS, needs_data=False,
    ),
    "save": Bench(
        benchmarks.save, "time of a step while a checkpoint is written in the background, and while none is", {},
        ["model.name=vit_s4", "train.steps=80", "checkpoint.every=10", "machine.processes=1"],
    ),
    "scaling": Bench(
        benchmarks.scaling, "images per second of several ranks and of one process", ROUNDS,
        ["model.name=vit_ti4", "train.global_batch=64", "train.steps=20", "checkpoint.every=1000"],
    ),
    "heads": Bench(
        benchmarks.heads, "time of a probe with 30 heads and of one with a single head",
        {"rounds": (2, ROUNDS["rounds"][1])},
        ["model.name=vit_ti4", "train.global_batch=128", "train.epochs=2", "machine.processes=1"], verb="probe",
    ),
    "mixer": Bench(
        benchmarks.mixer, "a step of MAE on a Mixer that drops hidden patches, and on one with a mask token for each",
        ROUNDS, ["model.name=mixer_b16", *AT_224, "mae.decoder_dim=512", "mae.decoder_depth=4"], needs_data=False,
    ),
    "decoder": Bench(
        benchmarks.decoder, "a step of MAE with a cross-attention decoder of a quarter, and with the paper's", ROUNDS,
        ["model.name=vit_b16", *AT_224, "mae.decoder_dim=512", "mae.decoder_depth=8", "mae.decoder_heads=16"],
        needs_data=False,
    ),
    "step": Bench(
        step_benchmark.step, "a step of MAE by part, of the peak, compiled, and beside other implementations",
        ROUNDS, needs_data=False,
        flags={"eager": "leave the compiled step out", "record": "put the shares of the peak into configs/steps.jsonl"},
    ),
    "data": Bench(
        data_benchmark.data, "where the time of loading goes, beside the step that needs the images; what to change",
        ROUNDS | IMAGES, AT_PHOTOS, needs_data=False, reads_data=True,
    ),
    "gpu": Bench(
        gpu_benchmark.gpu, "what to measure first on a machine with a GPU: models, loading, the tests for GPUs",
        ROUNDS | {"minutes": (8, "minutes after which no further part starts"), "images": (4096, IMAGES["images"][1])},
        [*AT_PHOTOS, "train.precision=bf16", "mae.decoder_dim=512", "mae.decoder_depth=8", "mae.decoder_heads=16"],
    ),
    "loaders": Bench(
        loader_benchmarks.loaders, "this loader and other people's on the same photographs, per core",
        ROUNDS, AT_PHOTOS, needs_data=False, reads_data=True,
    ),
}  # fmt: skip
"""Name -> bench."""

NUM_TRAIN = 2000
SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.global_batch=16", "train.precision=fp32",
]  # fmt: skip
"""Of all benches. BY_VERB, a bench's own settings, the user's and REQUIRED follow in this order; later overrule."""
BY_VERB = {
    "pretrain": ["mae.decoder_dim=64", "mae.decoder_depth=1", "mae.decoder_heads=4"],
    "probe": ["init_from=random"],
}
REQUIRED = ["track.every=1", "track.wandb=off"]
BUSY = 0.5
"""Load per core before the bench starts above which measurements are unreliable."""


def main(argv: list[str]) -> int:
    """Run one bench, print its table and write its file. Exit status DONE; ValueError for a user's mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:8s} {bench.summary}" for name, bench in BENCHES.items())
        print(f"usage: mae-dist bench NAME [CONFIG.yaml] [DATA] [--out DIR] [section.key=value ...]\n\n{listed}")
        return errors.DONE
    if argv[0] not in BENCHES:
        raise ValueError(f"bench {argv[0]}: no such bench; known: {', '.join(BENCHES)}")
    name, bench = argv[0], BENCHES[argv[0]]
    parser = Parser(prog=f"mae-dist bench {name}", description=bench.summary)
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml DATA section.key=value",
        help="settings of the runs; DATA is a folder or a glob, as in data.path",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the runs and the result")
    for option, (default, text) in bench.options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{text} (default {default})")
    for flag, text in bench.flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    options = parser.parse_intermixed_args(argv[1:])
    numbers = {option: getattr(options, option) for option in bench.options}
    for option, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{option} {number}: must be 1 or more")
    if dist.launched():
        raise ValueError("bench starts its ranks itself; start it without torchrun")
    folder, data = options.out / name, options.out / "data"
    file, overrides = overrides_of(bench, options.words)
    settings = config.load(bench.verb, file, [f"data.path={data}", *overrides, f"out={folder}"])
    fast = devices.fast_precisions(devices.of_rank(0))
    settings = identity.with_precision(settings, identity.precision_for(None, None, fast))
    if bench.reads_data and settings.data.path == str(data):
        raise ValueError(f"bench {name}: needs images: `mae-dist bench {name} DATA`, a folder or glob as in data.path")
    began, load = time.perf_counter(), os.getloadavg()[0]
    print(f"bench {name}: {bench.summary}; in {folder}", flush=True)
    if load > BUSY * (os.cpu_count() or 1):
        log.warning("load %.1f in the last minute: other processes make these measurements unreliable", load)
    folder.mkdir(parents=True, exist_ok=True)
    if bench.needs_data and settings.data.path == str(data):
        processes.embedded_data(data, NUM_TRAIN)
    overrides = [*([file] if file else []), f"data.path={settings.data.path}", *overrides]
    flags = {flag: getattr(options, flag) for flag in bench.flags}
    result = bench.measure(Runner(folder, bench.verb, overrides, settings, numbers | flags))
    machine = {"cores": os.cpu_count(), "gpus": torch.cuda.device_count(), "load_before": load}
    report(result, options.out / f"bench-{name}.json", overrides, machine, time.perf_counter() - began)
    return errors.DONE


def overrides_of(bench: Bench, words: list[str]) -> tuple[str | None, list[str]]:
    """The CONFIG.yaml of a command line, if it has one, and the settings: with a file, the user's alone."""
    file, given = config.split_words("bench", recipes.with_data("bench", words))
    defaults = [] if file else [*SETTINGS, *BY_VERB[bench.verb], *bench.settings]
    return file, [*defaults, *given, *REQUIRED]


def report(result: Result, file: Path, settings: list[str], machine: dict[str, float | None], seconds: float) -> None:
    """Print the table and write the file, with the settings, the machine and the seconds that the bench took."""
    where = directory.provenance(dist.setup()) | machine
    content = asdict(result) | {"settings": settings, "seconds": round(seconds, 1), "provenance": where}
    jsonl.write_atomic(file, json.dumps(content, indent=1) + "\n")
    table = Table("measured", "value", "target", title=result.title)
    for row in result.measurements:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
        table.add_row(row.name, f"{value} {row.unit}".strip(), row.target)
    Console().print(table)
    if result.conclusion:
        print(result.conclusion)
    print(f"{seconds:.0f} s; {file} has every measurement")
