"""Resident splits: one file, made once by one process, never used when stale, damaged or half-written."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared_types import Tars

from mae_dist import schema
from mae_dist.data import index, resident
from mae_dist.data.resident import Pixels, ResidentSource, open_resident, path_of
from mae_dist.data.views import View

CPU = torch.device("cpu")


def same(a: Pixels, b: Pixels) -> bool:
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors) and a.changes == b.changes


def overwrite(path: Path, content: bytes) -> None:
    """Other bytes, as many, without a trace in size or modification time."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def start(folder: Path, log: Path, *, before: Callable[[], object] = lambda: None) -> BaseProcess:
    """A process that calls `before`, then opens the split with its log in a file; its exit status is 0 if it could."""

    def run() -> None:
        logging.basicConfig(level=logging.INFO, filename=log, format="%(message)s", force=True)
        before()
        open_resident(index.open_split(str(folder), "train"))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_resident_file_is_made_once_and_mapped_by_later_starts(tars: Tars, info: pytest.LogCaptureFixture) -> None:
    data = tars([4, 3])
    first = open_resident(data)
    path = path_of(data)
    assert path == data.tars[0].parent / "train.resident"
    assert f"{path}: there is no such file yet; decoding 7 images into it, once" in info.text
    assert first.images.shape == (7, 3, 32, 32)
    assert first.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not first.bad.any()
    for tar in data.tars:
        overwrite(tar, bytes(tar.stat().st_size))
    info.clear()
    second = open_resident(index.open_split(str(path.parent), "train"))
    assert same(first, second)
    assert info.text == ""
    assert str(path) in Path("/proc/self/maps").read_text()
    assert sorted(file.name for file in path.parent.iterdir() if file.suffix not in (".tar", ".idx")) == [
        "dataset.json", "train.resident",
    ]  # fmt: skip


def test_resident_images_are_the_same_for_any_number_of_workers(tars: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tars([150], broken={70})
    alone = resident.decode(data)
    monkeypatch.setattr(resident, "WORTH_A_WORKER", 50)  # three processes, where there are as many cores
    assert same(resident.decode(data), alone)
    assert alone.bad.nonzero().flatten().tolist() == [70]


def test_resident_file_is_stale_after_a_tar_changed(tars: Tars, info: pytest.LogCaptureFixture) -> None:
    data = tars([3, 3])
    assert open_resident(data).labels.tolist() == [0, 1, 2, 0, 1, 2]
    content = bytearray(data.tars[1].read_bytes())
    content[int(data._table(1).spans[0, 2])] = ord("2")
    data.tars[1].write_bytes(content)
    info.clear()
    assert open_resident(index.open_split(str(data.tars[0].parent), "train")).labels.tolist() == [0, 1, 2, 2, 1, 2]
    assert "train.resident: its tars or their index have changed; decoding 6" in info.text


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_resident_file_that_is_damaged_is_made_anew(tars: Tars, info: pytest.LogCaptureFixture, damage: str) -> None:
    data = tars([3])
    opened, path = open_resident(data), path_of(data)
    before = Pixels(*(tensor.clone() for tensor in opened.tensors.values()), opened.changes)  # pyright: ignore
    content = path.read_bytes()
    path.unlink()
    path.write_bytes({"cut": content[:-1], "header": b"x" * len(content), "empty": b""}[damage])
    info.clear()
    assert same(open_resident(data), before)
    assert "train.resident: damaged (" in info.text
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, {"images": torch.zeros(3, 3, 32, 32)},
        {"labels": torch.tensor([0, 1, 10**9])}, {"labels": torch.tensor([0, 1, -1])}, {"bad": torch.zeros(1) > 0},
        {"changes": {"cut": "all"}},
    ],
)  # fmt: skip
def test_resident_file_by_another_hand_is_made_anew(
    tars: Tars, info: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    """It is whole, and has the right key: whoever may write beside the tars has made it."""
    data = tars([3])
    path, before = path_of(data), open_resident(data).images.clone()
    resident.write(path, resident.key_of(data), resident.decode(data)._replace(**change))
    info.clear()
    assert torch.equal(open_resident(data).images, before)
    assert "train.resident: damaged (" in info.text


def test_resident_pipe_at_the_place_of_the_file_is_not_waited_for(tars: Tars) -> None:
    data = tars([3])
    os.mkfifo(path_of(data))
    assert open_resident(data).labels.tolist() == [0, 1, 2]


def test_resident_bad_samples_are_the_same_on_later_starts(tars: Tars, info: pytest.LogCaptureFixture) -> None:
    data = tars([4, 4], extension="jpg", broken={3, 5, 6})
    first = open_resident(data)
    for name in ("s0003.jpg in x-0.tar", "s0005.jpg in x-1.tar", "s0006.jpg in x-1.tar"):
        assert f"unreadable: {name}" in info.text
    summary = "tiny: 3 of 8 images are unreadable, s0003.jpg in x-0.tar first"
    assert summary in info.text
    info.clear()
    second = open_resident(data)
    assert same(first, second)
    assert second.bad.nonzero().flatten().tolist() == [3, 5, 6]
    assert [record.levelname for record in info.records] == ["WARNING"]
    assert summary in info.text


def test_resident_file_is_made_by_one_of_many_processes(tars: Tars, tmp_path: Path) -> None:
    folder = tars([40, 40]).tars[0].parent
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    together = multiprocessing.get_context("fork").Barrier(4)
    processes = [start(folder, log, before=together.wait) for log in logs]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert "".join(log.read_text() for log in logs).count("decoding 80 images into it") == 1
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("when", ["decoding", "writing"])
def test_resident_process_killed_by_sigkill_leaves_nothing_that_is_used(tars: Tars, tmp_path: Path, when: str) -> None:
    """Another process waits meanwhile, and takes over."""
    folder, ready = tars([5]).tars[0].parent, tmp_path / "ready"

    def hang(*_: object) -> None:
        ready.touch()
        time.sleep(60)

    def hang_later() -> None:
        place, name = (resident.Reader, "fill") if when == "decoding" else (os, "fsync")
        pytest.MonkeyPatch().setattr(place, name, hang)

    killed = start(folder, tmp_path / "killed.log", before=hang_later)
    wait_until(ready.exists)
    other = start(folder, tmp_path / "other.log")
    wait_until(lambda: (tmp_path / "other.log").is_file() and "waiting for it" in (tmp_path / "other.log").read_text())
    assert not (folder / "train.resident").exists()
    assert len(list(folder.glob(".*-train.resident"))) == (when == "writing")
    os.kill(killed.pid or 0, signal.SIGKILL)
    other.join(60)
    killed.join(60)
    assert other.exitcode == 0
    assert "there is no such file yet; decoding 5 images" in (tmp_path / "other.log").read_text()
    assert not list(folder.glob(".*"))
    data = index.open_split(str(folder), "train")
    assert same(open_resident(data), resident.decode(data))


def test_resident_process_that_never_finishes_is_not_waited_for_for_ever(
    tars: Tars, tmp_path: Path, info: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, ready = tars([3]), tmp_path / "ready"

    def hang(*_: object) -> None:
        ready.touch()
        time.sleep(60)

    other = start(
        data.tars[0].parent,
        tmp_path / "log",
        before=lambda: pytest.MonkeyPatch().setattr(resident.Reader, "fill", hang),
    )
    wait_until(ready.exists)
    monkeypatch.setattr(resident, "WAIT_FOR_LOCK", 0.3)
    assert open_resident(data).images.shape == (3, 3, 32, 32)
    assert "not finished after 0.3 s by another process; decoding into memory" in info.text
    assert not path_of(data).exists()
    other.kill()
    other.join()


def test_resident_full_disk_keeps_the_images_in_memory(tars: Tars, info: pytest.LogCaptureFixture) -> None:
    data = tars([20])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        pixels = open_resident(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert same(pixels, resident.decode(data))
    assert "train.resident: cannot be written (File too large), so 20 images are decoded at every start" in info.text
    assert not list(path_of(data).parent.glob("*resident*"))
    assert not list(path_of(data).parent.glob(".*"))


def test_resident_folder_that_is_read_only_keeps_the_images_in_memory(tars: Tars, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp()) / "tars"
    try:
        shutil.copytree(tars([4]).tars[0].parent, folder)
        folder.parent.chmod(0o755)
        folder.chmod(0o555)
        process = start(folder, tmp_path / "log", before=lambda: os.geteuid() or os.setuid(65534))
        process.join(60)
        assert process.exitcode == 0
        assert (tmp_path / "log").read_text().count("cannot be written (Permission denied), so 4 images are") == 1
        assert not list(folder.glob("*resident*"))
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder.parent)


def test_resident_files_of_other_tars_have_other_names(tars: Tars) -> None:
    data = tars([2, 3, 1])
    folder = data.tars[0].parent
    globs = [index.open_split(str(folder / name), "train") for name in ("x-*.tar", "x-[01].tar", "x-1.tar")]
    paths = [path_of(split) for split in (data, *globs)]
    assert paths[1] == paths[0]  # the same tars
    assert len(set(paths)) == 3
    assert all(path.parent == folder for path in paths)
    assert paths[3].name.startswith("tars-")
    (folder / index.FILE).unlink()
    assert path_of(index.open_split(str(folder / "x-1.tar"), "train")) == paths[3]
    renamed = index.Dataset("tiny", {"../train": data.shards}, image_size=(32, 32))
    assert path_of(index.ShardIndex(data.tars, data.indexes, data.shards, renamed)).name.startswith("tars-")


@pytest.mark.parametrize(("crop", "size"), [("resized", 24), ("pad", 32)])
def test_resident_batches_are_a_function_of_their_part_of_the_plan(tars: Tars, crop: Any, size: int) -> None:
    source = ResidentSource(tars([9, 9]), CPU)
    view = View(schema.ViewConfig(crop=crop), size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), seed=3, training=True)
    generator = np.random.default_rng(0)
    plan = [(generator.integers(0, 5, num), generator.integers(0, 18, num)) for num in [3, 5, 0, 1] * 5]
    batches = list(source.batches(iter(plan), view))
    assert len(batches) == 20 > resident.DRAWN_TOGETHER
    for part, batch in zip(plan, batches, strict=True):
        (alone,) = source.batches([part], view)
        assert batch.epochs.tolist() == part[0].tolist()
        assert batch.ids.tolist() == part[1].tolist()
        assert batch.labels.tolist() == (part[1] % 3).tolist()
        assert torch.equal(alone.images, batch.images)
