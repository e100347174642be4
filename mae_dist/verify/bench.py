"""`mae-dist bench NAME`: a cost that mae_dist promises to keep small, measured here and now within one run.

This is the frame: arguments, settings, the table and bench-NAME.json, which holds every single measurement with the
machine, date, command and versions. What is measured, and how, is in `benches`.
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

from mae_dist import config, dist
from mae_dist.cli import Parser
from mae_dist.run import directory
from mae_dist.run.layout import write_text
from mae_dist.verify import processes
from mae_dist.verify.benchmarks import BENCHES, Report, Task

log = logging.getLogger(__name__)

NUM_TRAIN = 2000
SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.global_batch=16", "train.precision=fp32",
]  # fmt: skip
"""Of all benches. Those of the verb and a bench's own come after them, then the user's, then what must be so to measure
at all."""
OF_VERB = {
    "pretrain": ["mae.decoder_dim=64", "mae.decoder_depth=1", "mae.decoder_heads=4"],
    "probe": ["init_from=random"],
}
TRACKED = ["track.every=1", "track.wandb=off"]
BUSY = 0.5
"""Load per core, of others, from which on a measurement is worth little."""


def main(argv: list[str]) -> int:
    """Run one bench; print its table and write its file."""
    if not argv or argv[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:8s} {bench.text}" for name, bench in BENCHES.items())
        print(f"usage: mae-dist bench NAME [--out DIR] [section.key=value ...]\n\n{listed}")
        return 0
    if argv[0] not in BENCHES:
        raise ValueError(f"bench {argv[0]}: no such bench; known: {', '.join(BENCHES)}")
    name, bench = argv[0], BENCHES[argv[0]]
    parser = Parser(prog=f"mae-dist bench {name}", description=bench.text)
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="settings of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of runs and result")
    for option, (default, text) in bench.options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{text} (default {default})")
    options = parser.parse_intermixed_args(argv[1:])
    sizes = {option: getattr(options, option) for option in bench.options}
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{option} {size}: must be 1 or more")
    if dist.launched():
        raise ValueError("bench starts its ranks itself; start it without torchrun")
    folder, words = options.out / name, [*SETTINGS, *OF_VERB[bench.verb], *bench.settings, *options.words, *TRACKED]
    settings = config.load(bench.verb, None, [f"data.path={options.out / 'data'}", *words, f"out={folder}"])
    began, load = time.perf_counter(), os.getloadavg()[0]
    print(f"bench {name}: {bench.text}; in {folder}", flush=True)
    if load > BUSY * (os.cpu_count() or 1):
        log.warning("load %.1f in the last minute: if others work here too, what is measured now is noise", load)
    folder.mkdir(parents=True, exist_ok=True)
    if bench.trains and settings.data.path == str(options.out / "data"):
        processes.embedded_data(options.out / "data", NUM_TRAIN)
    report = bench.measure(Task(folder, bench.verb, [f"data.path={settings.data.path}", *words], settings, sizes))
    machine = {"cores": os.cpu_count(), "gpus": torch.cuda.device_count(), "load_before": load}
    conclude(report, options.out / f"bench-{name}.json", words, machine, time.perf_counter() - began)
    return 0


def conclude(report: Report, file: Path, words: list[str], machine: dict[str, float | None], seconds: float) -> None:
    """Print the table and write the file."""
    where = directory.provenance(dist.setup()) | machine
    content = asdict(report) | {"settings": words, "seconds": round(seconds, 1), "provenance": where}
    write_text(file, json.dumps(content, indent=1) + "\n")
    table = Table("measured", "value", "target", title=report.title)
    for measure in report.measures:
        target = "" if measure.at_most is None else f"at most {measure.at_most:g}"
        missed = " MISSED" if measure.at_most is not None and measure.value > measure.at_most else ""
        table.add_row(measure.what, f"{measure.value:.3g} {measure.unit}".strip(), target + missed)
    Console().print(table)
    print(f"{seconds:.0f} s; {file} has every number")
