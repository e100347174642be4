"""`mae-dist bench NAME`: measure one cost of mae_dist on this machine, against a target where there is one.

Reads the command line, prints the table and writes bench-NAME.json, which holds every single measurement with the
machine, date, command and versions. The measurements themselves are in `benchmarks`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, dist, errors
from mae_dist.cli import Parser
from mae_dist.run import directory, jsonl
from mae_dist.verify import processes
from mae_dist.verify.benchmarks import BENCHES, Result, Runner

log = logging.getLogger(__name__)

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
        print(f"usage: mae-dist bench NAME [--out DIR] [section.key=value ...]\n\n{listed}")
        return errors.DONE
    if argv[0] not in BENCHES:
        raise ValueError(f"bench {argv[0]}: no such bench; known: {', '.join(BENCHES)}")
    name, bench = argv[0], BENCHES[argv[0]]
    parser = Parser(prog=f"mae-dist bench {name}", description=bench.summary)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the runs and the result")
    for option, (default, text) in bench.options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{text} (default {default})")
    options = parser.parse_intermixed_args(argv[1:])
    numbers = {option: getattr(options, option) for option in bench.options}
    for option, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{option} {number}: must be 1 or more")
    if dist.launched():
        raise ValueError("bench starts its ranks itself; start it without torchrun")
    folder, data = options.out / name, options.out / "data"
    overrides = [*SETTINGS, *BY_VERB[bench.verb], *bench.settings, *options.overrides, *REQUIRED]
    settings = config.load(bench.verb, None, [f"data.path={data}", *overrides, f"out={folder}"])
    began, load = time.perf_counter(), os.getloadavg()[0]
    print(f"bench {name}: {bench.summary}; in {folder}", flush=True)
    if load > BUSY * (os.cpu_count() or 1):
        log.warning("load %.1f in the last minute: other processes make these measurements unreliable", load)
    folder.mkdir(parents=True, exist_ok=True)
    if bench.needs_data and settings.data.path == str(data):
        processes.embedded_data(data, NUM_TRAIN)
    overrides = [f"data.path={settings.data.path}", *overrides]
    result = bench.measure(Runner(folder, bench.verb, overrides, settings, numbers))
    machine = {"cores": os.cpu_count(), "gpus": torch.cuda.device_count(), "load_before": load}
    report(result, options.out / f"bench-{name}.json", overrides, machine, time.perf_counter() - began)
    return errors.DONE


def report(result: Result, file: Path, settings: list[str], machine: dict[str, float | None], seconds: float) -> None:
    """Print the table and write the file, with the settings, the machine and the seconds that the bench took."""
    where = directory.provenance(dist.setup()) | machine
    content = asdict(result) | {"settings": settings, "seconds": round(seconds, 1), "provenance": where}
    jsonl.write_atomic(file, json.dumps(content, indent=1) + "\n")
    table = Table("measured", "value", "target", title=result.title)
    for row in result.measurements:
        target = "" if row.at_most is None else f"at most {row.at_most:g}"
        missed = " MISSED" if row.at_most is not None and row.value > row.at_most else ""
        table.add_row(row.name, f"{row.value:.3g} {row.unit}".strip(), target + missed)
    Console().print(table)
    print(f"{seconds:.0f} s; {file} has every measurement")
