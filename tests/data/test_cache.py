"""Cache of remote files: whole files only, a limited size, several processes, and every fault in one sentence."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from web import Fault, Request, Web, serving

from mae_dist.data import cache as caches
from mae_dist.data import remote as remotes
from mae_dist.data.cache import Cache, fetch_ahead, num_bytes
from mae_dist.data.remote import Refused, Remote
from mae_dist.errors import MachineFault

SIZE = 100_000


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server of 0.tar to 5.tar, of SIZE bytes each; failed requests are tried again twice, at once."""
    monkeypatch.setattr(remotes, "PAUSES", (0.01, 0.01))
    (tmp_path / "store").mkdir()
    for number in range(6):
        content = np.random.default_rng(number).bytes(SIZE)
        (tmp_path / "store" / f"{number}.tar").write_bytes(content)
    with serving(tmp_path / "store") as web:
        yield web


def file(web: Web, number: int, query: str = "") -> Remote:
    content = np.random.default_rng(number).bytes(SIZE)
    return Remote(f"{web.url}/{number}.tar{query}", SIZE, hashlib.sha256(content).hexdigest())


def content(cache: Cache, remote: Remote) -> bytes:
    descriptor = cache.open(remote)
    try:
        return os.pread(descriptor, SIZE + 1, 0)
    finally:
        os.close(descriptor)


def whole(cache: Cache) -> list[str]:
    """What lies in the cache, without keys."""
    return sorted(re.sub(r"[0-9a-f]{16}-\d+-", "", path.name) for path in cache.folder.iterdir())


def first_fails(fault: Fault) -> Callable[[Request], Fault]:
    return lambda request: fault if request.method == "GET" and request.before == 0 else Fault()


@pytest.mark.parametrize(
    "fault",
    [Fault(503), Fault(429), Fault(cut=SIZE // 3), Fault(lie=50), Fault(lie=-50), Fault(cut=9, hang=True)],
    ids=["503", "429", "cut", "too long", "too short", "hang"],
)
def test_cache_tries_again_after_passing_faults(
    web: Web, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remotes, "STALL", 0.4)
    web.fault, cache = first_fails(fault), Cache(tmp_path / "cache", 10 * SIZE)
    assert content(cache, file(web, 1)) == np.random.default_rng(1).bytes(SIZE)
    assert web.got(".tar") == ["1.tar"] * 2
    assert "1.tar" in caplog.text
    content(cache, file(web, 1))
    assert len(web.got(".tar")) == 2, "it is fetched once"
    assert whole(cache) == [".room", "1.tar"]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault(status=500), MachineFault, r"1\.tar: not fetched in 3 tries \(status 500, 0 bytes came\)"),
        (Fault(cut=30), MachineFault, r"not fetched in 3 tries \(ClientPayloadError, 30 bytes came\)"),
        (Fault(status=404), Refused, "there is no such file"),
        (Fault(status=403), Refused, r"access is refused \(status 403\); check the credentials"),
        (Fault(lie=-50), Refused, "has 99950 bytes instead of 100000: it was changed after it was indexed"),
    ],
)
def test_cache_lasting_faults_are_one_sentence_without_secrets(
    web: Web, tmp_path: Path, fault: Fault, error: type[Exception], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    web.fault, cache = lambda _: fault, Cache(tmp_path / "cache", 10 * SIZE)
    remote = file(web, 1, "?token=SECRET")
    with caplog.at_level(logging.INFO), pytest.raises(error, match=words) as caught:
        cache.open(remote._replace(url=remote.url.replace("http://", "http://user:SECRET@")))
    assert "SECRET" not in str(caught.value) + caplog.text
    assert whole(cache) == [".room"], "nothing is taken for a whole file"


def test_cache_same_size_but_another_sha256_is_refused(web: Web, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"sha256 [0-9a-f]{16}\.\.\. instead of aa.*index it again"):
        Cache(tmp_path / "cache", 10 * SIZE).open(file(web, 1)._replace(sha256="aa" * 32))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/x.tar", r"MachineFault: .*not fetched in 3 tries \(ClientConnectorError"),
        ("nonsense://a/x.tar", r"Refused: nonsense://a/x.tar: cannot be opened \(ValueError\)"),
        ("gs://bucket/x.tar", r"Refused: .*gs:// needs the package gcsfs; install it: pip install gcsfs"),
    ],
)
def test_cache_unreachable_urls_are_one_sentence(
    url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remotes, "PAUSES", (0.01, 0.01))
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises((Refused, MachineFault)) as caught:
        Cache(tmp_path, SIZE).open(Remote(url, 1))
    assert re.match(words, f"{caught.type.__name__}: {caught.value}"), caught.value


def test_cache_full_disk_is_a_machine_fault(web: Web, tmp_path: Path) -> None:
    with pytest.raises(MachineFault, match="data.cache=.*cannot be written .No space left.*make room"):
        Cache(tmp_path / "cache", 10**17).open(file(web, 1)._replace(size=10**16))
    with pytest.raises(Refused, match="100000 bytes, more than data.cache_size allows"):
        Cache(tmp_path / "cache", SIZE - 1).open(file(web, 1))


def test_cache_evicts_what_was_not_used_for_the_longest_time(web: Web, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    first = cache.open(file(web, 0))
    for number in (0, 1, 2):
        content(cache, file(web, number))
        os.utime(cache.folder / file(web, number).name, (0, 100 + number))
    content(cache, file(web, 0))
    content(cache, file(web, 3))
    assert whole(cache) == [".room", "0.tar", "2.tar", "3.tar"]
    content(cache, file(web, 4))
    os.utime(cache.folder / file(web, 0).name, (0, 1))
    content(cache, file(web, 5))
    assert whole(cache) == [".room", "3.tar", "4.tar", "5.tar"]
    assert os.pread(first, SIZE, 0) == np.random.default_rng(0).bytes(SIZE), "what is open stays readable"
    os.close(first)


def test_cache_fetch_evicts_nothing_that_is_kept(web: Web, tmp_path: Path) -> None:
    cache, files = Cache(tmp_path / "cache", 2 * SIZE), [file(web, number) for number in range(3)]
    names = {remote.name for remote in files}
    assert [cache.fetch(remote, names) for remote in files] == [True, True, False]
    assert whole(cache) == [".room", "0.tar", "1.tar"]
    assert cache.fetch(files[2], names - {files[0].name})
    assert whole(cache) == [".room", "1.tar", "2.tar"]


def test_cache_fetches_a_damaged_file_again(web: Web, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    content(cache, file(web, 0))
    os.truncate(cache.folder / file(web, 0).name, 10)
    assert content(cache, file(web, 0)) == np.random.default_rng(0).bytes(SIZE)


def test_cache_filled_by_several_processes_at_once_fetches_each_file_once(web: Web, tmp_path: Path) -> None:
    web.fault = lambda _: Fault(delay=0.02)
    context, cache = multiprocessing.get_context("fork"), Cache(tmp_path / "cache", 10 * SIZE)

    def read() -> None:
        for number in range(6):
            assert content(cache, file(web, number)) == np.random.default_rng(number).bytes(SIZE)

    readers = [context.Process(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 3
    assert sorted(web.got(".tar")) == [f"{number}.tar" for number in range(6)]


def test_cache_smaller_than_what_several_processes_read_at_once_still_serves_them(web: Web, tmp_path: Path) -> None:
    context, cache = multiprocessing.get_context("fork"), Cache(tmp_path / "cache", SIZE)

    def read(start: int) -> None:
        for number in range(start, start + 6):
            assert content(cache, file(web, number % 6)) == np.random.default_rng(number % 6).bytes(SIZE)

    readers = [context.Process(target=read, args=(2 * start,)) for start in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 3
    assert len(whole(cache)) <= 2


def test_cache_download_killed_by_sigkill_is_not_taken_for_whole(web: Web, tmp_path: Path) -> None:
    hang, cache = Fault(cut=SIZE // 2, hang=True), Cache(tmp_path / "cache", SIZE)
    web.fault = lambda request: hang if request.name == "1.tar" and request.before == 0 else Fault()
    process = multiprocessing.get_context("fork").Process(target=cache.open, args=(file(web, 1),))
    process.start()
    part = cache.folder / f".{file(web, 1).name}.part"
    while not part.exists() or not part.stat().st_size:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.exists()
    assert content(cache, file(web, 2)) == np.random.default_rng(2).bytes(SIZE), "a dead process keeps no room"
    assert not part.exists()
    assert content(cache, file(web, 1)) == np.random.default_rng(1).bytes(SIZE)


def test_cache_waits_for_another_process_only_while_it_makes_progress(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "WAIT", 0.2)
    web.fault, cache = lambda _: Fault(cut=SIZE // 2, hang=True), Cache(tmp_path / "cache", 2 * SIZE)
    process = multiprocessing.get_context("fork").Process(target=cache.open, args=(file(web, 1),))
    process.start()
    while not web.requests:
        time.sleep(0.01)
    with pytest.raises(MachineFault, match="nothing was downloaded in 0.2 s"):
        cache.open(file(web, 1))
    process.kill()
    process.join()


def test_cache_is_filled_ahead_in_the_order_of_use(web: Web, tmp_path: Path) -> None:
    """Files are needed as 0 1, 1 2, 3, 4, 5; there is room for three."""
    cache, taken = Cache(tmp_path / "cache", 3 * SIZE), [0]
    batches = iter([[file(web, number) for number in batch] for batch in ([0, 1], [1, 2], [3], [4], [5])])

    class Done(Exception):
        pass

    def progress() -> int:
        """Batches are taken one by one, each when all that it and its successor need is there."""
        here = {name for name in whole(cache) if name[0] != "."} if cache.folder.exists() else set()
        if {f"{number}.tar" for number in ([0, 1, 2], [1, 2, 3], [3, 4], [4, 5], [5])[taken[0]]} <= here:
            taken[0] += 1
            if taken[0] == 5:
                raise Done
        return taken[0]

    with pytest.raises(Done):
        fetch_ahead(cache, 6 * SIZE, batches, progress, None, os.getppid())
    assert web.got(".tar") == [f"{number}.tar" for number in range(6)], "in order, and none twice"


def test_cache_sizes() -> None:
    assert [num_bytes(text) for text in ("12", "500MB", "1.5 TB", "3g", "7kb")] == [
        12, 500_000_000, 1_500_000_000_000, 3_000_000_000, 7_000,
    ]  # fmt: skip
    for text in ("", "many", "-1GB", "1.5", "1 GB/s", "nan"):
        with pytest.raises(ValueError, match="is no size; write for example 500MB"):
            num_bytes(text)


def test_cache_folder_of_everybody_is_refused(web: Web, tmp_path: Path) -> None:
    """Another user could put a file of the right name and size there, whose sha256 is not computed again."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    with pytest.raises(Refused, match=r"data\.cache=.*everybody may write there"):
        Cache(tmp_path / "cache", 10**6).open(file(web, 0))
