"""RandAugment's operations on arrays: the pixels of timm's functions on Pillow images, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from mae_dist.data import image_ops

HINTS = {"translate_const": 9, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}


def image(height: int, width: int) -> np.ndarray:
    """Smooth areas, edges, and saturated pixels."""
    small = np.random.default_rng(height).integers(-80, 336, (height // 6, width // 6, 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def arguments(name: str) -> list[tuple[Any, ...]]:
    """What timm draws for an operation: of all whole magnitudes, where products of simple fractions meet whole pixels
    and values, and of random ones; with both signs.
    """
    levels = [*range(11), *np.random.default_rng(0).uniform(0, 10, 12)]
    found = set()
    for kind, operation in auto_augment.NAME_TO_OP.items():
        draw = auto_augment.LEVEL_TO_ARG[kind]
        if operation.__name__ == name:
            for seed in (0, 1):  # both signs
                random.seed(seed)
                found |= {draw(level, HINTS) if draw else () for level in levels}
    return sorted(found)


def by_timm(name: str, pixels: np.ndarray, drawn: tuple[Any, ...]) -> np.ndarray:
    options = {"fillcolor": HINTS["img_mean"], "resample": HINTS["interpolation"]}
    return np.asarray(getattr(auto_augment, name)(Image.fromarray(pixels), *drawn, **options))


@pytest.mark.parametrize("name", [name for name in image_ops.OPERATIONS if name != "posterize"])
@pytest.mark.parametrize("size", [(48, 60), (67, 31)])
def test_image_ops_equal_timm(name: str, size: tuple[int, int]) -> None:
    drawn = arguments(name)
    assert len(drawn) >= (1 if name == "invert" else 20)
    pixels = image(*size)
    for flipped in (pixels, pixels[:, ::-1]):
        for values in drawn:
            found = image_ops.OPERATIONS[name](flipped, *values, fillcolor=HINTS["img_mean"], resample=None)
            assert found.dtype == np.uint8
            assert np.array_equal(found, by_timm(name, flipped, values)), values
    assert np.array_equal(pixels, image(*size))


def test_image_ops_shears_far_outside_equal_timm() -> None:
    """Factors up to 3 leave little of the image; 1/8, 1/2 and 1 move lines by halves and whole pixels."""
    pixels = image(48, 60)
    for factor in (3.0, -2.7, 1.0, -1.0, 0.5, 1 / 8, 1e-15, -1e-15):
        for name in ("shear_x", "shear_y"):
            found = image_ops.OPERATIONS[name](pixels, factor, fillcolor=HINTS["img_mean"])
            assert np.array_equal(found, by_timm(name, pixels, (factor,))), factor
        for name in ("translate_x_rel", "translate_y_rel"):
            found = image_ops.OPERATIONS[name](pixels, factor, fillcolor=HINTS["img_mean"])
            assert np.array_equal(found, by_timm(name, pixels, (factor,))), factor


def test_image_ops_posterize_keeps_the_highest_bits() -> None:
    for bits in range(9):
        kept = image_ops.posterize(image(48, 60), bits)
        assert np.array_equal(kept, image(48, 60).astype(int) >> (8 - bits) << (8 - bits))
