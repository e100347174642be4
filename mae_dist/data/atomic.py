"""Writing a file or a folder whole or not at all: the one place in this folder that knows how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a hidden path beside `target` to write to; rename it to `target` at the end, remove it after an error.

    A process that is killed may leave the hidden path, never a part of `target`.
    """
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield work
        os.replace(work, target)
    finally:
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)
        else:
            work.unlink(missing_ok=True)
