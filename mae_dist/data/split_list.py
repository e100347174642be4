"""Which images a list in a file says are of a split: rows IMAGE, all of one split, or IMAGE,SPLIT. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mae_dist import paths
from mae_dist.data import label_list
from mae_dist.data.label_list import LabelList
from mae_dist.data.labels import NAMES

COLUMNS = ("split", "set", "subset", "partition")
"""Words that head the column of splits, the best first."""
TRAIN_TEST = "train_test_split.txt"
"""The list of CUB-200 and NABirds, in which 1 is train and 0 is test."""


def by_split(file: Path) -> dict[str, list[str]]:
    """The images of each split in a list IMAGE,SPLIT; those without a split are left out. Raises ValueError."""
    table, found = _read(file, COLUMNS), defaultdict[str, list[str]](list)
    words = paths.SPLITS | ({"1": "train", "0": "test"} if file.name == TRAIN_TEST else {})
    for image, word in zip(table.files or (), table.labels, strict=bool(table.files)):
        if word and word.lower() not in words:
            raise ValueError(f"--splits {file}: {word[:40]!r} is no split; write IMAGE,SPLIT with train, val or test")
        found[words.get(word.lower(), "")].append(image)
    found.pop("", None)
    if not found:
        raise ValueError(f"--splits {file}: names no split; write rows IMAGE,SPLIT, or --splits train={file}")
    return found


def images_of(file: Path) -> list[str]:
    """The images in the first column of a list. Raises ValueError where there are none."""
    table = _read(file, NAMES)
    names = label_list.with_images(file, table.labels) if table.files is None else table.files
    if not (found := [name for name in names if name.strip()]):
        raise ValueError(f"--splits {file}: names no image")
    return found


def _read(file: Path, words: Sequence[str]) -> LabelList:
    try:
        return label_list.read(file, words)
    except ValueError as error:
        raise ValueError(str(error).replace("--labels", "--splits", 1)) from error
