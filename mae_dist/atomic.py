"""Writing a file or a folder whole or not at all: the one place that knows how. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a hidden path beside `target` to write to; rename it to `target` at the end, remove it after an error.

    Its suffix is that of `target`, by which some writers choose a format. A process that is killed may leave the hidden
    path, which `leftovers` finds, never a part of `target`.
    """
    work = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        yield work
        os.replace(work, target)
    finally:
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)
        else:
            work.unlink(missing_ok=True)


def leftovers(folder: Path, suffix: str) -> Iterator[Path]:
    """Hidden paths of `replacing` in a folder, for targets with this suffix; those of living processes, too."""
    return folder.glob(f".*-*{suffix}")
