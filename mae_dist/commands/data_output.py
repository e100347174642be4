"""What the actions of `mae-dist data` print: progress bars, and the facts of a data set. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mae_dist.data import index
from mae_dist.data.pack import ProgressCallback
from mae_dist.printed import counted, escaped


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """A ProgressCallback that draws progress bars on stderr if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        tasks = {}

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done)

        yield tick


def report(dataset: index.Dataset, folder: Path, more: str = "") -> None:
    """Print what was written, `more` lines about it, and the next command."""
    print(escaped(f"wrote {folder}/{index.FILE}: {dataset.name}, {facts(dataset)}"))
    print_splits(dataset.splits)
    if more:
        print(more)
    print(f"next: mae-dist data show {shlex.quote(str(folder))}")
    if "train" in dataset.splits:
        print_training(str(folder))


def print_training(path: str) -> None:
    """Print the commands that pretrain on the split `train` of `path`, as in data.path."""
    data = shlex.quote(f"data.path={path}")
    print(f"next: mae-dist recipe {shlex.quote(path)} > mine.yaml && mae-dist pretrain mine.yaml {data} out=runs/mine")


def facts(dataset: index.Dataset) -> str:
    """Classes, common size, mean and standard deviation of a data set, as far as they are known."""
    known = ["no labels" if dataset.num_classes is None else counted(dataset.num_classes, "class")]
    if dataset.image_size is not None:
        known.append("{1} x {0} pixels".format(*dataset.image_size))
    if dataset.mean is not None and dataset.std is not None:
        known += [f"{name} {' '.join(f'{n:.4f}' for n in values)}" for name, values in
                  (("mean", dataset.mean), ("std", dataset.std))]  # fmt: skip
    return ", ".join(known)


def print_splits(splits: Mapping[str, Sequence[index.Shard]]) -> None:
    """Print a line a split: images, tars, size, and how many have no label."""
    for split, shards in splits.items():
        samples, labelled = sum(s.num_samples for s in shards), sum(s.num_labelled for s in shards)
        size, name = sum(shard.num_bytes for shard in shards) / 1e6, escaped(split)
        unlabelled = f", {samples - labelled} without a label" if labelled < samples else ""
        print(f"  {name:8s} {samples:9,d} images in {counted(len(shards), 'tar')}, {size:,.1f} MB{unlabelled}")
