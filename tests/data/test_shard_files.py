"""Reading tars: tried again where the storage fails, with another open; changed, grown and vanished tars refused."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path

import pytest

from mae_dist.checksum import sha256
from mae_dist.data import shard_files
from mae_dist.data.cache import Cache
from mae_dist.data.dataset import Shard
from mae_dist.data.shard_files import ChangedError, ShardFiles
from mae_dist.data.workers import Workers
from mae_dist.errors import MachineFault


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "PAUSES", (0.0, 0.0, 0.0))


def files(folder: Path, count: int = 1, known: bool = False) -> ShardFiles:
    """Files of 1,000 bytes that differ, as if they were tars."""
    tars = [folder / f"x-{i}.tar" for i in range(count)]
    for number, tar in enumerate(tars):
        tar.write_bytes(bytes([number]) * 1000)
    shards = [Shard(tar.name, 1, 0, 1000, sha256(tar) if known else "") for tar in tars]
    return ShardFiles(tars, shards, Cache.of(None))


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[int]:
    """Let the first `times` reads fail with this errno; the descriptors of all reads."""
    real, seen = os.pread, []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        seen.append(descriptor)
        if len(seen) <= times:
            raise OSError(number, os.strerror(number))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return seen


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODEV])
def test_read_that_fails_is_tried_again_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    data, seen = files(tmp_path), failing(monkeypatch, number, times=2)
    with caplog.at_level(logging.ERROR):  # the level of ranks that are not rank 0
        assert data.read(0, 512, 4) == bytes(4)
    assert len(seen) == 3
    (line,) = caplog.messages
    assert f"x-0.tar at byte 512: cannot be read ({os.strerror(number)}, {errno.errorcode[number]} {number})" in line


def test_read_that_failed_opens_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle stays stale."""
    data = files(tmp_path)
    assert data.read(0, 0, 1) == b"\0"
    first = data.open(0)
    failing(monkeypatch, errno.ESTALE, times=1)
    assert data.read(0, 0, 1) == b"\0"
    assert data.open(0) is not first


def test_read_that_keeps_failing_is_a_machine_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = files(tmp_path), failing(monkeypatch, errno.EIO, times=99)
    with pytest.raises(MachineFault, match=r"x-0\.tar at byte 7: cannot be read .*EIO 5\), in 4 attempts within"):
        data.read(0, 7, 1)
    assert len(seen) == 4


def test_read_that_is_not_allowed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = files(tmp_path), failing(monkeypatch, errno.EACCES, times=99)
    with pytest.raises(ChangedError, match=r"cannot be read \(Permission denied, EACCES 13\)"):
        data.read(0, 0, 1)
    assert len(seen) == 1


def test_read_closes_other_tars_where_too_many_files_are_open(tmp_path: Path) -> None:
    data, before = files(tmp_path, 40), resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, before[1]))
        assert [data.read(shard, 0, 1)[0] for shard in range(40)] == list(range(40))
        data.open.cache_clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        with pytest.raises(MachineFault, match=r"EMFILE 24.*`ulimit -n`"):
            data.read(0, 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_read_of_a_tar_that_vanished_is_a_machine_fault_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    data = files(tmp_path)
    (tmp_path / "x-0.tar").rename(tmp_path / "away")
    with pytest.raises(MachineFault, match=r"x-0\.tar at byte 0: cannot be read \(No such file or directory, ENOENT 2"):
        data.read(0, 0, 1)
    (tmp_path / "away").rename(tmp_path / "x-0.tar")
    assert data.read(0, 0, 1) == b"\0"


@pytest.mark.parametrize("size", [900, 1200])
def test_read_refuses_a_tar_of_another_size(tmp_path: Path, size: int) -> None:
    data = files(tmp_path)
    os.truncate(tmp_path / "x-0.tar", size)
    with pytest.raises(ChangedError, match=rf"x-0\.tar: has {size} bytes now, 1000 before"):
        data.read(0, 0, 1)


@pytest.mark.parametrize("known", [False, True])
def test_read_refuses_a_tar_that_was_replaced_unless_its_checksum_is_the_same(tmp_path: Path, known: bool) -> None:
    data, tar = files(tmp_path, known=known), tmp_path / "x-0.tar"
    assert data.read(0, 0, 1) == b"\0"

    def replace(content: bytes) -> None:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").rename(tar)

    replace(bytes(1000))
    assert data.read(0, 0, 1) == b"\0", "an open file stays"
    data.open.cache_clear()
    if known:
        assert data.read(0, 0, 1) == b"\0"
        replace(bytes([7]) * 1000)
        data.open.cache_clear()
    with pytest.raises(ChangedError, match=r"x-0\.tar: was replaced by another file"):
        data.read(0, 0, 1)


def test_read_refuses_a_tar_that_was_replaced_since_another_process_read_it(tmp_path: Path) -> None:
    data, tar = files(tmp_path), tmp_path / "x-0.tar"
    workers = Workers[int, bytes](lambda offset: data.read(0, offset, 1), 1)
    workers.send(0)
    assert workers.wait() == b"\0"
    workers.stop()
    (tmp_path / "new").write_bytes(bytes(1000))
    (tmp_path / "new").rename(tar)
    with pytest.raises(ChangedError, match=r"x-0\.tar: was replaced by another file"):
        data.read(0, 0, 1)


def test_read_refuses_a_tar_that_ends_early(tmp_path: Path) -> None:
    data = files(tmp_path)
    assert data.read(0, 0, 1) == b"\0"
    os.truncate(tmp_path / "x-0.tar", 100)
    with pytest.raises(ChangedError, match="ends inside a sample"):
        data.read(0, 99, 2)
