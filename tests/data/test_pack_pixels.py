"""Packing images of other kinds of pixels: their statistics are those that training sees, and every change is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dist.commands import data
from mae_dist.data.index import Dataset

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
    assert "no 16-bit value exceeds 4095 of 65535; try --white" in caplog.text
    (tmp_path / "packed").rename(tmp_path / "dark")
    bright = pack(images, "--white", "4095")
    assert (dark.white, bright.white) == (None, 4095)
    assert dark.mean is not None
    assert bright.mean == pytest.approx([0.5] * 3, abs=0.001)
    assert dark.mean == pytest.approx([0.5 / 16] * 3, abs=0.003)
