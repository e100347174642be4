"""`mae-dist data {pack,index,show,check}`: pack sources into tars, index existing tars, show or check a data set.

Each action ends by printing what it wrote, where, and the next command. Packing is in `data_pack`, indexing in
`data_index`, checking in `data_check`. Imports no torch.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dist import image_grid, paths
from mae_dist.cli import Parser
from mae_dist.commands import data_check, data_index, data_pack
from mae_dist.commands.data_output import facts, print_splits, print_training, progress
from mae_dist.data import index, places
from mae_dist.data.decode import decode, own_channels, stored_size
from mae_dist.data.pixels import Decoding
from mae_dist.errors import DONE
from mae_dist.printed import counted, escaped, span
from mae_dist.schema import DataConfig

NUM_SIZES = 2000
"""Number of images of a split whose size `show` reads (evenly spaced)."""
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
    data_index.add_parser(actions)

    showing = actions.add_parser("show", help="print counts, classes and sizes, and draw a sheet of samples")
    showing.add_argument("data", metavar="TARS", help="folder with a dataset.json, or indexed tars, as in data.path")
    showing.add_argument("--split", help="the split to show (default: train, or the first)")
    showing.add_argument("--out", type=Path, help="file of the sheet (default: DIR/sheet-SPLIT.png)")
    showing.set_defaults(run=_show)
    data_check.add_parser(actions)
    return parser


def _show(arguments: argparse.Namespace) -> None:
    path = paths.with_variables(arguments.data)
    known = places.splits(path)
    split = arguments.split or ("train" if "train" in known or not known else known[0])
    if not known and arguments.split:
        raise ValueError(f"--split {split}: {path} names tars, which are one split; leave it out")
    data = index.open_split(path, split)
    dataset, folder = data.dataset, data.indexes[0].parent
    with progress() as tick:
        labels = np.empty(len(data), dtype=np.int64)
        for sample in range(len(data)):
            labels[sample] = data.label(sample)
            tick("labels", sample + 1, len(data))
        how = Decoding(dataset.channels or own_channels(data.read(0)), dataset.white)
        chosen = _evenly(np.arange(len(data)), NUM_SIZES)
        sizes: Counter[tuple[int, int] | None] = Counter()
        for number, sample in enumerate(chosen):
            sizes[stored_size(data.read(int(sample)), how)] += 1
            tick("sizes", number + 1, len(chosen))
    print(escaped(f"{path}: {dataset.name}, {facts(dataset)}"))
    print_splits(dataset.splits if known else {split: data.shards})
    _print_classes(split, labels, dataset.classes)
    _print_sizes(split, sizes, len(chosen))
    target = arguments.out
    if target is None:
        target = (folder if os.access(folder, os.W_OK) else Path()) / f"sheet-{split}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    _sheet(data, labels, dataset.classes, how).save(target)
    print(f"wrote {target}: samples of {split}")
    if split == "train":
        print_training(path)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `values`, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(np.int64)]


def _class_name(label: int, classes: list[str] | None) -> str:
    return classes[label] if classes is not None and label < len(classes) else str(label)


def _print_classes(split: str, labels: np.ndarray, classes: list[str] | None) -> None:
    counts = Counter(labels[labels >= 0].tolist()).most_common()
    if not counts:
        return
    largest = ", ".join(f"{_class_name(label, classes)} ({count})" for label, count in counts[:5])
    sizes = span(counts[-1][1], counts[0][1])
    print(escaped(f"  {split}: {counted(len(counts), 'class')} of {sizes} images; largest: {largest}"))


def _print_sizes(split: str, sizes: Counter[tuple[int, int] | None], num_images: int) -> None:
    unreadable = sizes.pop(None, 0)
    common = ", ".join(f"{width} x {height} ({count})" for (height, width), count in _known(sizes).most_common(5))
    more = f" and {counted(len(sizes) - 5, 'more size')}" if len(sizes) > 5 else ""
    many = (
        "" if unreadable <= DataConfig.max_bad * num_images else f", more than data.max_bad={DataConfig.max_bad} allows"
    )
    broken = f"; {unreadable} unreadable{many}: see `mae-dist data check`" if unreadable else ""
    print(f"  {split}: width x height of {num_images} images: {common}{more}{broken}")


def _known(sizes: Counter[tuple[int, int] | None]) -> Counter[tuple[int, int]]:
    return Counter({size: count for size, count in sizes.items() if size is not None})


def _sheet(data: index.ShardIndex, labels: np.ndarray, classes: list[str] | None, how: Decoding) -> Image.Image:
    """Draw up to ROWS samples of up to COLUMNS classes, a column per class; samples of all if most classes have one."""
    present = np.unique(labels[labels >= 0])
    if 0 < 2 * len(present) <= len(data):
        shown = _evenly(present, COLUMNS)
        columns = [_evenly(np.flatnonzero(labels == label), ROWS) for label in shown]
        captions = [_class_name(int(label), classes) for label in shown]
    else:
        columns, captions = np.array_split(_evenly(np.arange(len(data)), ROWS * COLUMNS), COLUMNS), []
    blank = np.full((1, 1, 3), 255, dtype=np.uint8)
    rows = [
        [_pixels(data.read(int(column[row])), how) if row < len(column) else blank for column in columns]
        for row in range(max(len(column) for column in columns))
    ]
    return image_grid.sheet(rows, captions, TILE)


def _pixels(sample: index.Sample, how: Decoding) -> np.ndarray:
    """Decode a sample; a grey pixel if it is unreadable."""
    try:
        return np.asarray(decode(sample, how=how))
    except ValueError:
        return np.full((1, 1, 3), 128, dtype=np.uint8)
