"""Reading bytes of a data set's tars: tried again where the storage fails, and refused where a tar has changed.

A network file system may fail for seconds, and a handle that was stale once stays so until the file is opened anew. A
tar that another process replaces, extends or removes while a run reads it is noticed when it is opened again.

Knows no samples. Imports no torch.
"""

import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mae_dist.checksum import sha256
from mae_dist.data.cache import Cache
from mae_dist.data.dataset import Shard
from mae_dist.data.remote import Refused
from mae_dist.data.workers import shared_array
from mae_dist.errors import MachineFault, reason

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES = (0.1, 1.0, 3.0, 8.0)
"""Seconds before each further attempt at a read that failed."""
MOST_OPEN = 128
"""Tars that a process keeps open."""


class ChangedError(ValueError):
    """A shard differs from what its index or dataset.json says, or may not be read. No sample replaces one of its."""


def persistently(read: Callable[[], T], what: str, recover: Callable[[], object] = lambda: None) -> T:
    """`read()`, tried again after each of PAUSES where the storage fails, `recover()` being called first.

    Raises MachineFault, or ChangedError where starting again would not help; the message begins with `what`.
    """
    for attempt, pause in enumerate((*PAUSES, None)):
        try:
            return read()
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR)  # it was there before: perhaps a mount went away
            recover()
            name = f"{errno.errorcode.get(error.errno or 0, 'errno')} {error.errno}"
            message = f"{what}: cannot be read ({error.strerror or error}, {name})"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                message += "; raise the limit of open files (`ulimit -n`), or lower machine.workers"
            if not gone and reason(error) != MachineFault.reason:
                raise ChangedError(message) from error
            if pause is None:
                raise MachineFault(f"{message}, in {attempt + 1} attempts within {sum(PAUSES):.0f} s") from error
            if not attempt:
                log.error("%s; trying again for %.0f s", message, sum(PAUSES))  # every rank prints errors
            time.sleep(pause)
    raise AssertionError


class ShardFiles:
    """The tars of a split, opened when needed; those of `shards` that are URLs are fetched through `cache`.

    A tar must keep size, inode and modification time as long as this object lives, or else its sha256.
    """

    def __init__(self, tars: Sequence[str | Path], shards: Sequence[Shard], cache: Cache):
        self.tars, self.shards, self.cache = tars, shards, cache
        self.fetch = functools.lru_cache(1)(lambda shard: _Handle(self._fetched(shard)))  # one: others make room
        self.seen = shared_array((len(tars), 2), np.int64)  # by this process and those that it forks
        self.open = functools.lru_cache(MOST_OPEN)(lambda shard: _Handle(self._checked(shard)))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on. Raises ChangedError where the tar is another than before or ends
        before them, or may not be read, and MachineFault where the storage fails.
        """

        def attempt() -> bytes:
            handle = self.open(shard) if self.shards[shard].remote is None else self.fetch(shard)
            return os.pread(handle.descriptor, size, offset)

        what = f"{self.tars[shard]} at byte {offset}"
        content = persistently(attempt, what, self._close)  # stale handles are of no use, and descriptors may be short
        if len(content) != size:
            raise ChangedError(
                f"{self.tars[shard]}: ends inside a sample: it was changed or cut short after it was indexed"
            )
        return content

    def _close(self) -> None:
        self.open.cache_clear()
        self.fetch.cache_clear()

    def _fetched(self, shard: int) -> int:
        """The descriptor of a remote tar."""
        remote = self.shards[shard].remote
        assert remote is not None
        try:
            return self.cache.open(remote)
        except Refused as error:
            raise ChangedError(str(error)) from None

    def _checked(self, shard: int) -> int:
        """The descriptor of a tar that is still the same."""
        tar, known, size = self.tars[shard], self.shards[shard].sha256, self.shards[shard].num_bytes
        descriptor = os.open(tar, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if status.st_size != size:
                raise ChangedError(
                    f"{tar}: has {status.st_size} bytes now, {size} before: it was changed meanwhile; "
                    f"restore it, or index it again with `mae-dist data index`"
                )
            now = status.st_ino % 2**63, status.st_mtime_ns
            same = tuple(self.seen[shard]) in (now, (0, 0))  # or not yet seen
            if not same and (not known or sha256(Path(tar)) != known):
                raise ChangedError(f"{tar}: was replaced by another file meanwhile; restore it, or start a new run")
            self.seen[shard] = now
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


class _Handle:
    """An open file, which is closed when nobody uses it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
