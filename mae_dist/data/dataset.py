"""dataset.json: the splits of a data set, their tars, and what is known of its labels and pixels. Imports no torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mae_dist.atomic import replacing

log = logging.getLogger(__name__)

FORMAT = "mae_dist dataset 1"
FILE = "dataset.json"
MOST_SAMPLES = 10**8
"""Samples that a tar may have."""
MOST_CLASSES = 10**7
"""Classes that a data set may have: a number beyond is that of something else."""


@dataclass(frozen=True)
class Shard:
    """One tar file: ``tar`` is its path, relative to dataset.json or absolute; ``sha256`` is empty if not computed.

    ``index`` is the name of its index beside dataset.json, if it is not that of the tar with .idx. ``labels`` is the
    hash of a file of labels beside the index (see `labels`); empty: the labels are the .cls members.
    """

    tar: str
    num_samples: int
    num_labelled: int
    num_bytes: int
    sha256: str
    index: str = ""
    labels: str = ""

    @property
    def index_name(self) -> str:
        """The name of its index beside dataset.json."""
        return self.index or f"{Path(self.tar).stem}.idx"


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    ``splits`` maps a split's name to its shards; ``classes`` names the labels 0..n-1; ``image_size`` is (height, width)
    when all images share one; ``mean`` and ``std`` are channel statistics of the training split in 0..1; ``white`` is
    the stored value that is white, where pixels have more than 8 bits and packing was told so.
    """

    name: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    num_classes: int | None = None
    classes: list[str] | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    white: float | None = None

    def save(self, folder: Path) -> None:
        """Write dataset.json into `folder`, atomically."""
        with replacing(folder / FILE) as work:
            work.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Dataset:
        """Read dataset.json from `folder`. Raises ValueError when it is missing or damaged."""
        path = folder / FILE
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        if not path.is_file():
            raise ValueError(f"data.path={folder}: no {FILE} in it; `mae-dist data index {folder}` makes one")
        try:
            return _parsed(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a {FORMAT!r} file ({str(error)[:200]}); make it anew with `mae-dist data index`"
            ) from error


def united(datasets: Sequence[Dataset]) -> Dataset:
    """What holds for several data sets together; their splits are left out. Classes that differ are left out, with a
    warning: such data sets are fit for what needs no labels.
    """
    first, *others = datasets
    if not others:
        return first
    alike = all((other.classes, other.num_classes) == (first.classes, first.num_classes) for other in others)
    if not alike or (first.classes is None and first.num_classes is not None):
        what = "are taken as the same numbers" if alike else "differ, so labels are left out"
        log.warning("%s and %d more data sets: their classes %s", first.name, len(others), what)
    sizes = {dataset.image_size for dataset in datasets}
    statistics = {(dataset.mean, dataset.std, dataset.white) for dataset in datasets}
    mean, std, white = statistics.pop() if len(statistics) == 1 else (None, None, None)
    return Dataset(
        first.name, {}, first.num_classes if alike else None, first.classes if alike else None,
        sizes.pop() if len(sizes) == 1 else None, mean, std, white,
    )  # fmt: skip


def _parsed(plain: Any) -> Dataset:
    if plain.pop("format") != FORMAT:
        raise ValueError("another format")
    plain["splits"] = {name: [_shard(**shard) for shard in shards] for name, shards in plain["splits"].items()}
    for name in ("image_size", "mean", "std"):
        plain[name] = None if plain[name] is None else tuple(plain[name])
    dataset = Dataset(**plain)
    _check(isinstance(dataset.name, str), "name", "a text")
    _check(all(type(n) is int and n > 0 for n in dataset.image_size or ()), "image_size", "two whole numbers")
    _check(len(dataset.image_size or (1, 1)) == 2, "image_size", "two whole numbers")
    _check(all(0 <= value <= 1 for value in dataset.mean or ()), "mean", "numbers from 0 to 1")
    _check(all(0 <= value < math.inf for value in dataset.std or ()), "std", "numbers from 0")
    _check(dataset.white is None or 0 < dataset.white < math.inf, "white", "a number above 0")
    _check(len(dataset.mean or ()) == len(dataset.std or ()), "std", "as many numbers as mean")
    _check(dataset.num_classes is None or 0 < dataset.num_classes <= MOST_CLASSES, "num_classes", "a number of classes")
    _check(all(isinstance(name, str) for name in dataset.classes or ()), "classes", "a list of names")
    return dataset


def _shard(**plain: Any) -> Shard:
    shard = Shard(**plain)
    texts = shard.tar, shard.sha256, shard.index, shard.labels
    numbers = shard.num_samples, shard.num_labelled, shard.num_bytes
    _check(all(type(text) is str for text in texts) and shard.tar != "", "splits", "shards whose tar is a path")
    _check(all(type(number) is int and number >= 0 for number in numbers), "splits", "whole numbers of samples")
    _check(shard.num_samples <= MOST_SAMPLES, f"num_samples of {shard.tar}", f"at most {MOST_SAMPLES}")
    return shard


def _check(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: must be {expected}")
