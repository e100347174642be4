"""Packing images of other kinds of pixels: their statistics are those that training sees, and every change is said."""

from __future__ import annotations

import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_dist.commands import data
from mae_dist.data.changes import Changes
from mae_dist.data.decode import decode
from mae_dist.data.index import Dataset, open_split
from mae_dist.data.loader import TarSource
from mae_dist.data.pixels import DEEP, FIRST, NOT_TURNED, ON_WHITE, Decoding
from mae_dist.data.resident import ResidentSource, open_resident
from mae_dist.data.views import View
from mae_dist.schema import ViewConfig

CPU = torch.device("cpu")

VALUES = np.linspace(0, 4095, 32 * 32).reshape(32, 32)


def folder_of(images: list[np.ndarray], root: Path) -> Path:
    """A class folder of these arrays: .png for uint8 and uint16 of two axes, else .npy."""
    (root / "images" / "a").mkdir(parents=True)
    for number, values in enumerate(images):
        path = root / "images" / "a" / f"{number}"
        if values.ndim == 2:
            Image.fromarray(values).save(path.with_suffix(".png"))
        else:
            np.save(path.with_suffix(".npy"), values)
    return root / "images"


def pack(source: Path, *options: str) -> Dataset:
    out = source.parent / "packed"
    data.main(["pack", "folder", "--source", str(source), "--out", str(out), "--workers", "1", *options])
    return Dataset.load(out)


def test_pack_of_12_bit_images_says_what_it_does_and_white_makes_them_bright(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = folder_of([VALUES.astype(np.uint16)] * 2, tmp_path)
    with caplog.at_level(logging.WARNING):
        dark = pack(images)
    assert "2 images: of 16-bit values the upper 8 bits are taken" in caplog.text
    assert "no 16-bit value exceeds 4095 of 65535; try data.white (data pack: --white)" in caplog.text
    (tmp_path / "packed").rename(tmp_path / "dark")
    bright = pack(images, "--white", "4095")
    assert (dark.white, bright.white) == (None, 4095)
    assert dark.mean is not None
    assert bright.mean == pytest.approx([0.5] * 3, abs=0.001)
    assert dark.mean == pytest.approx([0.5 / 16] * 3, abs=0.003)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_pack_of_any_channels_measures_each_and_is_read_alike_from_memory_and_tars(
    channels: int, tmp_path: Path
) -> None:
    generator, side = np.random.default_rng(channels), (20, 28)
    stored = generator.random((3, *side, channels)).astype(np.float32) ** (1 + np.arange(channels))
    known = pack(folder_of(list(stored), tmp_path), "--channels", str(channels))
    assert known.mean == pytest.approx(stored.mean((0, 1, 2)).tolist(), abs=0.003)
    assert known.std == pytest.approx(stored.std((0, 1, 2)).tolist(), abs=0.003)
    split, how = open_split(str(tmp_path / "packed"), "train"), Decoding(channels)
    plan = [(np.zeros(3, np.int64), np.arange(3))]
    for crop, size in (("resized", (12, 16)), ("pad", side), ("center", (16, 12))):
        view = View(ViewConfig(crop=crop), size, (0.5,) * channels, (0.25,) * channels, 3, True)  # pyright: ignore
        sources = ResidentSource(split, CPU, True, how), TarSource(split, CPU, 0, how)
        ((resident,), (streamed,)) = (list(source.batches(plan, view)) for source in sources)
        assert resident.images.shape == streamed.images.shape == (3, channels, *size)
        assert (resident.images - streamed.images).abs().max() < 4 * 2 / 255


def test_pack_encodes_arrays_as_8_bits_and_refuses_formats_without_the_channels(tmp_path: Path) -> None:
    images = folder_of([np.full((40, 60, 5), 1000 * number, np.uint16) for number in range(3)], tmp_path)
    with pytest.raises(ValueError, match="--channels 5: jpg holds 1 or 3; add --format npy"):
        pack(images, "--channels", "5", "--short-side", "20")
    with pytest.raises(ValueError, match=r"set data\.channels=5 \(data pack: --channels 5\)"):
        pack(images)
    known = pack(images, "--channels", "5", "--short-side", "20", "--format", "npy", "--white", "2000")
    assert (known.image_size, known.white) == ((20, 30), None)
    split = open_split(str(tmp_path / "packed"), "train")
    values = sorted(int(decode(split.read(i), how=Decoding(5))[3, 4, 2]) for i in range(3))
    assert values == [0, 128, 255]


def test_pack_of_grey_images_and_kinds_of_files_that_torchvision_reads(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number, extension in enumerate(("png", "tif", "tiff", "bmp", "ppm", "pgm", "JPEG")):
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / f"{number}.{extension}")
    known = pack(tmp_path / "images", "--channels", "1", "--format", "jpg")
    assert known.mean == pytest.approx((100 / 255,))
    assert known.std == (1.0,)
    assert sum(shard.num_samples for shard in known.splits["train"]) == 7


def save_changed(folder: Path) -> dict[str, int]:
    """Images that decoding changes in several ways: in how many of them what."""
    folder.mkdir(parents=True)
    plain, turned = Image.fromarray(VALUES.astype(np.uint8)), Image.Exif()
    turned[0x0112] = 6
    for number in range(2):
        Image.fromarray((16 * VALUES).astype(np.uint16)).save(folder / f"deep{number}.png")
        plain.save(folder / f"films{number}.gif", save_all=True, append_images=[Image.new("L", (32, 32), 9)])
    Image.new("RGBA", (32, 32), (9, 9, 9, 100)).save(folder / "clear.png")
    plain.save(folder / "turned.jpg", exif=turned)
    plain.save(folder / "plain.png")
    return {DEEP: 2, FIRST: 2, ON_WHITE: 1, NOT_TURNED: 1}


def test_pack_says_each_change_with_its_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = save_changed(tmp_path / "images" / "a")
    pack(tmp_path / "images")
    said = [record.message for record in caplog.records]
    assert [line for line in said if re.match(r"\d+ images?: ", line)] == [
        f"{count} image{'s' * (count > 1)}: {what}" for what, count in sorted(expected.items())
    ]


def test_runs_say_each_change_once_from_tars_and_with_counts_from_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images" / "a"
    expected = save_changed(folder)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, file in enumerate(sorted(folder.iterdir())):
            tar.add(file, f"{number:04d}{file.suffix}")
    data.main(["index", str(tmp_path / "x.tar")])
    split = open_split(str(tmp_path), "train")
    view = View(ViewConfig(), 16, (0.5,) * 3, (0.25,) * 3, 3, True)
    plan = [(np.zeros(7, np.int64), np.arange(7))] * 2
    caplog.clear()
    changes = Changes()
    source = TarSource(split, CPU, 0, changes=changes)
    for times in (2, 0):
        list(source.batches(plan, view))
        changes.log_new()
        lines = [record.message for record in caplog.records if "logged once" in record.message]
        assert lines == [
            f"{times * count} images so far, {changes.found[what][1]} first: {what} (logged once)"
            for what, count in sorted(expected.items())
            if times
        ]
        caplog.clear()
    for _ in range(2):
        caplog.clear()
        ResidentSource(split, CPU, True)
        for what, count in expected.items():
            assert caplog.text.count(f"{count} of 7 images: {what}") == 1


def test_resident_files_of_two_ways_of_decoding_live_beside_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(folder_of([VALUES.astype(np.uint16)] * 3, tmp_path))
    split = open_split(str(tmp_path / "packed"), "train")
    ways = Decoding(), Decoding(white=4095.0), Decoding(channels=1)
    caplog.set_level(logging.INFO)
    first = []
    for _ in range(2):
        first = [open_resident(split, True, how).images.clone() for how in ways]
    assert caplog.text.count("images into it, once") == 3
    assert len(list((tmp_path / "packed").glob("train*.resident"))) == 3
    assert (first[0].max(), first[1].max(), first[2].shape[1]) == (15, 255, 1)
