"""Labels of images from a text file: rows `file,label`, or a label a line for sorted files. Imports no torch."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dist.data import folder_files

FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "image_name", "imageid", "img", "id", "path")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "predictionstring")
"""Headers of the two columns (in lower case) in files of more than two."""
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
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise ValueError(f"--labels {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {file}: is not a text in UTF-8 ({error.reason})") from error
    if not lines:
        raise ValueError(f"--labels {file}: is empty; expected rows like cat/1.jpg,cat")
    if delimiter := next((sign for sign in ",\t;" if sign in lines[0]), None):
        table = [[word.strip() for word in row] for row in csv.reader(lines, delimiter=delimiter)]
    else:
        table = [line.rsplit(maxsplit=1) for line in lines]
    widths = {len(row) for row in table}
    if widths == {1}:
        return LabelList(file, None, [label for (label,) in table])
    if len(widths) > 1:
        raise ValueError(
            f"--labels {file}: has rows of {min(widths)} and of {max(widths)} columns; expected file,label"
        )
    name_at, label_at = _columns(file, table[0])
    if folder_files.is_image(table[-1][label_at]):
        raise ValueError(f"--labels {file}: has files where labels should be ({table[-1][label_at]}); write file,label")
    return LabelList(file, [row[name_at] for row in table], [_plain(row[label_at]) for row in table])


def _columns(file: Path, first: list[str]) -> tuple[int, int]:
    if len(first) == 2 or file.name == "val_annotations.txt":
        return 0, 1
    header = [word.lower() for word in first]
    found = [[header.index(name) for name in names if name in header] for names in (FILE_COLUMNS, LABEL_COLUMNS)]
    if not all(found):
        raise ValueError(
            f"--labels {file}: has {len(first)} columns ({', '.join(first)[:80]}), but none called file or label; "
            f"give these names to two of them"
        )
    return found[0][0], found[1][0]


def _plain(label: str) -> str:
    boxes = BOXES.fullmatch(label)
    return boxes[1] if boxes else label
