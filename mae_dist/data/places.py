"""Where the tars of a split lie: from the folders and tars that data.path names to paths. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mae_dist import paths
from mae_dist.data.dataset import FILE, Dataset, Shard
from mae_dist.data.remote import shown


class Place(NamedTuple):
    """Where a tar of a split lies: its path, that of its index, what is known of it, and its data set."""

    tar: Path
    idx: Path
    shard: Shard | None
    dataset: Dataset


def splits(path: str) -> list[str]:
    """The splits that all folders in `path` have; none where it names tars. ValueError for what is not there."""
    folders = [Path(name) for part in paths.parts(path) for name in paths.names(part)]
    if not all((folder / FILE).is_file() for folder in folders):
        return []
    first, *others = [Dataset.load(folder).splits for folder in folders]
    return [name for name in first if all(name in other for other in others)]


def evaluation_split(path: str, split: str) -> str:
    """The split to evaluate on: `split`, or, where that is `auto`, val, if the folders in `path` have it, else test."""
    return split if split != "auto" else "val" if "val" in splits(path) else "test"


def of_split(path: str, split: str) -> list[list[Place]]:
    """Where the tars of a split lie, of which none need exist, for each data set of `path` in the order of its folders
    and tars. Raises ValueError where `path` names nothing.
    """
    try:
        parts = [paths.names(part) for part in paths.parts(path)]
    except ValueError as error:
        raise ValueError(f"data.path={path}: {str(error).removeprefix(f'{path}: ')}") from error
    listed_in = functools.cache(_listed_in)
    return [[*_of_split(names, split, listed_in)] for names in parts]


def _of_split(
    names: list[str], split: str, listed_in: Callable[[Path], tuple[Dataset, dict[Path, Shard]]]
) -> Iterator[Place]:
    for name in names:
        if paths.is_url(name):
            raise ValueError(
                f"data.path={shown(name)}: a URL is indexed first: `mae-dist data index URL --out DIR`, then "
                f"data.path=DIR"
            )
        folder = Path(name)
        if not (folder / FILE).is_file():
            for tar in map(Path, paths.tars_in(name) if folder.is_dir() else [name]):
                dataset, listed = listed_in(tar.parent)
                shard = listed.get(tar)
                index = tar.with_suffix(".idx") if shard is None else tar.parent / shard.index_name
                yield Place(tar, index, shard, dataset)
            continue
        dataset = Dataset.load(folder)
        if split not in dataset.splits:
            raise ValueError(f"{folder / FILE}: has no split {split!r}, only {', '.join(sorted(dataset.splits))}")
        for shard in dataset.splits[split]:
            tar = Path(shown(shard.tar)) if shard.remote else folder / shard.tar
            yield Place(tar, folder / shard.index_name, shard, dataset)


def _listed_in(folder: Path) -> tuple[Dataset, dict[Path, Shard]]:
    """The data set of a folder, and what it knows of each tar."""
    if not (folder / FILE).is_file():
        return Dataset(name=str(folder)), {}
    dataset = Dataset.load(folder)
    return dataset, {folder / shard.tar: shard for listed in dataset.splits.values() for shard in listed}
