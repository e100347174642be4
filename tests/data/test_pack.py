"""Packing: deterministic, atomic, restartable; the same bytes for any number of workers."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from image_files import content_of, image_file
from PIL import Image
from running import is_running

from mae_dist.atomic import mount_points
from mae_dist.commands.data import main
from mae_dist.data import dataset, index
from mae_dist.data.pack import Picture, Source, pack
from mae_dist.data.reencode import Encoding
from mae_dist.data.sources import from_folder, from_synthetic
from mae_dist.errors import MachineFault

# --- the writing


def test_pack_shards_are_readable_by_webdataset(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    pack(from_synthetic(12, 4), tmp_path / "out", shard_size=5)
    urls = [str(tar) for tar in sorted((tmp_path / "out").glob("train-*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False)
    found = list(dataset.decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in found] == [f"train_{i:06d}" for i in range(12)]
    assert [label for _, _, label in found] == [i % 10 for i in range(12)]
    assert {image.shape for _, image, _ in found} == {(32, 32, 3)}


def test_pack_is_deterministic_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for number in range(6):
        image_file(source / f"class {number % 2}" / f"{number}.png", number)
    for name, make in {"s": lambda: from_synthetic(9, 3), "f": lambda: from_folder(source, test_share=0.3)}.items():
        for turn in ("1", "2"):
            pack(make(), tmp_path / (name + turn), shard_size=4)
        assert content_of(tmp_path / f"{name}1") == content_of(tmp_path / f"{name}2")
    pack(from_synthetic(9, 3, seed=1), tmp_path / "s3", shard_size=4)
    assert content_of(tmp_path / "s3") != content_of(tmp_path / "s1")


def test_pack_does_not_overwrite_existing_data(tmp_path: Path) -> None:
    out = tmp_path / "100% new"
    out.mkdir()
    pack(from_synthetic(3, 3), out)
    before = content_of(out)
    with pytest.raises(ValueError, match="not an empty folder"):
        pack(from_synthetic(4, 4), out)
    assert content_of(out) == before


def test_pack_result_is_read_whole_by_timm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from timm.data.readers.reader_wds import ReaderWds

    for number in range(8):
        kind = ("JPEG", "PNG")[number % 2]
        image_file(
            tmp_path / "in" / ("train", "val")[number // 6] / "ab"[number % 2] / f"{number}.{kind}", number, kind=kind
        )
    pack(from_folder(tmp_path / "in"), tmp_path / "out", shard_size=4)
    for split, count in (("train", 6), ("val", 2)):
        assert f"split {split}: stores {count // 2} .jpg, {count // 2} .png" in caplog.text
        reader = ReaderWds(str(tmp_path / "out"), split=split)
        assert (len(reader), sorted(label for _, label in reader)) == (count, sorted([0, 1] * (count // 2)))


def test_pack_constant_channel_is_said_and_stored_with_std_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        image_file(tmp_path / "in" / "c" / f"{number}.png", number)  # blue is always 7
    dataset = pack(from_folder(tmp_path / "in"), tmp_path / "out").dataset
    assert dataset.std == (0.5 / 255, 1 / 255, 1.0)
    assert "constant in all images of train: channel 2" in caplog.text


def test_pack_out_at_a_link_makes_its_target_and_at_a_mount_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    pack(from_synthetic(2, 2), tmp_path / "link")
    assert (tmp_path / "target" / "dataset.json").is_file()
    assert (tmp_path / "link").is_symlink()
    mount = next(path for path in mount_points() if path.is_dir() and not any(path.iterdir()))
    with pytest.raises(ValueError, match=f"--out {mount}: a file system is mounted there; choose a folder in it"):
        pack(from_synthetic(2, 2), mount)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pack", "synthetic", "--out", "x", "--max-bad", "2"], "--max-bad 2"),
        (["pack", "synthetic", "--out", "x", "--test", "0"], "--test 0"),
        (["pack", "synthetic", "--out", "x", "--shard-size", "0"], "--shard-size 0"),
        (["pack", "synthetic", "--out", "x", "--workers", "0"], "--workers 0"),
        (["pack", "synthetic"], "--out"),
        (["pack", "folder", "--source", "nowhere", "--out", "x", "--quality", "80"], "--quality 80"),
        (["pack", "tars", "--source", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["pack", "tars", "--source", "*.tar", "--out", "x"], "no file matches"),
        (["pack", "folder", "--source", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["pack", "cifar100", "--source", "nowhere", "--out", "x"], "nowhere: no such file"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_pack_mistakes_raise_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(argv)
    assert list(tmp_path.iterdir()) == []


# --- workers, kills and restarts


SMALLER = Encoding(short_side=20)


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    """Class folders with 24 training and 6 test images, 40 x 30 and smaller than 20; asked for in pairs."""
    for number in range(30):
        size = (40, 30) if number % 3 else (17, 12)
        path = tmp_path / "in" / ("train" if number < 24 else "val") / "ab"[number % 2] / f"{number}.jpg"
        image_file(path, 8 * number, size, "JPEG")
    return replace(from_folder(tmp_path / "in"), chunk=2)


def packed(source: Source, out: Path, workers: int = 1, max_bad: float = 0.01) -> dict[str, bytes]:
    pack(source, out, 4, SMALLER, workers, max_bad=max_bad)
    return content_of(out)


def at(source: Source, number: int, act: Callable[[], None]) -> Source:
    """The source, which calls `act` before it yields this picture of train."""

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for picture_number, picture in zip(numbers, source.pictures(split, numbers), strict=True):
            if (split, picture_number) == ("train", number):
                act()
            yield picture

    return replace(source, pictures=pictures)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [2, 3])
def test_pack_bytes_are_equal_for_any_number_of_workers(photos: Source, tmp_path: Path, workers: int) -> None:
    assert packed(photos, tmp_path / "many", workers) == packed(photos, tmp_path / "one")


@pytest.mark.parametrize(("victim", "workers"), [("main", 1), ("main", 2), ("worker", 2)])
def test_pack_continues_after_sigkill_and_keeps_finished_shards(
    photos: Source, tmp_path: Path, victim: str, workers: int
) -> None:
    out, work, killer = tmp_path / "out", tmp_path / ".out.packing", tmp_path / "killer"

    def kill() -> None:
        wait_for((work / "finished" / "train-000001.json").is_file)
        killer.write_text(str(os.getpid()))
        os.kill(os.getppid() if (victim, workers) == ("main", 2) else os.getpid(), signal.SIGKILL)

    dying = at(photos, 13, kill)
    if victim == "main":
        process = multiprocessing.get_context("fork").Process(target=packed, args=(dying, out, workers))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        wait_for(lambda: not is_running(int(killer.read_text())))
    else:
        with pytest.raises(MachineFault, match="worker process was killed.*the same command continues"):
            packed(dying, out, workers)
    assert not out.exists()
    before = {tar: os.stat(work / "data" / tar) for tar in ("train-000000.tar", "train-000001.tar")}
    assert packed(photos, out, workers) == packed(photos, tmp_path / "uninterrupted")
    for tar, status in before.items():
        assert (os.stat(out / tar).st_ino, os.stat(out / tar).st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert not work.exists()


def test_pack_locks_out_a_second_process_and_ctrl_c_ends_workers(
    photos: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, blocked = tmp_path / "out", tmp_path / "blocked"

    def block() -> None:
        blocked.write_text(str(os.getpid()))
        signal.pause()

    def run() -> None:
        os.setpgid(0, 0)
        try:
            packed(at(photos, 13, block), out, workers=2)
        except KeyboardInterrupt:
            os._exit(130)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    group = process.pid
    assert group
    try:
        wait_for(lambda: blocked.is_file() and blocked.read_text() != "")
        with pytest.raises(ValueError, match=f"process {group} on .* is packing into it"):
            packed(photos, out)
        os.killpg(group, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
        wait_for(lambda: not is_running(int(blocked.read_text())))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    assert capfd.readouterr().err == ""
    assert packed(photos, out) == packed(photos, tmp_path / "uninterrupted")


def stop() -> None:
    raise KeyboardInterrupt


def test_pack_begun_with_other_options_or_source_is_refused(photos: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        packed(at(photos, 13, stop), out)
    for changed, options, message in (
        (photos, (4, Encoding(short_side=19)), "another --short-side;"),
        (photos, (5, Encoding(short_side=20, quality=80)), "another --shard-size and another --quality;"),
        (replace(photos, fingerprint="other"), (4, SMALLER), "another source;"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(changed, out, *options)
    assert packed(photos, out) == packed(photos, tmp_path / "uninterrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "uninterrupted"]


def test_pack_of_a_source_without_fingerprint_starts_again(photos: Source, tmp_path: Path) -> None:
    source = replace(photos, fingerprint="")
    with pytest.raises(KeyboardInterrupt):
        packed(at(source, 13, stop), tmp_path / "out")
    seen: list[None] = []
    assert packed(at(source, 0, lambda: seen.append(None)), tmp_path / "out") == packed(photos, tmp_path / "other")
    assert seen


def test_pack_full_disk_is_a_machine_fault_and_the_same_command_continues(photos: Source, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        packed(at(photos, 13, stop), tmp_path / "out")
    next_tar = tmp_path / ".out.packing" / "data" / "train-000003.tar"
    next_tar.unlink(missing_ok=True)
    next_tar.symlink_to("/dev/full")
    with pytest.raises(MachineFault, match="No space left on device.*the same command continues"):
        packed(photos, tmp_path / "out")
    next_tar.unlink()
    assert packed(photos, tmp_path / "out") == packed(photos, tmp_path / "other")


def test_pack_error_in_a_worker_is_raised_and_leaves_nothing(photos: Source, tmp_path: Path) -> None:
    def broken() -> None:
        raise ValueError("x.jpg: cannot be read")

    with pytest.raises(ValueError, match="x.jpg: cannot be read"):
        packed(at(photos, 13, broken), tmp_path / "deep" / "out", workers=2)
    assert list((tmp_path / "deep").iterdir()) == []


def test_pack_counts_unreadable_images_also_across_a_restart(
    photos: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for number, picture in zip(numbers, photos.pictures(split, numbers), strict=True):
            yield replace(picture, content=b"") if (split, number) in (("train", 3), ("train", 20)) else picture

    source = replace(photos, pictures=pictures)
    for share, message in ((0.1, ""), (0.05, "2 of 24 images .2 unreadable. of split train cannot be used, more than")):
        out = tmp_path / f"out {share}"
        with pytest.raises(KeyboardInterrupt):
            packed(at(source, 19, stop), out, max_bad=share)
        if message:
            with pytest.raises(ValueError, match=message):
                packed(source, out, max_bad=share)
        else:
            caplog.clear()
            uninterrupted = packed(source, tmp_path / "uninterrupted", max_bad=share)
            assert packed(source, out, workers=2, max_bad=share) == uninterrupted
            assert "split train: left out 2 of 24 images (2 unreadable)" in caplog.text
            assert len(index.open_split(str(out), "train")) == 22


# --- the command


@pytest.mark.usefixtures("photos")
def test_pack_command_prints_cost_in_disk_and_gain_in_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--short-side", "20", "--format", "npy", "--workers", "2"]
    main(["pack", "folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options])
    printed = capsys.readouterr().out
    assert "30 of them encoded anew, 20 resized: 0.0 MB of image files became 0.0 MB" in printed
    assert re.search(
        r"reads \d+\.\dx as fast as the source: [\d,]+ -> [\d,]+ images/s on one core \(24 images", printed
    )


# --- show


def test_data_show_command_counts_and_draws_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(from_synthetic(80, 20), tmp_path / "out")
    capsys.readouterr()
    main(["show", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "80 images" in printed.out
    assert re.search(r"10 classes of 8 images; largest: \w+ \(8\), ", printed.out)
    assert "32 x 32 (80)" in printed.out
    assert printed.err == ""
    with Image.open(tmp_path / "out" / "sheet-train.png") as sheet:
        assert sheet.width > 10 * 90
        assert len(sheet.getcolors(1 << 20) or []) > 1000
    main(["show", str(tmp_path / "out"), "--split", "test", "--out", str(tmp_path / "x.png")])
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (1004, 14 + 204), "two rows below the names of the classes, which have two images each"


def test_data_show_command_handles_unreadable_and_unlabelled_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    main(["index", str(tmp_path / "x.tar")])
    main(["show", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 without a label" in printed
    assert "2 unreadable" in printed


def test_pack_dataset_json_content(tmp_path: Path) -> None:
    pack(from_synthetic(3, 3), tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert plain["format"] == dataset.FORMAT
    assert plain["splits"]["train"][0]["tar"] == "train-000000.tar"
