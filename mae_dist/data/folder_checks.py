"""What is wrong in the layout of a folder, or may be a mistake: refused, or logged. Imports no torch."""

import logging
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from mae_dist.data.folder_files import File, Found
from mae_dist.data.folder_words import SPLITS, listed, parts_of_others
from mae_dist.data.labels import NAME, class_in_name, of_text

log = logging.getLogger(__name__)

Named = dict[str, list[tuple[File, str | None]]]
"""The images of each split, each with the name of its class (None: no label)."""


def classes_of(files: list[tuple[File, str | None]]) -> set[str]:
    """The names of the classes of these images."""
    return {name for _, name in files if name is not None}


def join(base: str, name: str) -> str:
    """The path of `name` in the folder `base` (empty: there is none above it)."""
    return f"{base}/{name}" if base else name


def check_classes(source: Path, named: Named, by_list: set[str]) -> None:
    """Raise ValueError for names that are not UTF-8, that splits write in different ways, or that are of two kinds."""
    for name in sorted(set().union(*map(classes_of, named.values()))):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"--source {source}: the class {name!r} has a name that is no text in UTF-8; rename it")
    spellings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for split, files in named.items():
        for name in classes_of(files):
            spellings[unicodedata.normalize("NFC", name).casefold()][name].add(split)
    for ways in (ways for ways in spellings.values() if len(ways) > 1):
        if not set.intersection(*ways.values()):
            where = " and ".join(f"{name!r} in {listed(sorted(splits))}" for name, splits in ways.items())
            raise ValueError(f"--source {source}: one class has two names, {where}; rename one of them")
        log.warning("%s: classes whose names are almost equal stay apart: %s", source, listed(map(repr, ways)))
    by_folder = set().union(*(classes_of(files) for split, files in named.items() if split not in by_list))
    for split in by_list:
        if not by_folder:
            _check_labels(split, classes_of(named[split]))
        if by_folder and (given := classes_of(named[split])) and not given & by_folder:
            raise ValueError(
                f"--labels: labels of split {split} ({listed(sorted(given))}) are no class folders of the others "
                f"({listed(sorted(by_folder))}); write the folders' names into the list"
            )


def _check_labels(split: str, names: set[str]) -> None:
    """Raise ValueError for a label of a list that is neither a class number nor a name: -2, 0.5, text without end."""
    for name in sorted(names):
        try:
            of_text(name.encode())
        except ValueError as error:
            raise ValueError(f"--labels: a row of split {split} {error}") from error


def check_links(source: Path, named: Named, meant: bool) -> None:
    """Log how many images are links to the same file as another. Raises ValueError where that is in another split,
    unless the splits are ``meant`` so.
    """
    first: dict[tuple[int, int], tuple[str, str, str | None]] = {}
    twins: dict[str, list[str]] = defaultdict(list)
    for split, files in named.items():
        for file, name in files:
            here = split, file.path, name
            before = here if file.inode is None else first.setdefault(file.inode, here)
            if before is not here:
                kind = "split" if before[0] != split else "class" if before[2] != name else ""
                twins[kind].append(f"{before[1]} and {file.path}")
    if (shared := twins.pop("split", None)) and not meant:
        splits = ",".join(f"{split}={split}" for split in named)
        raise ValueError(
            f"--source {source}: {len(shared)} files are images of two splits by links, {shared[0]} first; remove the "
            f"links, or name the splits with --splits, as --splits {splits}, if that is meant"
        )
    for kind, pairs in {"split": shared or [], **twins}.items():
        if pairs:
            where = f" in another {kind}" if kind else ""
            log.warning("%s: %d images are links to the file of one%s: %s", source, len(pairs), where, pairs[0])


def warn(source: Path, found: Found, folders: dict[str, str], named: Named, by_list: set[str]) -> None:
    """Log what may be a mistake: files and folders left out, classes without images, images without labels (in splits
    of ``by_list``, reading their list has logged those).
    """
    used = {f.path for files in named.values() for f, _ in files}
    if unused := [f.path for f in found.files if f.path not in used]:
        log.warning("%s: %d images, of no split, are left out: %s", source, len(unused), listed(unused))
    classes = set().union(*map(classes_of, named.values()))
    if not classes and (lists := sorted(found.lists, key=lambda path: (path.count("/"), path))):
        more = ", or --splits SPLIT=FILE,... where each split has one" if len(lists) > 1 else ""
        log.warning("%s: no labels; perhaps %s has them: --labels FILE%s", source, " or ".join(lists[:3]), more)
    begins = Counter(class_in_name(path) for path in used)
    if not classes and 1 < len(begins.keys() - {None, *SPLITS}) <= 0.5 * (begins.total() - begins[None]):
        some = listed(sorted(filter(None, begins)))
        log.warning("%s: no labels; if names of images begin with classes (%s): --labels %s", source, some, NAME)
    for split, files in named.items():
        here = classes_of(files)
        unlabelled = sum(name is None and not f.problem for f, name in files)
        if classes and unlabelled and split not in {"test", *by_list}:
            log.warning(
                "split %s: %d of %d images get no label (--labels FILE gives some)", split, unlabelled, len(files)
            )
        if here and (absent := classes - here):
            log.warning("%s: split %s has no image of %d classes, %s first", source, split, len(absent), min(absent))
        inside = {f for f in found.folders if f and os.path.dirname(f) == folders[split]} - set(folders.values())
        full = {join(folders[split], f.path[len(folders[split]) :].lstrip("/").split("/")[0]) for f, _ in files}
        if empty := sorted(inside - full):
            log.warning("%s: folders without images are no classes: %s", source, listed(empty))
    labelled = sum(name is not None for files in named.values() for _, name in files)
    if 2 * len(classes) > labelled > 4:
        log.warning("%s: %d classes of %d images: these labels may be captions or ids", source, len(classes), labelled)
    if parts := parts_of_others({os.path.splitext(path)[0] for path in used}):
        what = "images may be parts of others, as masks are, and are taken as images"
        log.warning("%s: %d %s: %s", source, len(parts), what, listed(parts))
    if len(classes) == 1:
        log.warning("%s: all labelled images have one class, %s (--labels FILE gives others)", source, *classes)
