"""Calls of a file system that fail in a rank and its loader processes for as long as a file lists their names.

Only `mae-dist chaos` starts its ranks with it, through `inject_nan`.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "MAE_DIST_IO_FAULTS"
"""Environment variable: the file that lists what fails, one name a line; it may come and go at any time."""
FAULTS = {"rmtree": (shutil, errno.ENOTEMPTY), "fsync": (os, errno.EINVAL), "pread": (os, errno.EIO)}
"""Name -> the module of a function that can fail, and its error: an open file on NFS, a file system without fsync, a
disk that cannot be read.
"""


def install(file: Path) -> None:
    """Let the functions of FAULTS fail while `file` lists them."""
    for name, (module, number) in FAULTS.items():
        setattr(module, name, failing(getattr(module, name), name, number, file))


def failing(real: Callable[..., Any], name: str, number: int, file: Path) -> Callable[..., Any]:
    """`real`, which raises OSError while `file` lists its name."""

    def call(*arguments: Any, **named: Any) -> Any:
        if file.is_file() and name in file.read_text().split() and not named.get("ignore_errors"):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    return call
