"""Resample: batches on a device have the pixels that Pillow computes one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_dist import schema
from mae_dist.data import resample, views

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def noise(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high, shape, dtype=np.uint8)


def draws(num: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((num, 10, 4)))


def sizes_of(num: int, height: int, width: int) -> Tensor:
    return torch.tensor([[height, width]]).expand(num, 2)


def by_pil(images: np.ndarray, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Each image cropped to its box, resized and flipped by Pillow; pixels around a fractional box count too."""
    found = []
    for pixels, box, flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        image, (top, left, height, width) = Image.fromarray(pixels), box
        if all(value.is_integer() for value in box):
            image = image.crop((left, top, left + width, top + height))
            top, left = 0, 0
        inside = max(left, 0), max(top, 0), min(left + width, image.width), min(top + height, image.height)
        array = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=inside))
        found.append(array[:, ::-1] if flip else array)
    return np.stack(found)


def shown(how: str, images: np.ndarray, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Pixels in 0..255, (b, *size, 3), by `cut` or `resize`."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return getattr(resample, how)(planes, boxes, flips, size).permute(0, 2, 3, 1).numpy() * 255


@pytest.mark.parametrize("kind", ["resized", "pad", "center", "fractional"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, (32, 32)), (40, 24, (16, 16)), (16, 20, (48, 48)), (64, 50, (32, 32)), (32, 32, (8, 8)),
        (9, 7, (1, 1)), (40, 24, (16, 28)), (24, 40, (50, 6)),
    ],
)  # fmt: skip
def test_resize_agrees_with_pil(height: int, width: int, size: tuple[int, int], kind: str) -> None:
    num = 40
    sizes, flips = sizes_of(num, height, width), torch.arange(num) % 2 == 1
    boxes = {
        "resized": lambda: views.resized_boxes(draws(num), sizes, (0.08, 1.0), RATIO, clamp=False),
        "pad": lambda: views.shifted_boxes(draws(num)[:, 0, :2], sizes, 4),
        "center": lambda: views.center_boxes(sizes, 0.875, size),
        "fractional": lambda: views.center_boxes(sizes, 0.83),
    }[kind]()
    images = noise(num, height, width, 3, low=80, high=176)  # bicubic overshoots stay within 0..255
    difference = np.abs(by_pil(images, boxes, flips, size) - shown("resize", images, boxes, flips, size))
    assert difference.max() < (1.5 if kind != "pad" else 2.5)  # a black border does make them leave it
    assert difference.mean() < 0.5


def test_resize_clips_as_pil_does() -> None:
    """Saturated pixels; boxes no higher than wide, for which every version of Pillow resizes rows first."""
    images, flips = noise(40, 30, 40, 3), torch.zeros(40, dtype=torch.bool)
    boxes = views.resized_boxes(draws(40), sizes_of(40, 30, 40), SCALE, (1.0, 2.0), clamp=False)
    assert (boxes[:, 2] <= boxes[:, 3] + 1).all()
    boxes[:, 2] = boxes[:, 2].minimum(boxes[:, 3])
    difference = np.abs(by_pil(images, boxes, flips, (24, 24)) - shown("resize", images, boxes, flips, (24, 24)))
    assert difference.max() < 1.5
    assert difference.mean() < 0.5


def test_cut_of_shifts_is_exact() -> None:
    images, num = noise(60, 32, 32, 3), 60
    boxes = views.shifted_boxes(draws(num)[:, 0, :2], sizes_of(num, 32, 32), 4)
    boxes[:3, :2] = torch.tensor([[-40, 0], [3, 40], [33, -33]])  # wholly outside
    flips = torch.arange(num) % 2 == 0
    expected, found = by_pil(images, boxes, flips, (32, 32)), shown("cut", images, boxes, flips, (32, 32))
    assert np.array_equal(np.rint(found), expected)
    assert np.abs(found - expected).max() < 1e-4
    assert not found[:3].any()
    assert np.array_equal(found, shown("resize", images, boxes, flips, (32, 32)))
    top, left = boxes[5, :2].int().tolist()
    padded = np.pad(images[5], ((4, 4), (4, 4), (0, 0)))
    assert np.array_equal(expected[5], padded[4 + top : 36 + top, 4 + left : 36 + left])


def test_cut_of_whole_pixels_within_an_image_is_exact() -> None:
    images, boxes = noise(6, 20, 24, 3), views.center_boxes(sizes_of(6, 20, 24), 0.8)
    flips = torch.tensor([True, False] * 3)
    found = shown("cut", images, boxes, flips, (16, 16))
    assert np.array_equal(np.rint(found[1]), images[1, 2:18, 4:20])
    assert np.array_equal(np.rint(found[0]), images[0, 2:18, 4:20][:, ::-1])
    assert np.array_equal(np.rint(found), by_pil(images, boxes, flips, (16, 16)))
    wide = torch.cat([boxes[:, :2], torch.tensor([[16.0, 20.0]]).expand(6, 2)], 1)
    assert np.array_equal(np.rint(shown("cut", images, wide, flips, (16, 20))), by_pil(images, wide, flips, (16, 20)))


@pytest.mark.parametrize("crop", ["resized", "resized_clamped", "pad", "center"])
def test_resample_and_boxes_read_nothing_back_from_the_device(crop: str) -> None:
    """Tensors on the device `meta` have no values, so that whatever a host would wait for raises."""
    view = views.View(schema.ViewConfig(crop=crop), 16, (0.5,) * 3, (0.2,) * 3, 9, True)  # pyright: ignore
    ids = torch.arange(5, device="meta")
    images = torch.empty((5, 3, 16, 16), dtype=torch.uint8, device="meta")
    boxes, flips = view.boxes(ids, ids, torch.empty((5, 2), dtype=torch.int64, device="meta"))
    assert views.normalise(resample.cut(images, boxes, flips, (16, 16)), view.mean, view.std).shape == (5, 3, 16, 16)
    rows, columns = resample.resize_matrices(boxes, flips, 16, 16, (16, 16))
    assert rows.shape == columns.shape == (5, 16, 16)
