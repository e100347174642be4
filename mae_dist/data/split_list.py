"""Which images a list in a file says are of a split: rows IMAGE, all of one split, or IMAGE,SPLIT. Imports no torch."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

from mae_dist import paths
from mae_dist.data import label_list
from mae_dist.data.folder_checks import join
from mae_dist.data.folder_files import File
from mae_dist.data.label_list import Image, LabelList
from mae_dist.data.labels import NAMES

log = logging.getLogger(__name__)

COLUMNS = ("split", "set", "subset", "partition")
"""Words that head the column of splits, the best first."""
KNOWN = {
    "train_test_split": {"1": "train", "0": "test"},
    "list_eval_partition": {"0": "train", "1": "val", "2": "test"},
}  # fmt: skip
"""Lists of all splits, without extension, and the splits that their numbers are: of CUB-200 and NABirds, and CelebA."""
SUFFIXES = (".txt", ".csv", ".tsv")
WORDS = paths.SPLITS | {"trainval": "train"}
"""Words in the names of lists -> the split that they are of."""


def by_split(file: Path) -> dict[str, list[str]]:
    """The images of each split in a list IMAGE,SPLIT; those without a split are left out. Raises ValueError."""
    table, found = _read(file, COLUMNS), defaultdict[str, list[str]](list)
    words = paths.SPLITS | KNOWN.get(file.stem, {})
    for image, word in zip(table.files or (), table.labels, strict=bool(table.files)):
        if word and word.lower() not in words:
            raise ValueError(f"--splits {file}: {word[:40]!r} is no split; write IMAGE,SPLIT with train, val or test")
        found[words.get(word.lower(), "")].append(image)
    found.pop("", None)
    if not found:
        raise ValueError(f"--splits {file}: names no split; write rows IMAGE,SPLIT, or --splits train={file}")
    return found


def of_split(file: Path) -> LabelList:
    """The images in a list, with their labels if it has a column of these. Raises ValueError where there are none."""
    table = _read(file, NAMES)
    if table.files is None:
        names = label_list.with_images(file, [name for name in table.labels if name])
        table = LabelList(file, names, [""] * len(names))
    if not table.files:
        raise ValueError(f"--splits {file}: names no image")
    return table


def files_of(file: Path, whole: list[str], files: list[File]) -> list[File]:
    """The images that these names of a list are of: a whole row, or else its first word."""
    images, found, names = [Image(f.path, f.path) for f in files], dict[str, File](), list[str]()
    for names in (whole, [name.split()[0] for name in whole]):
        rows = LabelList(file, names, [""] * len(names)).rows_of(images)
        for image, row in zip(files, rows, strict=True):
            if row is not None and (twin := found.setdefault(row.file, image)) is not image:
                raise ValueError(
                    f"--splits {file}: {row.file} may be {twin.path} or {image.path}; write paths, "
                    f"or name the folder of the images as --source"
                )
        if found:
            break
    if missing := [name for name in names if os.path.normpath(name) not in found]:
        what = f"--splits {file}: {len(missing)} of its {len(names)} rows name no image ({missing[0]!r} first)"
        if not found:
            raise ValueError(what)
        log.warning("%s", what)
    return [*found.values()]


def folders_of(inner: dict[str, list[str]]) -> dict[str, str]:
    """The folder of each split whose images are in these folders: that which all have in common, or, where each split
    has one of its own in it, as train/ and val/, that.
    """
    common = os.path.commonpath([path for paths in inner.values() for path in paths]) if inner else ""
    tops = {split: {path[len(common) :].strip("/").split("/")[0] for path in paths} for split, paths in inner.items()}
    every = set().union(*tops.values())
    apart = len(tops) == len(every) == sum(map(len, tops.values())) > 1 and "" not in every
    return {split: join(common, min(names)) if apart else common for split, names in tops.items()}


def offered(source: Path, lists: Sequence[str], images: Sequence[str]) -> str:
    """What --splits may be by lists at or below `source`: one of all splits, or those of two splits or more, which have
    a split in their name and an image in their first rows. Empty where there are none.
    """
    known = (folder / f"{name}{end}" for folder in (source, source.parent) for name in KNOWN for end in SUFFIXES)
    if file := next(filter(Path.is_file, known), None):
        return str(file)
    stems = {os.path.splitext(os.path.basename(image))[0] for image in images}
    chosen: dict[str, str] = {}
    for path in sorted(lists, key=lambda path: (len(path), path)):
        splits = {WORDS[word] for word in re.findall("[a-z]+", Path(path).stem.lower()) if word in WORDS}
        if (
            path.endswith(SUFFIXES)
            and len(splits) == 1
            and not splits <= chosen.keys()
            and _names(source / path, stems)
        ):
            chosen[splits.pop()] = path
    named = [f"{split}={source / chosen[split]}" for split in ("train", "val", "test") if split in chosen]
    return ",".join(named) if len(named) > 1 else ""


def _names(file: Path, stems: Collection[str]) -> bool:
    """Whether one of the first lines of a list begins with an image that has one of these stems."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        names = [re.split(r"[\s,;]", line[:1000], maxsplit=1)[0] for line in islice(lines, 3)]
        return any(os.path.splitext(os.path.basename(name))[0] in stems for name in names)


def _read(file: Path, words: Sequence[str]) -> LabelList:
    try:
        return label_list.read(file, words)
    except ValueError as error:
        raise ValueError(str(error).replace("--labels", "--splits", 1)) from error
