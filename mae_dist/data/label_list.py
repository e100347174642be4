"""Labels of images from a list in a file, and which image each row is about, in folders and in tars alike.

A list is a table whose columns are separated by tabs, commas, semicolons or the last space, with or without a header; a
label a line, for sorted files; or JSON: an object from file to label, an object a row, or images, annotations and
categories as in COCO. Imports no torch.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any, NamedTuple

from mae_dist import paths, small_files
from mae_dist.data import folder_files
from mae_dist.data.labels import ABSENT, NAMES, Label, of_text

log = logging.getLogger(__name__)

KEYS = (
    "file", "filename", "filepath", "path", "image", "imagepath", "imagename", "img", "imageid", "key", "name", "id",
)  # fmt: skip
"""Words that head the column of files, the best first, in lower case and without blanks and signs."""
BOXES = re.compile(r"(n\d{8})(?: -?\d+){4}.*")
"""A synset with boxes behind it, as in LOC_val_solution.csv of ImageNet's localisation task."""
IDS, CLASSES = "images.txt", "classes.txt"
"""The files with a row ID IMAGE for each image, and ID CLASS for each class, beside lists whose rows name these ids, as
in CUB-200 and NABirds.
"""
TINY_IMAGENET = "val_annotations.txt"
"""The file with the labels of tiny-imagenet's validation images, whose first two of six columns are read."""


class Image(NamedTuple):
    """An image: its whole path, that of its tar included, and its path within its tar or the folder of its split."""

    path: str
    inner: str


class Row(NamedTuple):
    """What a list says of an image: the file in its row, its label (empty: none), and whether that is elsewhere."""

    file: str
    label: str
    elsewhere: bool = False


class LabelList(NamedTuple):
    """The labels of a file, a row each in its order (empty: none); the files that they are of (None: it has labels
    alone).
    """

    source: Path
    files: list[str] | None
    labels: list[str]

    def rows_of(self, images: Sequence[Image]) -> list[Row | None]:
        """The row of each image; None where it has none. Of a list without files all images, sorted by path, have rows,
        if there are as many.

        A row is that of the image whose path is the end of its path, or the reverse, each with or without extension;
        else that with the longest common end, if no other has it. Raises ValueError when rows contradict.
        """
        if self.files is None:
            lines = {path: f"line {n}" for n, path in enumerate(sorted(image.path for image in images), 1)}
            known = dict(zip(lines.values(), self.labels, strict=True)) if len(lines) == len(self.labels) else {}
            return [Row(lines[path], known[lines[path]]) if known else None for path, _ in images]
        known = {}
        for file, label in zip(map(os.path.normpath, self.files), self.labels, strict=True):
            if known.setdefault(file, label) != label:
                two = f"{file} has two labels, {known[file]} and {label}"
                raise ValueError(f"--labels {self.source}: {two}; write one a file, or pack without labels")
        rows = [*map(_finder(known), images)]
        taken = {row.file for row in rows if row is not None and not row.elsewhere}
        return [None if row is not None and row.elsewhere and row.file in taken else row for row in rows]

    def number_or_name(self, row: Row) -> Label:
        """The label of a row as a class number or name. Raises ValueError where it is neither."""
        try:
            return of_text(row.label.encode("utf-8", "surrogateescape"))
        except ValueError as error:
            raise ValueError(f"--labels {self.source}: {row.file!r} {error}") from error

    def check(self, images: Sequence[Image], rows: Sequence[Row | None], what: str) -> None:
        """Raise ValueError where two images have one row; log how many images and rows find no other, how many rows
        have no label, and how many other folders. ``what`` has the images.
        """
        used: dict[str, str] = {}
        for image, row in zip(images, rows, strict=True):
            if row is not None and (twin := used.setdefault(row.file, image.path)) is not image.path:
                raise ValueError(
                    f"--labels {self.source}: {row.file} may be {twin} or {image.path}; write paths in the rows"
                )
        num_images, files = len(images), [os.path.normpath(file) for file in self.files or ()]
        pairs = [(image.path, row) for image, row in zip(images, rows, strict=True)]
        alone = [path for path, row in pairs if row is None]
        unused = [file for file in files if file not in used]
        empty = [path for path, row in pairs if row is not None and not row.label]
        elsewhere = [path for path, row in pairs if row is not None and row.elsewhere]
        for names, total, sentence in (
            (alone, num_images, f"images of {what} are in none of its rows, and get no label"),
            (unused, len(files), f"of its rows are of no image of {what}"),
            (empty, num_images, f"images have a row without a label (empty{', '.join(ABSENT)})"),
            (elsewhere, num_images, "images are in other folders than their row"),
        ):
            if names:
                log.warning("%s: %d of %d %s (first %s)", self.source, len(names), total, sentence, names[0])


def _finder(known: dict[str, str]) -> Callable[[Image], Row | None]:
    """What finds the row of an image among the labels by file."""
    forms = {file: _forms(file) if folder_files.is_image(file) else [file] for file in known}
    whole = _by_form((form, file) for file in known for form in forms[file])
    ends = _by_form((end, file) for file in known for form in forms[file] for end in _ends(form))

    def find(image: Image) -> Row | None:
        longer = ((whole, form, image.inner) for end in _ends(image.path) for form in _forms(end))
        shorter = ((ends, form, end) for end in _ends(image.inner) for form in _forms(end))
        for table, form, end in chain(longer, shorter):
            if form in table:
                file = table[form]
                return None if file is None else Row(file, known[file], end != image.inner)
        return None

    return find


def _by_form(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Form -> the file that is written so; None where it is that of several, unless one is written so in full."""
    table: dict[str, str | None] = {}
    for form, file in pairs:
        if form == file or table.setdefault(form, file) == file:
            table[form] = file
        elif table[form] != form:
            table[form] = None
    return table


def _ends(path: str) -> Iterator[str]:
    """A path, and then without the first of its folders, without the first two, ..."""
    yield path
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _forms(name: str) -> list[str]:
    """A name, and without its extension: what is behind the last dot, and behind the first."""
    folder, slash, last = name.rpartition("/")
    return [name, os.path.splitext(name)[0], f"{folder}{slash}{last.partition('.')[0]}"]


# --- reading


def read(file: Path, words: Sequence[str] = NAMES) -> LabelList:
    """Read a list. Of more than two columns the header must name file and label (one of these ``words``). Raises
    ValueError for what is none.
    """
    try:
        text = small_files.read_text(file, small_files.MOST_LIST)
    except ValueError as error:
        raise ValueError(f"--labels {error}; write rows IMAGE,LABEL") from error
    try:
        if "\0" in text:
            raise ValueError("is no text; write rows IMAGE,LABEL")
        rows = _json_rows(text) if text.lstrip()[:1] in ("{", "[") else table(text)
        if not rows:
            raise ValueError("is empty; expected rows like cat/1.jpg,cat")
        if all(len(row) == 1 for row in rows):
            return LabelList(file, None, [_plain(label) for (label,) in rows])
        pairs = columns(file, [row[:2] for row in rows] if file.name == TINY_IMAGENET else rows, words)
        if pairs and folder_files.is_image(pairs[-1][1]):
            raise ValueError(f"has files where labels should be ({pairs[-1][1]}); write file,label")
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"--labels {file}: {error}") from error
    given, labels = [name.replace("\\", "/") for name, _ in pairs], [_plain(label) for _, label in pairs]
    names = with_images(file, given)
    return LabelList(file, names, labels if names is given or words is not NAMES else _with_classes(file, labels))


def first_number(lists: Sequence[LabelList], others: Collection[int] = ()) -> int:
    """1 where the labels of lists are numbers that begin with 1, else 0: together those from 1 to some K and none is
    missing, or, up to K, where those of other splits (``others``) are 0 to K - 1. A first row may be a header.

    Raises ValueError where labels without a 0, these or those of other splits, may begin with 1 or lack a class.
    """
    rows = [label for some in lists for number, label in enumerate(some.labels) if number or label.isdecimal()]
    found = {*rows} - {"", "-1"}
    if not found or not all(re.fullmatch("0|[1-9][0-9]*", label) for label in found):
        return 0
    numbers, largest = {*map(int, found)}, max(others, default=-1)
    last = max(numbers)
    complete = numbers == {*range(1, last + 1)} and last > 1
    if 0 in numbers:
        doubt, begins = bool(others) and 0 not in others, False
    elif 0 in others:
        doubt, begins = last <= largest, complete or last == largest + 1
    else:
        doubt, begins = bool(others) and complete and last > largest, complete and not others
    if doubt:
        raise ValueError(
            f"--labels {lists[0].source}: its labels are {min(numbers)} to {last}, and those of other splits "
            f"{min(others)} to {largest}: those without 0 may begin with 1, or lack class 0; index all splits with one "
            f"list that has the rows of all of them, or write names in place of numbers"
        )
    if not begins:
        return 0
    log.warning("%s: labels 1 to %d become classes 0 to %d", lists[0].source, last, last - 1)
    return 1


def with_images(file: Path, names: list[str]) -> list[str]:
    """Names of a list, or the images of these names where they are ids that a file IDS beside it has. Raises ValueError
    where it has only some.
    """
    beside = file.with_name(IDS)
    if not names or file == beside or any(map(folder_files.is_image, names)) or not beside.is_file():
        return names
    images = _by_id(beside)
    if names[0] not in images or not folder_files.is_image(images[names[0]].strip()):
        return names
    if missing := next((name for name in names if name not in images), None):
        raise ValueError(f"{file}: {beside} has no image with the id {missing[:40]!r}")
    log.info("%s: images by their ids in %s", file, beside)
    return [images[name].strip() for name in names]


def _with_classes(file: Path, labels: list[str]) -> list[str]:
    """Labels, or the names of these where all are ids that a file CLASSES beside the list has, each with a name of its
    own.
    """
    beside = file.with_name(CLASSES)
    names = _by_id(beside) if beside.is_file() else {}
    if not {*labels} <= names.keys() or len({names[label] for label in {*labels}}) < len({*labels}):
        return labels
    log.info("%s: names of classes by their ids in %s", file, beside)
    return [names[label].strip() for label in labels]


def _by_id(file: Path) -> dict[str, str]:
    """What is behind the first word of each line, by this word."""
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)


def table(text: str) -> list[list[str]]:
    """The cells of each line that is not empty, separated by tabs, commas, semicolons, or a space: the last, or, where
    the first words are files of their own and the last ones are no numbers, the first. A comment (#) at the top is left
    out.
    """
    lines = [*dropwhile(_is_comment, (line for line in text.splitlines() if line.strip()))]
    if mark := next((mark for mark in "\t,;" if lines and mark in lines[0]), None):
        return list(csv.reader(lines, delimiter=mark))
    words = [line.split() for line in lines]
    has_names_with_spaces = any(row[-1].isdigit() or any(map(folder_files.is_image, row[1:])) for row in words)
    if has_names_with_spaces or len({row[0] for row in words}) < len(words):
        return [line.rsplit(maxsplit=1) for line in lines]
    return [line.split(maxsplit=1) for line in lines]


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not folder_files.is_image(line.split()[0])


def _json_rows(text: str) -> list[list[str]]:
    """The cells of an object from file to label, or of objects that are rows, in a list or a line each."""
    try:
        plain = json.loads(text)
    except json.JSONDecodeError:
        plain = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(plain, list) and plain and all(isinstance(row, dict) for row in plain):
        head = list(dict.fromkeys(key for row in plain for key in row))
        return [head, *([_cell(row.get(key)) for key in head] for row in plain)]
    if isinstance(plain, dict) and {"images", "annotations"} <= plain.keys():
        return _coco_rows(plain)
    if isinstance(plain, dict) and plain.keys() == {"labels"} and isinstance(plain["labels"], list):  # as in StyleGAN's
        plain = plain["labels"]
    if isinstance(plain, list):
        return [[_cell(cell) for cell in (row if isinstance(row, list) else [row])] for row in plain]
    if any(isinstance(label, dict | list) for label in plain.values()):
        raise ValueError("expected an object from file to label, or an object a row")
    return [["file", "label"], *([file, _cell(label)] for file, label in plain.items())]


def _coco_rows(plain: dict[str, Any]) -> list[list[str]]:
    """The rows of what COCO, iNaturalist and others write: images, categories, and annotations that join them by id."""
    try:
        files = {row["id"]: row["file_name"] for row in plain["images"]}
        names = {row["id"]: row["name"] for row in plain.get("categories", [])}
        if len(files) < len(plain["images"]):
            raise ValueError("two of its images have one id")
        pairs = [(row["image_id"], row["category_id"]) for row in plain["annotations"]]
        annotated = {image for image, _ in pairs}
        pairs += [(image, None) for image in files if image not in annotated]
        return [["file", "label"], *([str(files[image]), _cell(names.get(n, n))] for image, n in pairs)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its images and annotations do not go together ({type(error).__name__} {error})") from error


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _plain(label: str) -> str:
    """A label without blanks and boxes; empty if it says that there is none."""
    label = label.strip()
    boxes = BOXES.fullmatch(label)
    if re.fullmatch(r"\d+\.0+", label):  # as pandas writes the numbers of a column where one is missing
        return label.partition(".")[0]
    return "" if label.lower() in ABSENT else boxes[1] if boxes else label


def _word(text: str) -> str:
    """The word at the head of a column in lower case, without blanks and signs."""
    return re.sub("[^a-z0-9]", "", text.lower())


def columns(file: Path, table: list[list[str]], words: Sequence[str] = NAMES) -> list[tuple[str, str]]:
    """The columns of files and of labels, headed by one of these ``words``: those that the header names best, else the
    two that there are.
    """
    head = [*map(_word, table[0])]
    keys, classes = ([head.index(name) for name in map(_word, known) if name in head] for known in (KEYS, words))
    body = table[1:] if keys or classes else table
    if not (keys and classes) and len(head) != 2:
        raise ValueError(
            f"expected two columns, file and {words[0]}, or a header that names them (one of {', '.join(KEYS)}; one "
            f"of {', '.join(words)}), found {len(head)} columns"
        )
    label = classes[0] if classes else 1 - keys[0] if keys else 1
    key = keys[0] if keys else 1 - label
    if unread := [*keys[1:], *classes[1:]]:
        log.warning(
            "%s: reads files from column %s and labels from column %s, not %s; take out columns to choose others",
            file, table[0][key], table[0][label], ", ".join(table[0][number] for number in unread),
        )  # fmt: skip
    for number in {*range(len(head))} - {key, label} if words is NAMES else ():
        cells = {row[number].strip().lower() for row in body if len(row) > number} - {""}
        if "split" in head[number] or (cells and cells <= paths.SPLITS.keys()):
            log.warning(
                "%s: column %s is not read: splits are folders or lists (--splits) or tars (--split) of their own",
                file, table[0][number] or number + 1,
            )  # fmt: skip
    if short := next((row for row in body if len(row) <= max(key, label)), None):
        raise ValueError(f"a line without a label: {' '.join(short)[:40]!r}")
    if long := next((row for row in body if any(row[len(head) :])), None):
        raise ValueError(
            f"a line of {len(long)} columns, not {len(head)}: {' '.join(long)[:40]!r}; quote what has commas"
        )
    return [(row[key].strip(), row[label]) for row in body]
