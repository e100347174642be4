"""A cache of files named by URL: whole files in a folder on a disk of this machine, shared by all its processes.

    CACHE/KEY-SIZE-x.tar         a whole file; KEY is a hash of its URL, size and checksum
    CACHE/.KEY-SIZE-x.tar.part   what a process downloads, and then renames; it counts with all its SIZE bytes
    CACHE/.KEY-SIZE-x.tar.lock   locked by that process; the kernel frees the lock when it dies

Files that were not used for the longest time are evicted first. What is open stays readable after it was evicted, so no
reader locks anything. Knows no index, no order and no rank. Imports no torch.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO

from mae_dist.atomic import open_lock, sync, try_lock
from mae_dist.data.remote import Refused, Remote, download, shown
from mae_dist.errors import MachineFault, reason

log = logging.getLogger(__name__)

WAIT = 300.0
"""Seconds without a byte after which a process gives up waiting for one that downloads the same file, or for room."""
SPARE = 0.05
"""Share of a disk's free space that is left free."""
HORIZON = 50_000
"""Batches that are looked at ahead of the one at hand."""
NAME = re.compile(r"[0-9a-f]{16}-\d+-.*|\.[0-9a-f]{16}-\d+-.*\.part")
"""Names of whole and of partial files in a cache. All others are not touched."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def num_bytes(text: str) -> int:
    """Bytes of a size like 500MB or 1.5TB. Raises ValueError for another text."""
    found = re.fullmatch(r"(\d+\.?\d*) ?([KMGT]?B?)", text.strip(), re.IGNORECASE)
    unit = found and found[2].upper().removesuffix("B")
    if found is None or (not unit and "." in found[1]):
        raise ValueError(f"data.cache_size={text}: is no size; write for example 500MB, 200GB or 1.5TB")
    return int(float(found[1]) * UNITS[f"{unit}B" if unit else ""])


@dataclass(frozen=True)
class Cache:
    """A folder of whole files, of at most `limit` bytes; what is being read may exceed it, by a file a process."""

    folder: Path
    limit: int

    @staticmethod
    def of(folder: str | None, size: str = "100GB") -> Cache:
        """The cache of the settings data.cache (None: $XDG_CACHE_HOME/mae_dist, ~/.cache/mae_dist) and data.cache_size.

        Raises ValueError for a size that is none.
        """
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Cache(base / "mae_dist" if folder is None else Path(folder).expanduser(), num_bytes(size))

    @cached_property
    def made(self) -> Path:
        """The folder, which only this user may read. Raises ValueError where it cannot be made, or where everybody may
        write into it, so that what lies there may be anybody's.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.folder.stat().st_mode
        except OSError as error:
            raise Refused(f"data.cache={self.folder}: cannot be written ({error.strerror}); give another") from error
        if mode & stat.S_IWOTH:
            raise Refused(f"data.cache={self.folder}: everybody may write there; give a folder of your own")
        return self.folder

    def open(self, remote: Remote) -> int:
        """A descriptor of the file, which stays readable; downloads it, or waits while another process does.

        Raises as `attempt`, Refused for a file that is larger than the cache, and MachineFault where the disk is full
        or another process makes no progress for WAIT s.
        """
        if remote.size > self.limit:
            raise Refused(
                f"{shown(remote.url)}: {remote.size} bytes, more than data.cache_size allows ({self.limit} bytes)"
            )
        before, since = None, time.monotonic()
        while True:
            descriptor = self._existing(remote)
            if descriptor is None:
                descriptor = self._download(remote, ())
            if descriptor is not None:
                return descriptor
            now = sorted((name, size) for name, size, _ in self._entries())
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > WAIT:
                raise MachineFault(
                    f"{self.folder}: nothing was downloaded in {WAIT:g} s while this process waited for "
                    f"{shown(remote.url)}; the same command goes on"
                )
            time.sleep(0.05)

    def fetch(self, remote: Remote, keep: Collection[str]) -> bool:
        """Download a file that will be needed, unless there is no room without evicting one of the names `keep`, or
        another process does. Whether it is there now. Raises as `open`.
        """
        descriptor = self._existing(remote)
        if descriptor is None:
            descriptor = self._download(remote, keep)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def rename(self, old: Remote, new: Remote) -> None:
        """Keep a file, whose sha256 is known by now, under its new name."""
        with suppress(FileNotFoundError):
            os.replace(self.folder / old.name, self.folder / new.name)

    def _existing(self, remote: Remote) -> int | None:
        path = self.folder / remote.name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if status.st_size == remote.size:
            if time.time() - status.st_mtime > 1:  # the time of the last use, by which files are evicted
                with suppress(PermissionError):
                    os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        log.warning("%s: %d bytes instead of %d; fetching it again", path, status.st_size, remote.size)
        path.unlink(missing_ok=True)
        return None

    def _download(self, remote: Remote, keep: Collection[str]) -> int | None:
        """Download a file and open it; None where another process has its lock, or where there is no room."""
        part = self.made / f".{remote.name}.part"
        try:
            with self._locked(remote.name) as locked:
                if not locked:
                    return None
                if (descriptor := self._existing(remote)) is not None:
                    return descriptor
                if not self._reserve(remote, part, keep):
                    return None
                try:
                    download(remote, part)
                    descriptor = os.open(part, os.O_RDONLY)
                    sync(descriptor, part)
                    os.replace(part, self.folder / remote.name)
                finally:
                    part.unlink(missing_ok=True)
                return descriptor
        except OSError as error:
            raise (MachineFault if reason(error) == MachineFault.reason else Refused)(
                f"data.cache={self.folder}: cannot be written ({error.strerror}); make room, give another folder, or "
                f"lower data.cache_size"
            ) from error

    def _reserve(self, remote: Remote, part: Path, keep: Collection[str]) -> bool:
        """Make the empty file `part`, evicting files that were not used for the longest time, none of `keep`; False
        where that does not make enough room now. Raises OSError where the disk is full.
        """
        with self._locked_room():
            entries = self._entries()
            parts = [
                (name, size) for name, size, _ in entries if name.endswith(".part") and not self._remove_dead(name)
            ]
            whole = sorted((used, name, size) for name, size, used in entries if not name.startswith("."))
            reserved = sum(int(name.split("-")[1]) for name, _ in parts)  # a partial file's name has its whole size
            disk = os.statvfs(self.folder)
            over_limit = sum(size for _, _, size in whole) + reserved + remote.size - self.limit
            over_disk = reserved - sum(size for _, size in parts) + remote.size
            lacking = max(over_limit, over_disk - int(disk.f_bavail * disk.f_frsize * (1 - SPARE)))
            victims = []
            for _, name, size in whole:
                if lacking > 0 and name not in keep:
                    victims.append(name)
                    lacking -= size
            if lacking > 0:
                if not parts and not keep:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return False
            for name in victims:
                (self.folder / name).unlink(missing_ok=True)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return True

    def _entries(self) -> list[tuple[str, int, float]]:
        """(name, bytes, time of the last use) of the whole and the partial files in the folder."""
        found = []
        for entry in os.scandir(self.made):
            with suppress(FileNotFoundError):
                if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime))
        return found

    def _remove_dead(self, part: str) -> bool:
        """Remove a partial file whose process has died; whether it has."""
        with self._locked(part.removeprefix(".").removesuffix(".part")) as dead:
            if dead:
                (self.folder / part).unlink(missing_ok=True)
            return dead

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Lock a file for this process; whether that was possible. The file of the lock is removed again."""
        path = self.made / f".{name}.lock"
        with open_lock(path) as lock:
            locked = try_lock(lock) and _is(lock, path)
            try:
                yield locked
            finally:
                if locked:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked_room(self) -> Iterator[None]:
        """Be the only process that makes room."""
        began = time.monotonic()
        with open_lock(self.made / ".room") as lock:
            while not try_lock(lock):
                if time.monotonic() - began > WAIT:
                    raise MachineFault(f"{self.folder}: another process has kept .room locked for {WAIT:g} s")
                time.sleep(0.01)
            yield


def _is(stream: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def fetch_ahead(
    cache: Cache, total: int, batches: Iterator[Collection[Remote]], taken: Callable[[], int], most: int | None,
    parent: int,
) -> None:  # fmt: skip
    """Download the files of the next `batches` in the order in which they are needed, as far as they fit into the cache
    beside what is needed before; while the process `parent` is the parent of this one.

    All files together have `total` bytes. ``taken()`` is the number of batches that were taken. At most `most` files
    are fetched beyond the batch at hand. A fault is left to the process that needs the file.
    """
    room = min(cache.limit, total)
    at, seen, last_use = -1, 0, dict[Remote, int]()  # of each file that is needed, in the order of the first uses
    while os.getppid() == parent:
        if (now := taken()) == at:
            time.sleep(0.05)
            continue
        at, last_use = now, {file: last for file, last in last_use.items() if last >= now}
        size = sum(file.size for file in last_use)
        while size < room and seen < now + HORIZON and (most is None or len(last_use) <= most or seen <= now):
            if (batch := next(batches, None)) is None:
                break
            size += sum(file.size for file in batch if file not in last_use)
            last_use |= dict.fromkeys(batch, seen)
            seen += 1
        ends = accumulate(file.size for file in last_use)
        wanted = [file for file, end in zip(last_use, ends, strict=True) if end <= room]
        keep = {file.name for file in wanted}
        for file in wanted:
            if taken() != now:
                break
            with suppress(MachineFault, ValueError):
                cache.fetch(file, keep)
