"""`mae-dist data index`: index tars that exist, as a split of a data set. Imports no torch."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist import paths
from mae_dist.commands import data_remote, index_checks
from mae_dist.commands.data_output import progress, report
from mae_dist.data import index, indexing, label_list, labels, split_checks
from mae_dist.data.cache import Cache
from mae_dist.data.decode import stored_size
from mae_dist.data.indexing import AUTO, FOLDER, JSON, LIST, Indexed
from mae_dist.data.label_list import Image, LabelList
from mae_dist.data.labels import Label
from mae_dist.data.pack import ProgressCallback, safe_name
from mae_dist.data.remote import shown
from mae_dist.errors import from_os_error

log = logging.getLogger(__name__)

UNREAD = "some tars have an .idx beside them, so they were not read: classes and checksums may be unknown (--whole)"
TRAIN = "train"
"""The split where neither --split nor the names of tars say it."""


def add_parser(actions: Any) -> None:
    """Add the parser of `index` to those of `mae-dist data`."""
    parser = actions.add_parser("index", help="index existing tars")
    parser.add_argument(
        "tars", nargs="+", metavar="TARS", help="folders, patterns or brace ranges, for example 'data/{000..146}.tar'"
    )
    parser.add_argument(
        "--split", help="name of their split in dataset.json (default: those in the names of the tars, else train)"
    )
    parser.add_argument("--out", type=Path, help="folder for indexes and dataset.json (default: that of the tars)")
    parser.add_argument(
        "--labels", default=AUTO, metavar="SOURCE",
        help="where labels are: folder (in the tar; folder:1 the first, folder:-1 the last), name (cat.12.jpg), "
        "json:FIELD, the extension of members (txt, npy), a FILE of names and labels, none (default: .cls members)",
    )  # fmt: skip
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names in the order of their numbers")
    parser.add_argument("--whole", action="store_true", help="read tars at URLs although an .idx lies beside them")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Index the tars, and add them to dataset.json as a split. Raises ValueError for a user's mistake."""
    if (split := arguments.split) is not None and (split != safe_name(split) or not split):
        raise ValueError(f"--split {split!r}: names files; use letters, digits, _ and - only")
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

    def merge(dataset: index.Dataset, tick: ProgressCallback) -> index.Dataset:
        for split, some in _by_split([*map(str, tars)], arguments.split).items():
            dataset = _merge(dataset, split, arguments, [*map(Path, some)], folder, tick)
        return dataset

    report(_write(folder, merge), folder)


def _write(folder: Path, merge: Callable[[index.Dataset, ProgressCallback], index.Dataset]) -> index.Dataset:
    """Write the dataset.json of a folder, as `merge` makes it from the one that is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _known(folder)
        if before.names_outside(folder):
            raise ValueError(
                f"{folder / index.FILE}: came from elsewhere and names tars outside; move it away, and index "
                f"all tars again"
            )
        with progress() as tick:
            dataset = merge(before, tick)
        with _lock(folder):
            if _known(folder) != before:
                raise ValueError(f"{folder / index.FILE}: another command has written it meanwhile; run this one again")
            replace(dataset, folder=folder.stat().st_ino).save(folder)
    except OSError as error:
        what = f"{folder}: cannot be written ({error.strerror or error}); pass --out DIR for the index"
        raise from_os_error(error, what) from error
    return dataset


def _known(folder: Path) -> index.Dataset:
    return index.Dataset.load(folder) if (folder / index.FILE).is_file() else index.Dataset(name=folder.name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Context in which no other process is that locks this folder, if its file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _merge_remote(
    before: index.Dataset, urls: list[str], arguments: argparse.Namespace, tick: ProgressCallback
) -> index.Dataset:
    """Index tars at `urls`; return `before` with their splits, and the facts of a dataset.json that lists them all."""
    cache, dataset = Cache.of(None), before
    by_split = [data_remote.tars_of(some, split) for split, some in _by_split(urls, arguments.split).items()]
    splits = {split: tars for known in by_split for split, tars in known.items()}
    for split, tars in splits.items():
        _tell_of_split(before, split, [tar.url for tar in tars], arguments.out, arguments)
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
        Path(os.path.abspath(tar))
        for name in names
        for tar in (paths.tars_in(name, one_split=False) if os.path.isdir(name) else [name])
    )
    seen: dict[tuple[int, int], Path] = {}
    for tar in tars:
        status = tar.stat()
        if (twin := seen.setdefault((status.st_dev, status.st_ino), tar)) is not tar:
            raise ValueError(f"{' '.join(texts)}: {twin} is in it twice" + (f", also as {tar}" if tar != twin else ""))
    return tars


def _by_split(tars: list[str], split: str | None) -> dict[str, list[str]]:
    """The tars of each split: of `split`, else of those that the names of all tars speak of, else of train. Raises
    ValueError where only some speak of several.
    """
    common = os.path.commonpath([os.path.dirname(tar) for tar in tars])
    spoken = [(paths.splits_of(os.path.relpath(tar, common)) or [""])[-1] for tar in tars]
    if split is not None or len({*spoken} - {""}) < 2:
        return {split or TRAIN: tars}
    if "" in spoken:
        raise ValueError(
            f"tars of several splits by name ({', '.join(sorted({*spoken} - {''}))}), and some of none "
            f"({shown(tars[spoken.index('')])} first); index the tars of each split with --split NAME"
        )
    found = {name: [t for t, own in zip(tars, spoken, strict=True) if own == name] for name in paths.SPLITS.values()}
    log.info(
        "splits by the names of tars: %s", ", ".join(f"{len(some)} {name}" for name, some in found.items() if some)
    )
    return {name: some for name, some in found.items() if some}


def _tell_of_split(
    before: index.Dataset, split: str, tars: list[str], folder: Path, arguments: argparse.Namespace
) -> None:
    """Log where a split is replaced, though tars are there that are not among `tars` (as in `Shard.tar`), and where
    the names of `tars` speak of another one. Raises ValueError where it is replaced and --split was not given.
    """
    here = {*map(shown, tars)}
    known = [shard for shard in before.splits.get(split, []) if shown(shard.tar) not in here]
    lost = [shard for shard in known if paths.is_url(shard.tar) or (folder / shard.tar).exists()]
    spoken = paths.splits_in([os.path.basename(tar) for tar in tars])
    other = spoken[0] if len(spoken) == 1 and spoken[0] != split else ""
    if lost:
        images = sum(shard.num_samples for shard in lost)
        what = f"split {split} has {images:,} images in other tars (first {shown(lost[0].tar)})"
        if arguments.split is None:
            raise ValueError(
                f"{folder / index.FILE}: {what}; --split {other or 'NAME'} makes these tars another split, --split "
                f"{split} leaves only these in it"
            )
        log.warning("%s, which is left with these alone", what)
    if other and arguments.split is None:
        log.warning("these tars become split %s, though by name they are %s (--split %s)", split, other, other)


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


def _merge(
    before: index.Dataset, split: str, arguments: argparse.Namespace, tars: list[Path], folder: Path,
    tick: ProgressCallback,
) -> index.Dataset:  # fmt: skip
    """Index `tars` into `folder`; return `before` with these tars as its `split`."""
    source = arguments.labels
    source = paths.with_variables(source) if "/" in source else source
    _tell_of_split(before, split, [_listed_as(tar, folder) for tar in tars], folder, arguments)
    others = {name: known for name, known in before.splits.items() if name != split}
    names = _index_names(tars, {shard.index_name for known in others.values() for shard in known})
    listed = label_list.read(Path(source)) if os.path.isfile(source) else None
    if source.lower().lstrip(".") == JSON.rstrip(":"):
        raise ValueError(f"--labels {source}: name the field, {JSON}FIELD, or {JSON}A.B of an object A")
    if listed is None and "/" in source:
        raise ValueError(f"--labels {source}: no such file")
    by_folder = source.partition(":")[0] == FOLDER
    level, found, known = labels.level_of(source) if by_folder else None, [], before.classes if others else None
    for number, (tar, name) in enumerate(zip(tars, names, strict=True)):
        found.append(indexing.build(tar, folder / name, LIST if listed else FOLDER if by_folder else source))
        tick("index", number + 1, len(tars))
    index_checks.report_notes(found)
    if listed is not None:
        present = split_checks.labels_of(before, others)
        found = _with_labels(found, _of_list(listed, tars, found, present))
    elif by_folder:
        found = _with_labels(found, labels.of_folders([item.labels for item in found], level, known or ()))
        if level is None and arguments.classes is None and known is None:
            index_checks.refuse_doubtful_folders(found)
    else:
        index_checks.report_doubtful_folders(found, split)
    index_checks.refuse_mixed_labels(found, before, others, arguments.classes)
    values, classes = _numbers(found, known, arguments.classes)
    index_checks.report_labels(found, values, split, classes, source)
    shards = [
        _shard(item.shard, tar, folder, name, value, item.plain)
        for item, tar, name, value in zip(found, tars, names, values, strict=True)
    ]
    index_checks.report_twins(shards, split, others)
    num_classes = max(1 + max(int(value.max()) for value in values), len(classes or ()))
    data = index.ShardIndex(tars, [folder / name for name in names], shards, index.Dataset(""))
    dataset = _with_split(before, split, shards, num_classes, _common_size(data, tick), classes)
    return replace(dataset, label_counts=before.label_counts | {split: labels.counts(values)})


def _with_labels(found: Sequence[Indexed], values: Sequence[list[Label]]) -> list[Indexed]:
    return [replace(item, labels=value) for item, value in zip(found, values, strict=True)]


def _of_list(
    listed: LabelList, tars: list[Path], found: Sequence[Indexed], others: Collection[int]
) -> list[list[Label]]:
    """The labels that a list gives to the images of the tars; those from 1 are moved to 0, see `first_number` for the
    labels of other splits.
    """
    images = [Image(f"{tar}/{name}", str(name)) for tar, item in zip(tars, found, strict=True) for name in item.labels]
    rows = listed.rows_of(images)
    listed.check(images, rows, "these tars")
    first = label_list.first_number([listed], others)
    given = [labels.NONE if row is None else listed.number_or_name(row) for row in rows]
    values = iter([max(label - first, labels.NONE) if isinstance(label, int) else label for label in given])
    return [[*itertools.islice(values, len(item.labels))] for item in found]


def _with_split(
    before: index.Dataset,
    split: str,
    shards: list[index.Shard],
    num_classes: int,
    size: tuple[int, int] | None,
    classes: list[str] | None = None,
) -> index.Dataset:
    """`before` with these shards as its split `split`.

    Its labels have the names `classes`, if they have any. Facts of a replaced split are dropped: mean and std if it is
    train, and class names if there are more classes.
    """
    others = {name: known for name, known in before.splits.items() if name != split}
    if others or before.classes:
        num_classes = max(num_classes, before.num_classes or 0)
    return index.Dataset(
        name=before.name,
        splits=before.splits | {split: shards},
        num_classes=num_classes or None,
        classes=classes or (before.classes if num_classes == before.num_classes else None),
        image_size=size if not others or size == before.image_size else None,
        mean=before.mean if split != "train" else None,
        std=before.std if split != "train" else None,
        white=before.white,
        channels=before.channels,
        label_counts={name: counts for name, counts in before.label_counts.items() if name != split},
    )


def _numbers(
    found: Sequence[Indexed], known: list[str] | None, file: Path | None
) -> tuple[list[np.ndarray], list[str] | None]:
    """The labels of the tars as numbers, and the names of the classes, if they have any."""
    raw = [item.labels for item in found]
    named = file is not None or any(isinstance(label, str) for tar in raw for label in tar)
    numbers = labels.names_of_file(file) if file else {name: number for number, name in enumerate(known or ())}
    try:
        return labels.numbered(raw, numbers if named else None, fixed=file is not None)
    except ValueError as error:
        raise ValueError(f"--classes {file}: {error}" if file else str(error)) from error


def _listed_as(tar: Path, folder: Path) -> str:
    return str(tar.relative_to(folder) if tar.is_relative_to(folder) else tar)


def _shard(shard: index.Shard, tar: Path, folder: Path, name: str, values: np.ndarray, plain: bool) -> index.Shard:
    """The shard as dataset.json lists it; its labels are written where they are no plain .cls members."""
    if plain:
        labels.file_of(folder / name).unlink(missing_ok=True)
    return replace(
        shard,
        tar=_listed_as(tar, folder),
        index="" if name == f"{tar.stem}.idx" else name,
        labels="" if plain else labels.write(folder / name, values),
        num_labelled=int((values >= 0).sum()),
    )


def _common_size(data: index.ShardIndex, tick: ProgressCallback) -> tuple[int, int] | None:
    """(height, width) if all images have one size, else None. Reads headers only, until two differ."""
    first = stored_size(data.read(0))
    for sample in range(1, len(data)):
        if first is None or stored_size(data.read(sample)) != first:
            return None
        tick("sizes", sample + 1, len(data))
    return first
