"""dataset.json: the splits of a data set, their tars, and what is known of its labels and pixels. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_dist import small_files
from mae_dist.atomic import replacing
from mae_dist.data.classes import Classes, Merging, merge
from mae_dist.data.remote import Remote, name_of
from mae_dist.paths import is_url

FORMAT = "mae_dist dataset 1"
FILE = "dataset.json"
MOST_SAMPLES = 10**8
"""Samples that a tar may have."""
MOST_CLASSES = 10**7
"""Classes that a data set may have: a number beyond is that of something else."""
NUMBER = (int, float)
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "a text"), "splits": ((dict,), "an object from split to tars"),
    "num_classes": ((int,), "a whole number"), "classes": ((list,), "a list of names"),
    "image_size": ((list,), "two whole numbers"), "mean": ((list,), "a list of numbers"),
    "std": ((list,), "a list of numbers"), "white": (NUMBER, "a number"), "channels": ((int,), "a whole number"),
    "label_counts": ((dict,), "an object from split to numbers"), "folder": ((int,), "a whole number"),
}  # fmt: skip
"""Types of the fields in the file, and what to call them."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: ``tar`` is its path, relative to dataset.json or absolute, or a URL; ``sha256`` is empty if not
    computed.

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
        if self.index:
            return self.index
        name = self.file_name
        stem = name[: max(0, name.rfind("."))]  # os.path.splitext is slower, and there may be 10^5
        return f"{stem if stem.strip('.') else name}.idx"

    @property
    def file_name(self) -> str:
        """The name of the tar, without folder."""
        return name_of(self.tar) if is_url(self.tar) else self.tar.rpartition("/")[2]

    @property
    def remote(self) -> Remote | None:
        """The tar as a file to download; None where its path is none of a URL."""
        return Remote(self.tar, self.num_bytes, self.sha256) if is_url(self.tar) else None


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    ``splits`` maps a split's name to its shards; ``classes`` names the labels 0..n-1; ``image_size`` is (height, width)
    when all images share one; ``channels`` is the number that packing made of each image, and ``mean`` and ``std`` are
    their statistics in the training split in 0..1; ``white`` is the stored value that is white, where pixels have more
    than 8 bits and packing was given it; ``label_counts`` is how many samples of a split have each label, from 0 on.
    ``folder`` is the inode of the folder that `mae-dist data index` wrote it into: in another one it was brought by
    somebody, who may not name tars outside.
    """

    name: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    num_classes: int | None = None
    classes: list[str] | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    white: float | None = None
    channels: int | None = None
    label_counts: dict[str, list[int]] = field(default_factory=dict)
    folder: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether packing has decoded the images, so that `channels` and `white` are those of their statistics."""
        return self.channels is not None

    def names_outside(self, folder: Path) -> bool:
        """Whether it was brought into this folder from another one and names tars outside by their paths."""
        tars = [shard.tar for shards in self.splits.values() for shard in shards if not is_url(shard.tar)]
        return self.folder != os.stat(folder).st_ino and any(t[0] == "/" or ".." in t.split("/") for t in tars)

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
        return Dataset.parse(small_files.read_text(path, small_files.MOST_JSON), str(path))

    @staticmethod
    def parse(text: str | bytes, path: str) -> Dataset:
        """Read the content of a dataset.json. Raises ValueError, which begins with ``path``, when it is damaged."""
        try:
            return _parsed(json.loads(text))
        except (ValueError, RecursionError) as error:
            problem = f"{'no JSON: ' if isinstance(error, json.JSONDecodeError) else ''}{str(error)[:200]}"
            raise ValueError(
                f"{path}: not a {FORMAT!r} file ({problem}); restore it from a copy, or move it away and run "
                f"`mae-dist data index TARS --split NAME` for each split (which knows no mean, std and class names)"
            ) from error


class Parts(NamedTuple):
    """How several data sets make one split: the number of shards of each; for each shard the new numbers of its classes
    (None: they stay); why their labels cannot be used together (empty: they can); and of which splits its tars are,
    where data.path may have caught several by mistake (see `places.mixed_splits`); and the names of the
    first data sets that know no mean and std.
    """

    sizes: list[int]
    labels: list[np.ndarray | None]
    problem: str = ""
    mixed: Sequence[str] = ()
    unmeasured: Sequence[str] = ()


def united(
    owners: Sequence[Dataset], shards: Sequence[Shard], merging: Merging
) -> tuple[Dataset, list[np.ndarray | None], str]:
    """What holds for the data sets of these shards together, without their splits; for each shard the new numbers of
    its classes (None: they stay); and why labels cannot be used together, or an empty text.

    Mean and std are pooled over all images, where all data sets know theirs. Raises ValueError where data sets were
    packed with different white values.
    """
    datasets, keys = {id(owner): owner for owner in owners}, [id(owner) for owner in owners]
    first, counts = owners[0], dict.fromkeys(keys, 0)
    if len(datasets) == 1:
        return first, [None] * len(shards), ""
    labelled = {key for key, d in datasets.items() if any(s.num_labelled for split in d.splits.values() for s in split)}
    for shard, key in zip(shards, keys, strict=True):
        counts[key] += shard.num_samples
        labelled |= {key} if shard.num_labelled else set()
    known = [Classes(d.name, d.num_classes, d.classes, key in labelled) for key, d in datasets.items()]
    merged = merge(known, merging)
    maps = dict(zip(datasets, merged.maps, strict=True))
    packed = [dataset for dataset in datasets.values() if dataset.is_packed] or [first]
    for name in ("white", "channels"):
        if len({getattr(dataset, name) for dataset in packed}) > 1:
            names = " and ".join(f"{dataset.name} ({getattr(dataset, name)})" for dataset in packed)
            raise ValueError(f"data.path: {names} were packed with different --{name}; pack them with the same")
    sizes = {dataset.image_size for dataset in datasets.values()}
    size, (mean, std) = sizes.pop() if len(sizes) == 1 else None, _pooled([*datasets.values()], [*counts.values()])
    white, channels = packed[0].white, packed[0].channels
    together = Dataset(first.name, {}, merged.number, merged.names, size, mean, std, white, channels)
    return together, [maps[key] for key in keys], merged.problem


def _pooled(
    datasets: Sequence[Dataset], counts: Sequence[int]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation over the images of all data sets, weighted by their counts."""
    known = [(dataset.mean, dataset.std) for dataset in datasets if dataset.mean is not None]
    if len(known) < len(datasets) or len({len(mean) for mean, _ in known}) > 1:
        return None, None
    means, stds = (np.array(values) for values in zip(*known, strict=True))
    mean = np.average(means, axis=0, weights=counts)
    std = np.sqrt(np.average(stds**2 + (means - mean) ** 2, axis=0, weights=counts))
    return tuple(mean.tolist()), tuple(std.tolist())


def _parsed(plain: Any) -> Dataset:
    if not isinstance(plain, dict) or (found := plain.pop("format", None)) is None:
        raise ValueError('it has no "format"')
    if found != FORMAT:
        raise ValueError(f"its format is {str(found)[:40]!r}")
    _check_names(plain, Dataset, "")
    for name, (kind, expected) in KINDS.items():
        optional = name not in ("name", "splits", "label_counts")
        value = plain.setdefault(name, {} if name == "label_counts" else None)
        _check((optional and value is None) or type(value) in kind, name, expected)
    plain["splits"] = {name: _shards(name, shards) for name, shards in plain["splits"].items()}
    _check_shards([shard for shards in plain["splits"].values() for shard in shards])
    for name in ("image_size", "mean", "std"):
        plain[name] = None if plain[name] is None else tuple(plain[name])
        _check(all(type(value) in NUMBER for value in plain[name] or ()), name, KINDS[name][1])
    if plain["channels"] is None and plain["mean"] is not None:
        plain["channels"] = len(plain["mean"])
    dataset = Dataset(**plain)
    _check(all(type(n) is int and n > 0 for n in dataset.image_size or ()), "image_size", "two whole numbers")
    _check(len(dataset.image_size or (1, 1)) == 2, "image_size", "two whole numbers")
    _check(all(0 <= value <= 1 for value in dataset.mean or ()), "mean", "numbers from 0 to 1")
    _check(all(0 <= value < math.inf for value in dataset.std or ()), "std", "numbers from 0")
    _check(dataset.white is None or 0 < dataset.white < math.inf, "white", "a number above 0")
    _check(len(dataset.mean or ()) == len(dataset.std or ()), "std", "as many numbers as mean")
    _check(dataset.channels is None or dataset.channels > 0, "channels", "a number above 0")
    _check(dataset.mean is None or len(dataset.mean) == dataset.channels, "mean", "a number for each of channels")
    _check(dataset.num_classes is None or 0 < dataset.num_classes <= MOST_CLASSES, "num_classes", "a number of classes")
    _check(all(isinstance(name, str) for name in dataset.classes or ()), "classes", "a list of names")
    _check(len(dataset.classes or ()) <= (dataset.num_classes or 0), "num_classes", "at least the number of classes")
    lists = [*dataset.label_counts.values()]
    _check(all(type(numbers) is list for numbers in lists), "label_counts", "numbers of samples by split")
    counts = [count for numbers in lists for count in numbers]
    _check(all(type(count) is int and count >= 0 for count in counts), "label_counts", "numbers of samples by split")
    return dataset


def _shards(split: str, plain: Any) -> list[Shard]:
    shards: list[dict[str, Any]] = plain
    is_list = isinstance(plain, list) and {*map(type, plain)} <= {dict}
    _check(is_list, f"splits.{split}", "a list of tars, each an object")
    try:
        return [Shard(**shard) for shard in shards]
    except TypeError:
        for shard in shards:
            _check_names(shard, Shard, f" in splits.{split}")
        raise


def _check_names(plain: dict[str, Any], kind: type[Dataset] | type[Shard], where: str) -> None:
    known = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
    needed = [name for name, is_needed in known.items() if is_needed]
    if missing := [name for name in needed if name not in plain]:
        raise ValueError(f"{missing[0]!r} is missing{where}")
    if unknown := [name for name in plain if name not in known]:
        raise ValueError(f"unknown field {unknown[0][:40]!r}{where}; was it written by a newer mae_dist?")


def _check_shards(shards: list[Shard]) -> None:
    """Check them column by column, as there may be 10^5."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in Shard.__slots__}
    texts = [columns[name] for name in ("tar", "sha256", "index", "labels")]
    numbers = [columns[name] for name in ("num_samples", "num_labelled", "num_bytes")]
    _check(all({*map(type, column)} <= {str} for column in texts), "splits", "shards whose tar is a path")
    _check(all(columns["tar"]), "splits", "shards whose tar is a path")
    _check(not any("/" in index for index in columns["index"]), "index", "a name in the folder")
    _check(all({*map(type, column)} <= {int} for column in numbers), "splits", "whole numbers of samples")
    _check(all(min(column, default=0) >= 0 for column in numbers), "splits", "whole numbers of samples")
    largest = max(shards, key=lambda shard: shard.num_samples, default=None)
    if largest is not None:
        _check(largest.num_samples <= MOST_SAMPLES, f"num_samples of {largest.tar}", f"at most {MOST_SAMPLES}")


def _check(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: must be {expected}")
