"""What `mae-dist predict` wrote into a folder, for a report: accuracy of each class, and which are taken for which."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dist import small_files
from mae_dist.monitor.records import finite

FACTS, RESULT, CLASSES, CONFUSION = "computed.json", "result.json", "classes.csv", "confusion.csv"
MOST_BYTES = 2**26
"""Of a table."""
MOST_CLASSES = 100
"""Classes of which the whole matrix is drawn."""


@dataclass(frozen=True)
class OfClass:
    """Test images of one class, its top-1 in percent, and the class that most of its other images are taken for."""

    name: str
    images: int
    top1: float
    taken_for: str
    times: int


@dataclass(frozen=True)
class Predictions:
    """The predictions of a run on labelled images. `classes` are in the order of their numbers, those that occur;
    `counts` maps (label, predicted) to images.
    """

    path: Path
    origin: str
    step: Any
    result: dict[str, Any]
    classes: list[OfClass]
    counts: dict[tuple[str, str], int]

    @property
    def order(self) -> list[str]:
        """All classes that occur as label or prediction, labels first."""
        predicted = (predicted for _, predicted in self.counts)
        return [*dict.fromkeys([*(each.name for each in self.classes), *predicted])]

    @property
    def summary(self) -> str:
        """The accuracy over all images, and how many could not be read, in one sentence."""
        shown = [f"top-{n} {self.result[f'top{n}']:.2f} %" for n in (1, 5) if f"top{n}" in self.result]
        bad = self.result.get("num_unreadable", 0)
        images = sum(each.images for each in self.classes)
        unreadable = f"; {bad:,} more images cannot be read" if bad else ""
        return f"{', '.join(shown)} of {images:,} labelled images{unreadable}.".capitalize()

    def ranked(self) -> list[OfClass]:
        """The classes, the worst first."""
        return sorted(self.classes, key=lambda each: (each.top1, -each.images))

    def confused(self) -> list[tuple[str, str, int, float]]:
        """(label, predicted, images, percent of the label's images) of each confusion, the most frequent first."""
        images = {each.name: each.images for each in self.classes}
        wrong = [(*pair, count) for pair, count in self.counts.items() if pair[0] != pair[1]]
        wrong.sort(key=lambda row: (-row[2], row[:2]))
        return [(label, predicted, count, 100 * count / images[label]) for label, predicted, count in wrong]


def is_of_predict(path: Path) -> bool:
    """Whether a folder is one of `mae-dist predict`."""
    return (path / FACTS).is_file() and not (path / "config.yaml").is_file()


def read(path: Path) -> Predictions:
    """Read a folder. Raises ValueError where it is not finished, has no labels, or is damaged."""
    if not (path / RESULT).is_file():
        raise ValueError(f"{path}: is not finished; the same `mae-dist predict` completes it")
    if not (path / CONFUSION).is_file():
        raise ValueError(f"{path}: holds predictions without labels, so there is nothing to compare; leave it out")
    facts, result = (small_files.read_json(path / name) for name in (FACTS, RESULT))
    counts: dict[tuple[str, str], int] = {}
    for label, predicted, count in _table(path / CONFUSION, 3):
        counts[label, predicted] = _whole(path / CONFUSION, count)
    others: dict[str, tuple[int, str]] = {}
    for (label, predicted), count in counts.items():
        if label != predicted and count > others.get(label, (0, ""))[0]:
            others[label] = count, predicted
    classes = []
    for name, images, top1, *_ in _table(path / CLASSES, 5):
        times, taken_for = others.get(name, (0, ""))
        classes.append(OfClass(name, _whole(path / CLASSES, images), _percent(path / CLASSES, top1), taken_for, times))
    known = {each.name for each in classes if each.images}
    if any(label not in known for label, _ in counts):
        raise ValueError(f"{path / CONFUSION}: has a class that {CLASSES} lacks; make the predictions again")
    numbers = {name: value for name, value in result.items() if finite(value)}
    return Predictions(path, str(facts.get("from", "?")), facts.get("step"), numbers, classes, counts)


def _table(file: Path, columns: int) -> Iterator[list[str]]:
    """The rows of a table below its head. Raises ValueError where it is none."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise ValueError(f"no file, or one of more than {MOST_BYTES:,} bytes")
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            rows = csv.reader(stream)
            next(rows, None)
            for row in rows:
                if len(row) != columns:
                    raise ValueError(f"line {rows.line_num} has {len(row)} columns, not {columns}")
                yield row
    except (OSError, csv.Error, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({error}); make the predictions again, or leave them out") from error


def _whole(file: Path, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(f"{file}: {text[:40]!r} is no number of images; make the predictions again")
    return int(text)


def _percent(file: Path, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError(f"{file}: {text[:40]!r} is no percentage; make the predictions again")
    return value
