"""`mae-dist data pack KIND`: pack a source into tars, and say what that costs in disk and brings in speed.

Imports torch only to measure the speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mae_dist import environment, paths
from mae_dist.commands.data_output import progress, report
from mae_dist.data import index
from mae_dist.data.ilsvrc import from_imagenet
from mae_dist.data.pack import MAX_BAD, Packed, ProgressCallback, Source, new_folder, pack
from mae_dist.data.pixels import Decoding
from mae_dist.data.reencode import FORMATS, QUALITY, Encoding
from mae_dist.data.sources import from_cifar100, from_folder, from_synthetic, from_tars

NUM_TIMED, TIMED_SIDE = 200, 224
"""Number of images of the source and of the result whose reading is timed (evenly spaced), and pixels a side of their
crops, fewer if --short-side is less.
"""
Open = Callable[[argparse.Namespace, ProgressCallback], Source]
"""Makes the source from the arguments of its kind."""


def add_parser(actions: argparse._SubParsersAction) -> None:
    """Add `pack` and its kinds of sources to the actions of `mae-dist data`."""
    packing = actions.add_parser("pack", help="pack a source into tars with indexes and a dataset.json")
    kinds = packing.add_subparsers(required=True, metavar="{cifar100,folder,imagenet,synthetic,tars}")
    cifar100 = kinds.add_parser("cifar100", help="CIFAR-100, or another archive in the layout of its python version")
    cifar100.add_argument("--source", type=Path, help="cifar-100-python.tar.gz (default: download it)")
    _complete(cifar100, lambda given, tick: from_cifar100(given.source, tick))

    folder = kinds.add_parser("folder", help="images in SOURCE/SPLIT/CLASS/ (like ImageNet), SOURCE/CLASS/ or SOURCE")
    folder.add_argument("--source", type=Path, required=True, help="the folder of images")
    folder.add_argument(
        "--splits",
        metavar="none|FILE|SPLIT=FOLDER|FILE,...",
        help="which folders in SOURCE are splits, for example train=training,test=heldout, or files that list their "
        "images, train=meta/train.txt,test=meta/test.txt; or one file of rows IMAGE,SPLIT; none: they are classes "
        "(default: those called train, val, valid, validation and test)",
    )
    folder.add_argument(
        "--labels", metavar="FILE|folder:N|name",
        help="list of rows IMAGE,LABEL; or the class is the folder at level N: 1 the first (default), -1 the last; or "
        "what is before the number in a file's name, as in cat.12.jpg",
    )  # fmt: skip
    _add_test_share(folder)
    _complete(folder, _open_folder, encodes=True)

    _add_imagenet(kinds)
    synthetic = kinds.add_parser("synthetic", help="procedural 32x32 images in 10 classes; needs no source")
    synthetic.add_argument("--train", type=int, default=8000, help="training images (default 8000)")
    synthetic.add_argument("--test", type=int, default=2000, help="test images (default 2000)")
    synthetic.add_argument("--seed", type=int, default=0, help="seed of the images (default 0)")
    _complete(synthetic, lambda given, _: from_synthetic(given.train, given.test, given.seed))

    tars = kinds.add_parser("tars", help="indexed tars; keys, labels, splits and the order of samples are kept")
    tars.add_argument(
        "--source", required=True, metavar="DIR|GLOB", help="folder with a dataset.json, or 'DIR/a-*.tar'"
    )
    tars.add_argument("--split", help="name of the split of a GLOB (default: that in its dataset.json, or train)")
    _add_test_share(tars)
    _complete(tars,
        lambda given, _: from_tars(paths.with_variables(given.source), given.split, given.test_share),
        sizes=False, encodes=True,
    )  # fmt: skip


def _open_folder(given: argparse.Namespace, tick: ProgressCallback) -> Source:
    splits, labels = (None if text is None else paths.with_variables(text) for text in (given.splits, given.labels))
    return from_folder(given.source, given.test_share, splits, labels, tick)


def _add_imagenet(kinds: argparse._SubParsersAction) -> None:
    imagenet = kinds.add_parser("imagenet", help="the archives of ImageNet (ILSVRC2012) as they are")
    imagenet.add_argument("--train", type=Path, required=True, metavar="ILSVRC2012_img_train.tar", help="tar of tars")
    imagenet.add_argument("--val", type=Path, metavar="ILSVRC2012_img_val.tar", help="tar of validation images")
    imagenet.add_argument(
        "--val-labels",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="ILSVRC2012_devkit_t12.tar.gz; or a file with a synset for each image; or the devkit's ground truth and "
        "its meta.mat or map_clsloc.txt",
    )
    _complete(
        imagenet, lambda given, tick: from_imagenet(given.train, given.val, given.val_labels, given.workers, tick),
        encodes=True,
    )  # fmt: skip


def _add_test_share(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--test-share",
        type=float,
        default=0.0,
        help="share of train to hold out as split test, or as val where SOURCE has a test (default 0)",
    )


def _complete(kind: argparse.ArgumentParser, opener: Open, sizes: bool = True, encodes: bool = False) -> None:
    """Add what kinds of sources have in common, and how shards are cut and images encoded, where there is a choice."""
    cores = environment.cores()
    kind.add_argument("--out", type=Path, required=True, help="the folder to make")
    kind.add_argument("--workers", type=int, default=cores, help=f"processes (default: one a core, here {cores})")
    bad = f"largest share of the images of a split to leave out, where they are unreadable (default {MAX_BAD})"
    kind.add_argument("--max-bad", type=float, default=MAX_BAD, metavar="SHARE", help=bad)
    kind.set_defaults(run=_pack, open=opener, shard_size=None, short_side=None, format=None, quality=None)
    kind.set_defaults(channels=3, white=None, exif=False)
    if sizes:
        kind.add_argument("--shard-size", type=int, default=5000, help="samples a tar (default 5000)")
    if encodes:
        kind.add_argument(
            "--short-side", type=int, metavar="N", help="resize images whose shorter side exceeds N pixels"
        )
        kind.add_argument(
            "--format", choices=FORMATS, help="format to store; default: jpg with --short-side, else as is"
        )
        kind.add_argument("--quality", type=int, metavar="Q", help=f"of jpg and webp, 1 to 100 (default {QUALITY})")
        kind.add_argument("--channels", type=int, metavar="N", help="channels of the images (default 3)")
        kind.add_argument("--white", type=float, metavar="V", help="value that is white above 8 bits, 4095 for 12 bits")
        kind.add_argument("--exif", action="store_true", help="turn images as their EXIF orientation says")


def _pack(arguments: argparse.Namespace) -> None:
    how = Decoding(arguments.channels, arguments.white, arguments.exif)
    encoding = Encoding(arguments.short_side, arguments.format, arguments.quality, how)
    new_folder(arguments.out)  # before a source is read for minutes
    with progress() as tick:
        source = arguments.open(arguments, tick)
        packed = pack(source, arguments.out, arguments.shard_size, encoding, arguments.workers, tick, arguments.max_bad)
    side = min(encoding.short_side or TIMED_SIDE, TIMED_SIDE)
    gain = "" if encoding.keeps_bytes else _gain(source, packed, arguments.out, side, how)
    report(packed.dataset, arguments.out, gain)


def _gain(source: Source, packed: Packed, folder: Path, side: int, how: Decoding) -> str:
    """What other pixels or formats cost in disk and bring in speed, measured on NUM_TIMED images."""
    tally, split = packed.tally, "train" if "train" in source.counts else next(iter(source.counts))
    data = index.open_split(str(folder), split)
    numbers = np.linspace(0, len(data) - 1, min(NUM_TIMED, len(data))).astype(int)

    def original(number: int) -> index.Sample:
        (picture,) = source.pictures(split, range(number, number + 1))
        return index.Sample(picture.key, picture.extension, picture.content, picture.label)

    before = _images_per_second(original, numbers, side, how)
    after = _images_per_second(data.read, numbers, side, Decoding(how.channels, packed.dataset.white))
    return (
        f"  {tally.num_encoded:,} of them encoded anew, {tally.num_resized:,} resized: "
        f"{tally.source_bytes / 1e6:,.1f} MB of image files became {tally.stored_bytes / 1e6:,.1f} MB\n"
        f"  reads {after / before:.1f}x as fast as the source: {before:,.0f} -> {after:,.0f} images/s on one core "
        f"({len(numbers)} images, in memory, random crops to {side} px)"
    )


def _images_per_second(read: Callable[[int], index.Sample], numbers: np.ndarray, side: int, how: Decoding) -> float:
    """Images that one core reads, decodes and crops as pretraining does; the disk's time does not count."""
    import torch

    from mae_dist.data.views import View
    from mae_dist.schema import ViewConfig
    from mae_dist.verify.data_benchmark import Cropping

    torch.set_num_threads(1)
    view = View(ViewConfig(), side, (0.0,) * how.channels, (1.0,) * how.channels, seed=0, training=True)
    parts = Cropping(read, view, how, numbers)
    start = time.thread_time()
    parts.read()
    parts.decode_and_crop()
    return len(parts.readable) / (time.thread_time() - start)
