"""Writing a file or a folder whole or not at all, and by one process at a time. Imports no torch."""

import errno
import fcntl
import logging
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)
"""What fsync raises on file systems (CIFS, some of FUSE) that have none."""
_warned: list[Path] = []


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Context manager: an OSError that names no file, as those of writing do not, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a hidden path beside `target` to write to; rename it to `target` at the end, remove it after an error.

    Its suffix is that of `target`, by which some writers choose a format; the rest of its name cannot be foreseen, so
    nobody can have put a link there. A process that is killed may leave it, which `leftovers` finds, never a part of
    `target`.
    """
    work = target.with_name(f".{secrets.token_hex(8)}-{target.name}")
    try:
        with naming(target):
            yield work
        os.replace(work, target)
    finally:
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)
        else:
            work.unlink(missing_ok=True)


def sync(descriptor: int, name: Path) -> None:
    """Wait until an open file or folder is on the disk; where its file system cannot tell, warn once. Raises OSError
    where the disk fails.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(name)) from error
        if not _warned:
            _warned.append(name)
            log.warning("%s: its file system cannot wait for its disk (fsync: %s); going on", name, error.strerror)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, with a warning where that is impossible: they are there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor, folder)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("%s: not synchronised with its disk (%s); going on", folder, error)


def remove(folder: Path) -> None:
    """Remove a folder, or warn where that is impossible. It gets a hidden name first, so that no part of it is ever
    taken for the whole, and `.removed-...` is what is left.
    """
    hidden = folder
    with suppress(OSError):
        hidden = folder.rename(folder.with_name(f".removed-{secrets.token_hex(8)}"))
    try:
        shutil.rmtree(hidden)
    except OSError as error:  # an open file on NFS, say
        log.warning("%s could not be removed (%s)", folder, error)


def leftovers(folder: Path, suffix: str) -> Iterator[Path]:
    """Hidden paths of `replacing` in a folder, for targets with this suffix; those of living processes, too."""
    return folder.glob(f".*-*{suffix}")


def open_own(path: Path, permissions: int = 0o666, append: bool = False) -> IO[bytes]:
    """Open a file to read and write, which is made where there is none. Raises OSError, also where it is a link, which
    may lead to a file of another's choice, or a pipe, which takes no more than somebody reads.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    descriptor = os.open(path, flags, permissions)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is a pipe", str(path))
    return os.fdopen(descriptor, "a+b" if append else "r+b")


def open_lock(path: Path) -> IO[bytes]:
    """Open a file for `try_lock`, as `open_own` does. Who may not write to it may not read it, as who reads a file can
    keep it locked for ever.
    """
    lock = open_own(path)
    mode = os.fstat(lock.fileno()).st_mode
    with suppress(OSError):  # another user's
        os.fchmod(lock.fileno(), stat.S_IMODE(mode) & (~0o044 | (mode & 0o022) << 1))
    return lock


def sign(lock: IO[bytes]) -> None:
    """Write into a locked file which process has it, for `holder_of`."""
    with suppress(OSError):  # the disk may be full
        lock.truncate(0)
        os.pwrite(lock.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def holder_of(lock: IO[bytes]) -> str:
    """The process that has signed a lock, for messages."""
    lock.seek(0)
    return lock.read(200).decode(errors="replace").strip() or "another process"


def try_lock(stream: IO[Any]) -> bool:
    """Lock a file for this process, which its children do not inherit. True where that was possible, and where the file
    system has no locks; False where another process has it locked.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def mount_points() -> set[Path]:
    """What something is mounted at, so that no rename can replace it; empty where the system does not tell. Unlike
    `os.path.ismount` also what is bound from the same file system, as volumes of containers are.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    return {Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", _octal, line.split(b" ")[4]))) for line in lines}


def _octal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])
