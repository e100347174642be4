"""`mae-dist data {pack,index,show,check}`: pack sources into tars, index existing tars, show or check a data set.

Each action ends by printing what it wrote, where, and the next command. Packing is in `data_pack`, checking in
`data_check`. Imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dist import image_grid, paths
from mae_dist.cli import Parser
from mae_dist.commands import data_check, data_pack, data_remote
from mae_dist.commands.data_output import facts, print_splits, progress, report
from mae_dist.data import index
from mae_dist.data.cache import Cache
from mae_dist.data.decode import decode, stored_size
from mae_dist.data.pack import ProgressCallback
from mae_dist.data.remote import shown
from mae_dist.errors import DONE
from mae_dist.schema import DataConfig

log = logging.getLogger(__name__)

NUM_SIZES = 2000
"""Number of images of a split whose size `show` reads (evenly spaced)."""
UNREAD = "some tars have an .idx beside them, so they were not read: classes and checksums may be unknown (--whole)"
ROWS, COLUMNS, TILE = 8, 10, 96
"""Rows and columns of the sheet that `show` draws, and pixels a side of a tile."""


def main(argv: list[str]) -> int:
    """Run `mae-dist data ARGV` and return its exit status. Raises ValueError for a user's mistake."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments) or DONE


def _parser() -> Parser:
    parser = Parser(prog="mae-dist data", description="Pack, index, show and check data sets of ordinary tars.")
    actions = parser.add_subparsers(required=True, metavar="{pack,index,show,check}")
    data_pack.add_parser(actions)
    indexing = actions.add_parser("index", help="index existing tars")
    indexing.add_argument(
        "tars", nargs="+", metavar="TARS", help="folders, patterns or brace ranges, for example 'data/{000..146}.tar'"
    )
    indexing.add_argument("--split", default="train", help="name of their split in dataset.json (default train)")
    indexing.add_argument("--out", type=Path, help="folder for indexes and dataset.json (default: that of the tars)")
    indexing.add_argument("--whole", action="store_true", help="read tars at URLs although an .idx lies beside them")
    indexing.set_defaults(run=_index)

    showing = actions.add_parser("show", help="print counts, classes and sizes, and draw a sheet of samples")
    showing.add_argument("folder", type=Path, metavar="DIR", help="folder with a dataset.json")
    showing.add_argument("--split", help="the split to show (default: train, or the first)")
    showing.add_argument("--out", type=Path, help="file of the sheet (default: DIR/sheet-SPLIT.png)")
    showing.set_defaults(run=_show)
    data_check.add_parser(actions)
    return parser


def _index(arguments: argparse.Namespace) -> None:
    if urls := data_remote.urls_in(arguments.tars):
        if arguments.out is None:
            raise ValueError(f"{shown(urls[0])}: pass --out DIR for the indexes and {index.FILE}")
        folder = arguments.out
        dataset = _write(folder, lambda before, tick: _merge_remote(before, urls, arguments, tick))
        unread = any(not shard.sha256 for shards in dataset.splits.values() for shard in shards)
        report(dataset, folder, UNREAD if unread else "")
        return
    tars = _tars(arguments.tars)
    folders = {tar.parent for tar in tars}
    if len(arguments.tars) == 1 and os.path.isdir(arguments.tars[0]):
        folders = {Path(os.path.abspath(arguments.tars[0]))}
    if arguments.out is None and len(folders) > 1:
        raise ValueError(f"the tars are in {len(folders)} folders; pass --out DIR for their indexes")
    folder = Path(os.path.abspath(arguments.out or folders.pop()))
    report(_write(folder, lambda before, tick: _merge(before, arguments.split, tars, folder, tick)), folder)


def _write(folder: Path, merge: Callable[[index.Dataset, ProgressCallback], index.Dataset]) -> index.Dataset:
    """Write the dataset.json of a folder, as `merge` makes it from the one that is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = index.Dataset.load(folder) if (folder / index.FILE).is_file() else index.Dataset(name=folder.name)
        with progress() as tick:
            dataset = merge(before, tick)
        dataset.save(folder)
    except PermissionError as error:
        raise ValueError(f"{folder}: cannot be written; pass --out DIR for the index") from error
    return dataset


def _merge_remote(
    before: index.Dataset, urls: list[str], arguments: argparse.Namespace, tick: ProgressCallback
) -> index.Dataset:
    """Index tars at `urls`; return `before` with their splits, and the facts of a dataset.json that lists them all."""
    cache, dataset = Cache.of(None), before
    splits = data_remote.tars_of(urls, arguments.split)
    for split, tars in splits.items():
        taken = {s.index_name for name, known in dataset.splits.items() if name != split for s in known}
        names, found = _index_names([Path(shown(tar.url)) for tar in tars], taken), []
        for number, (tar, name) in enumerate(zip(tars, names, strict=True)):
            found.append(data_remote.index_tar(tar, arguments.out / name, cache, arguments.whole))
            tick(f"index {split}", number + 1, len(tars))
        numbers, sizes = [part.num_classes or 0 for part in found], {part.size for part in found}
        size = sizes.pop() if len(sizes) == 1 else None
        dataset = _with_split(dataset, split, [part.shard for part in found], max(numbers), size)
    origins = {id(tar.dataset): tar.dataset for tars in splits.values() for tar in tars}
    origin = next(iter(origins.values()))
    if len(origins) > 1 or origin is None or before.classes not in (None, origin.classes):
        return dataset
    return replace(origin, name=before.name, splits=dataset.splits)


def _tars(texts: list[str]) -> list[Path]:
    """The tars that the arguments name, sorted. ValueError where one is named twice, or there is none."""
    names = [name for text in texts for name in paths.names(paths.with_variables(text))]
    tars = sorted(
        Path(os.path.abspath(tar)) for name in names for tar in (paths.tars_in(name) if os.path.isdir(name) else [name])
    )
    seen: dict[tuple[int, int], Path] = {}
    for tar in tars:
        status = tar.stat()
        if (twin := seen.setdefault((status.st_dev, status.st_ino), tar)) is not tar:
            raise ValueError(f"{' '.join(texts)}: {twin} is in it twice" + (f", also as {tar}" if tar != twin else ""))
    if len(splits := paths.splits_in([tar.name for tar in tars])) > 1:
        log.warning("the names of these tars speak of several splits (%s), which become one", ", ".join(splits))
    return tars


def _index_names(tars: list[Path], taken: set[str]) -> list[str]:
    """A name for the index of each tar: its own with .idx, else with those of folders above it, else with a number."""
    names: list[str] = []
    for tar in tars:
        above = [tar.parents[depth].name for depth in range(len(tar.parents) - 1)]
        longer = ("-".join([*reversed(above[:depth]), f"{tar.stem}.idx"]) for depth in range(len(above) + 1))
        numbered = (f"{tar.stem}-{number}.idx" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain(longer, numbered) if name not in taken))
        taken = taken | {names[-1]}
    return names


def _merge(before: index.Dataset, split: str, tars: list[Path], folder: Path, tick: ProgressCallback) -> index.Dataset:
    """Index `tars` into `folder`; return `before` with these tars as its split `split`."""
    shards, num_classes = [], 0
    names = _index_names(tars, {s.index_name for name, known in before.splits.items() if name != split for s in known})
    for number, (tar, name) in enumerate(zip(tars, names, strict=True)):
        shard, labels = index.build(tar, folder / name)
        path = str(tar.relative_to(folder) if tar.is_relative_to(folder) else tar)
        shards.append(replace(shard, tar=path, index="" if name == f"{tar.stem}.idx" else name))
        num_classes = max(num_classes, int(labels.max()) + 1)
        tick("index", number + 1, len(tars))
    data = index.ShardIndex(tars, [folder / name for name in names], shards, index.Dataset(""))
    size = _common_size(data, tick)
    return _with_split(before, split, shards, num_classes, size)


def _with_split(
    before: index.Dataset, split: str, shards: list[index.Shard], num_classes: int, size: tuple[int, int] | None
) -> index.Dataset:
    """`before` with these shards as its split `split`.

    Facts of a replaced split are dropped: mean and std if it is train, and class names if there are more classes.
    """
    others = {name: known for name, known in before.splits.items() if name != split}
    if others or before.classes:
        num_classes = max(num_classes, before.num_classes or 0)
    return index.Dataset(
        name=before.name,
        splits=before.splits | {split: shards},
        num_classes=num_classes or None,
        classes=before.classes if num_classes == before.num_classes else None,
        image_size=size if not others or size == before.image_size else None,
        mean=before.mean if split != "train" else None,
        std=before.std if split != "train" else None,
    )


def _common_size(data: index.ShardIndex, tick: ProgressCallback) -> tuple[int, int] | None:
    """(height, width) if all images have one size, else None. Reads headers only, until two differ."""
    first = stored_size(data.read(0))
    for sample in range(1, len(data)):
        if first is None or stored_size(data.read(sample)) != first:
            return None
        tick("sizes", sample + 1, len(data))
    return first


def _show(arguments: argparse.Namespace) -> None:
    dataset = index.Dataset.load(arguments.folder)
    split = arguments.split or ("train" if "train" in dataset.splits else next(iter(dataset.splits), "train"))
    data = index.open_split(str(arguments.folder), split)
    with progress() as tick:
        labels = np.empty(len(data), dtype=np.int64)
        for sample in range(len(data)):
            labels[sample] = data.label(sample)
            tick("labels", sample + 1, len(data))
        chosen = _evenly(np.arange(len(data)), NUM_SIZES)
        sizes: Counter[tuple[int, int] | None] = Counter()
        for number, sample in enumerate(chosen):
            sizes[stored_size(data.read(int(sample)))] += 1
            tick("sizes", number + 1, len(chosen))
    print(f"{arguments.folder}: {dataset.name}, {facts(dataset)}")
    print_splits(dataset)
    _print_classes(split, labels, dataset.classes)
    _print_sizes(split, sizes, len(chosen))
    target = arguments.out
    if target is None:
        target = (arguments.folder if os.access(arguments.folder, os.W_OK) else Path()) / f"sheet-{split}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    _sheet(data, labels, dataset.classes).save(target)
    print(f"wrote {target}: samples of {split}")
    print(f"next: mae-dist pretrain CONFIG.yaml data.path={arguments.folder}")


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `values`, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(np.int64)]


def _class_name(label: int, classes: list[str] | None) -> str:
    return classes[label] if classes is not None and label < len(classes) else str(label)


def _print_classes(split: str, labels: np.ndarray, classes: list[str] | None) -> None:
    counts = Counter(labels[labels >= 0].tolist()).most_common()
    if not counts:
        return
    largest = ", ".join(f"{_class_name(label, classes)} {count}" for label, count in counts[:5])
    print(f"  {split}: {len(counts)} classes of {counts[-1][1]} to {counts[0][1]} images; largest: {largest}")


def _print_sizes(split: str, sizes: Counter[tuple[int, int] | None], num_images: int) -> None:
    unreadable = sizes.pop(None, 0)
    common = ", ".join(f"{width} x {height} ({count})" for (height, width), count in _known(sizes).most_common(5))
    more = f" and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    many = (
        "" if unreadable <= DataConfig.max_bad * num_images else f", more than data.max_bad={DataConfig.max_bad} allows"
    )
    broken = f"; {unreadable} unreadable{many}: see `mae-dist data check`" if unreadable else ""
    print(f"  {split}: width x height of {num_images} images: {common}{more}{broken}")


def _known(sizes: Counter[tuple[int, int] | None]) -> Counter[tuple[int, int]]:
    return Counter({size: count for size, count in sizes.items() if size is not None})


def _sheet(data: index.ShardIndex, labels: np.ndarray, classes: list[str] | None) -> Image.Image:
    """Draw ROWS samples of up to COLUMNS classes, a column per class; samples of all if most classes are smaller."""
    present = np.unique(labels[labels >= 0])
    if 0 < len(present) * ROWS <= len(data):
        shown = _evenly(present, COLUMNS)
        columns = [_evenly(np.flatnonzero(labels == label), ROWS) for label in shown]
        captions = [_class_name(int(label), classes) for label in shown]
    else:
        columns, captions = np.array_split(_evenly(np.arange(len(data)), ROWS * COLUMNS), COLUMNS), []
    blank = np.full((1, 1, 3), 255, dtype=np.uint8)
    rows = [
        [_pixels(data.read(int(column[row]))) if row < len(column) else blank for column in columns]
        for row in range(max(len(column) for column in columns))
    ]
    return image_grid.sheet(rows, captions, TILE)


def _pixels(sample: index.Sample) -> np.ndarray:
    """Decode a sample to uint8 (height, width, 3); a grey pixel if it is unreadable."""
    try:
        return np.asarray(decode(sample))
    except ValueError:
        return np.full((1, 1, 3), 128, dtype=np.uint8)
