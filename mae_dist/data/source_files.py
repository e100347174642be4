"""The files that the samples of a packed tar come from: {tar}.csv beside the tar, rows key,file. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

from mae_dist.atomic import replacing

HEAD = ["key", "file"]
opened = partial(Path.open, encoding="utf-8", errors="surrogateescape", newline="")
"""Opens the table: names that are no UTF-8 keep their bytes."""


def write(tar: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write the rows (key, path within the folder that was packed) of a tar."""
    with replacing(tar.with_suffix(".csv")) as work, opened(work, "w") as stream:
        csv.writer(stream, lineterminator="\n").writerows([HEAD, *rows])


@lru_cache(maxsize=2)
def read(tar: Path) -> dict[str, str]:
    """Key -> file of the samples of a tar; {} where no such table lies beside it."""
    try:
        with opened(tar.with_suffix(".csv"), "r") as stream:
            head, *rows = csv.reader(stream)
    except (OSError, ValueError, csv.Error):
        return {}
    return {row[0]: row[1] for row in rows if len(row) == len(HEAD)} if head == HEAD else {}
