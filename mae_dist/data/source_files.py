"""The files that the samples of a packed tar come from: {tar}.csv beside the tar, rows key,file. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mae_dist import small_files
from mae_dist.atomic import replacing

HEAD = ["key", "file"]
BYTES = "surrogateescape"
"""How names that are no UTF-8 keep their bytes."""


def write(tar: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write the rows (key, path within the folder that was packed) of a tar."""
    table = tar.with_suffix(".csv")
    with replacing(table) as work, work.open("w", encoding="utf-8", errors=BYTES, newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([HEAD, *rows])


@lru_cache(maxsize=2)
def read(tar: Path) -> dict[str, str]:
    """Key -> file of a tar's samples; {} where no such table lies beside it. Raises as `small_files.read_bytes`."""
    table = tar.with_suffix(".csv")
    if not table.is_file():
        return {}
    text = small_files.read_bytes(table, small_files.MOST_LIST).decode("utf-8", BYTES)
    try:
        head, *rows = csv.reader(io.StringIO(text, newline=""))
    except (ValueError, csv.Error):  # another's
        return {}
    return {row[0]: row[1] for row in rows if len(row) == len(HEAD)} if head == HEAD else {}
