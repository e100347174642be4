"""Where the tars of a split lie: from the folders and tars that data.path names to paths. Imports no torch."""

import functools
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dist import paths
from mae_dist.data.dataset import FILE, Dataset, Shard
from mae_dist.data.remote import shown
from mae_dist.printed import counted

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a tar of a split lies: its path, that of its index, what is known of it, its data set, and, of a tar that
    data.path names by itself, the split that dataset.json or its name say (empty: none).
    """

    tar: str
    idx: str
    shard: Shard | None
    dataset: Dataset
    split: str = ""


class Paths(Sequence[Path]):
    """Paths that are kept as texts, as there may be 10^5: each becomes a Path when it is asked for."""

    def __init__(self, paths: Iterable[str | Path]):
        self.texts = paths.texts if isinstance(paths, Paths) else [os.fspath(path) for path in paths]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Path:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Path(self.texts[number])


class Files:
    """Which files there are, and which are links, from one listing of each folder instead of a question a file."""

    def __init__(self):
        self._files = set[str]()
        self._links: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        if path in self._files:
            return True
        self.links(folder := path[: path.rfind("/") + 1])
        return path in self._files if folder in self._links else os.path.isfile(path)

    def links(self, folder: str) -> set[str]:
        """The links in a folder, whose path ends with "/" or is empty; none where it cannot be listed."""
        if folder not in self._links:
            links = set[str]()
            try:
                for entry in os.scandir(folder or "."):
                    if entry.is_file():
                        self._files.add(folder + entry.name)
                    if entry.is_symlink():
                        links.add(folder + entry.name)
            except OSError:
                return set()
            self._links[folder] = links
        return self._links[folder]


def splits(path: str) -> list[str]:
    """The splits that all folders in `path` have; none where it names tars. ValueError for what is not there."""
    folders = [name for part in paths.parts(path) for name in paths.names(part)]
    if not all(os.path.isfile(os.path.join(folder, FILE)) for folder in folders):
        return []
    first, *others = [Dataset.load(Path(folder)).splits for folder in folders]
    return [name for name in first if all(name in other for other in others)]


def evaluation_split(path: str, split: str) -> str:
    """The split to evaluate on: `split`, or, where that is `auto`, val, if the folders in `path` have it, else test."""
    return split if split != "auto" else "val" if "val" in splits(path) else "test"


def of_split(path: str, split: str, files: Files | None = None) -> list[list[Place]]:
    """Where the tars of a split lie, of which none need exist, for each data set of `path` in the order of its folders
    and tars. Raises ValueError where `path` names nothing.
    """
    files, listed_in = files or Files(), functools.cache(_listed_in)
    try:
        parts = [paths.names(part) for part in paths.parts(path)]
    except ValueError as error:
        raise ValueError(f"data.path={path}: {str(error).removeprefix(f'{path}: ')}") from error
    if not any(parts):
        raise ValueError(f"data.path={path}: names no data; give a folder, tars, or a list of them")
    return [[*_of_split(names, split, files, listed_in)] for names in parts]


def refuse_outside(path: str, places: Iterable[Place], allowed: bool, files: Files | None = None) -> None:
    """Raise ValueError where files of `path` lie `outside`, or warn where that is allowed."""
    if away := outside(places, files or Files()):
        found = f"outside the folder of their data set, by {FILE} or a link: {counted(len(away), 'file')}"
        if not allowed:
            raise ValueError(
                f"data.path={path}: {found} (first {away[0]}): data.allow_outside=true reads them, or index them again "
                f"with `mae-dist data index`, which then remembers that they are yours"
            )
        log.warning("%s (first %s)", found, away[0])


def outside(places: Iterable[Place], files: Files) -> list[str]:
    """The tars and indexes that are not in the folder of their index or below it, by an absolute path, `..` or a link,
    although `data index` did not write the dataset.json there: it was brought by somebody, who may want to read more.
    """
    inode, is_inside = functools.cache(_inode), functools.cache(_is_inside)
    found = []
    for tar, index, shard, dataset, _ in places:
        home = index[: index.rfind("/") + 1]
        if dataset.folder is not None and dataset.folder == inode(home):
            continue
        if tar.rfind("/") + 1 == len(home) and tar.startswith(home) and not files.links(home):
            continue  # beside its index: the usual case, of which there may be 10^5
        for file in [index] if shard is not None and paths.is_url(shard.tar) else [tar, index]:
            folder = file[: file.rfind("/") + 1]
            if not is_inside(file if file in files.links(folder) else folder, home):
                found.append(file)
    return found


def _is_inside(path: str, home: str) -> bool:
    """Whether a path, with links followed, is a folder or below it."""
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(os.path.realpath(home), ""))


def _inode(folder: str) -> int | None:
    return os.stat(folder or ".").st_ino if os.path.isdir(folder or ".") else None


def mixed_splits(path: str, found: Iterable[Place]) -> list[str]:
    """The splits of tars that a pattern in `path` has caught, if these are several, so that it may have caught more
    than it was meant to. None where the text has the words of all of them, as `d/{train,val}-*.tar`.
    """
    several = sorted({place.split for place in found} - {""})
    meant = {*paths.splits_of(path)}.issuperset(several) or not any(map(glob.has_magic, paths.parts(path)))
    return several if len(several) > 1 and not meant else []


def _of_split(
    names: list[str], split: str, files: Files, listed_in: Callable[[str], tuple[Dataset, dict[str, tuple[str, Shard]]]]
) -> Iterator[Place]:
    for name in names:
        if paths.is_url(name):
            raise ValueError(
                f"data.path={shown(name)}: a URL is indexed first: `mae-dist data index URL --out DIR`, then "
                f"data.path=DIR"
            )
        name = str(Path(name))
        if name.lower().endswith(paths.BESIDE_TARS) and name in files:
            raise ValueError(f"data.path={name}: is no tar; name the folder that it is in, or tars")
        if name in files or not os.path.isfile(os.path.join(name, FILE)):
            for tar in [name] if name in files or not os.path.isdir(name) else paths.tars_in(name):
                folder, file = os.path.split(tar)
                dataset, listed = listed_in(folder)
                known, shard = listed[file] if file in listed else ("".join(paths.splits_of(file)[-1:]), None)
                index = f"{os.path.splitext(tar)[0]}.idx" if shard is None else os.path.join(folder, shard.index_name)
                yield Place(tar, index, shard, dataset, known)
            continue
        dataset = Dataset.load(Path(name))
        if split not in dataset.splits:
            raise ValueError(
                f"{os.path.join(name, FILE)}: has no split {split!r}, only {', '.join(sorted(dataset.splits))}"
            )
        folder = os.path.join(name, "")
        for shard in dataset.splits[split]:
            below = "" if shard.tar[0] == "/" else folder
            tar = shown(shard.tar) if paths.is_url(shard.tar) else below + shard.tar
            yield Place(tar, folder + shard.index_name, shard, dataset)


def _listed_in(folder: str) -> tuple[Dataset, dict[str, tuple[str, Shard]]]:
    """The data set of a folder, and what it knows of each tar: its split, and its shard."""
    if not os.path.isfile(os.path.join(folder, FILE)):
        return Dataset(name=folder or "."), {}
    dataset = Dataset.load(Path(folder))
    return dataset, {shard.tar: (name, shard) for name, listed in dataset.splits.items() for shard in listed}
