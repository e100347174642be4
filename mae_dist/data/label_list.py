"""Labels of images from a text file: rows `file,label`, or a label a line for sorted files. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dist.data import folder_files, labels

BOXES = re.compile(r"(n\d{8})(?: -?\d+){4}.*")
"""A synset with boxes behind it, as in LOC_val_solution.csv of ImageNet's localisation task."""


class LabelList(NamedTuple):
    """The labels of a file, a row each in its order: the files that they are of (None: it has labels alone)."""

    source: Path
    files: list[str] | None
    labels: list[str]

    def of(self, paths: Sequence[str], below: str) -> dict[str, str]:
        """The labels of those of the images at these `paths` that it names; of a list without files those of all
        images, sorted by path, if there are as many.

        A row names a file by its path, by its path below `below`, by its name, or by its name without extension. Raises
        ValueError when rows contradict each other, or a row fits two files.
        """
        if self.files is None:
            return dict(zip(sorted(paths), self.labels, strict=True)) if len(paths) == len(self.labels) else {}
        known: dict[str, str] = {}
        for file, label in zip(map(os.path.normpath, self.files), self.labels, strict=True):
            if known.setdefault(file, label) != label:
                raise ValueError(f"--labels {self.source}: {file} has two labels, {known[file]} and {label}")
        named = {path: name for path in paths if (name := _name_in(known, path, below)) is not None}
        twice = [name for name, count in Counter(named.values()).items() if count > 1]
        if twice:
            both = [path for path, name in named.items() if name == twice[0]]
            raise ValueError(
                f"--labels {self.source}: {twice[0]} may be {both[0]} or {both[1]}; write paths in the rows"
            )
        return {path: known[name] for path, name in named.items() if known[name]}


def _name_in(known: dict[str, str], path: str, below: str) -> str | None:
    """How a path is written among the known files."""
    inner = path.removeprefix(f"{below}/")
    name = os.path.basename(path)
    written = (path, inner, os.path.splitext(inner)[0], name, os.path.splitext(name)[0])
    return next((way for way in written if way in known), None)


def read(file: Path) -> LabelList:
    """Read a text file whose columns are separated by commas, tabs, semicolons or spaces, with or without a header.

    Of more than two columns the header must name file and label; val_annotations.txt of tiny-imagenet needs none.
    Raises ValueError for what is no such file.
    """
    try:
        table = labels.table(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--labels {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {file}: is not a text in UTF-8 ({error.reason})") from error
    if not table:
        raise ValueError(f"--labels {file}: is empty; expected rows like cat/1.jpg,cat")
    if all(len(row) == 1 for row in table):
        return LabelList(file, None, [label.strip() for (label,) in table])
    try:
        rows = labels.columns(file, [row[:2] for row in table] if file.name == "val_annotations.txt" else table)
    except ValueError as error:
        raise ValueError(f"--labels {error}") from error
    if folder_files.is_image(rows[-1][1]):
        raise ValueError(f"--labels {file}: has files where labels should be ({rows[-1][1]}); write file,label")
    return LabelList(file, [name for name, _ in rows], [_plain(label.strip()) for _, label in rows])


def _plain(label: str) -> str:
    boxes = BOXES.fullmatch(label)
    return boxes[1] if boxes else label
