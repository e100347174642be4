"""`mae-dist ckpt {list,inspect,verify} RUN`: list a run's checkpoints, show the tensors of one, verify checksums.

Only reads, so it can be used on a run in progress.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mae_dist.cli import Parser, duration
from mae_dist.run import checkpoint, layout
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import MANIFEST, step_of


def main(argv: list[str]) -> int:
    """Run `mae-dist ckpt ARGV` and return its exit status: 2 when `verify` finds damage."""
    parser = Parser(prog="mae-dist ckpt", description="List, inspect and verify the checkpoints of a run.")
    actions = parser.add_subparsers(required=True, metavar="{list,inspect,verify}")
    for name, run, text in (
        ("list", show_list, "print steps, sizes and ages"),
        ("inspect", inspect, "print the tensors of a checkpoint"),
        ("verify", verify, "compare every file with its checksum"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", metavar="RUN", help="folder of the run")
        action.set_defaults(run=run)
        if name == "inspect":
            action.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    arguments = parser.parse_args(argv)
    run = RunDir.existing(arguments.folder, "RUN")
    paths = run.checkpoints()
    if not paths:
        raise ValueError(f"RUN={run.path}: has no checkpoint yet")
    return arguments.run(run, paths, arguments)


def show_list(run: RunDir, paths: list[Path], _: argparse.Namespace) -> int:
    """Print a line per checkpoint, the best by checkpoint.keep_best, and the checkpoint that is being written."""
    table = Table("step", "written", "age", "MiB", "files", "ranks", "tensors", title=f"checkpoints of {run.path}")
    for path in paths:
        manifest = read_manifest(path)
        if manifest is None:
            table.add_row(f"{step_of(path):,}", "damaged: no readable manifest")
            continue
        written = (path / MANIFEST).stat().st_mtime
        size = sum(file["bytes"] for file in manifest["files"].values()) / 2**20
        table.add_row(
            f"{step_of(path):,}", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written)),
            duration(time.time() - written), f"{size:,.1f}", str(len(manifest["files"])), str(manifest["world"]),
            str(manifest["num_tensors"]),
        )  # fmt: skip
    Console().print(table)
    with suppress(ValueError):  # of a damaged config.yaml, without which checkpoints can be listed
        by = run.settings()[2].checkpoint.keep_best
        if by and (best := layout.best(run.path, by)):
            print(f"best {by}: {best.value:.4g}, step {best.step:,} ({run.path}@{best.step})")
    for path in sorted((run.path / "checkpoints").glob(".saving-*")):
        print(
            f"step {int(path.name.removeprefix('.saving-')):,} is being written, or its run was killed while writing it"
        )
    return 0


def inspect(run: RunDir, paths: list[Path], arguments: argparse.Namespace) -> int:
    """Print names and shapes of the tensors of one checkpoint."""
    known = {step_of(path): path for path in paths}
    step = arguments.step if arguments.step is not None else max(known)
    if step not in known:
        raise ValueError(f"--step {step}: {run.path} has checkpoints of steps {', '.join(map(str, known))}")
    if damage := checkpoint.verify(known[step]):
        raise ValueError(f"{known[step]}: damaged ({damage})")
    shapes = checkpoint.names_in(known[step])
    table = Table("tensor", "shape", "elements", title=str(known[step]))
    for name in sorted(shapes):
        table.add_row(name, " x ".join(map(str, shapes[name])) or "scalar", f"{math.prod(shapes[name]):,}")
    Console().print(table)
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(shape)
    print("  ".join(f"{part}: {count:,} numbers" for part, count in sorted(parts.items())))
    return 0


def verify(run: RunDir, paths: list[Path], _: argparse.Namespace) -> int:
    """Print for each checkpoint whether its files match their checksums."""
    damages = {path: checkpoint.verify(path) for path in track(paths, f"verifying {run.path}", transient=True)}
    for path, damage in damages.items():
        print(f"{path.name}: {'intact' if damage is None else f'DAMAGED: {damage}'}")
    if not any(damages.values()):
        return 0
    intact = [path for path, damage in damages.items() if damage is None]
    print(f"the run would resume from {intact[-1].name}" if intact else "no checkpoint of this run can be used")
    return 2


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the manifest of a checkpoint; None if it is unreadable."""
    with suppress(ValueError):
        return layout.manifest(path)
    return None
