"""Views: boxes with the distribution of torchvision's, pixels as PIL computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mae_dist import schema
from mae_dist.data import views

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def noise(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high, shape, dtype=np.uint8)


def draws(num: int, attempts: int = 10) -> np.ndarray:
    return np.random.default_rng(0).random((num, attempts, 4))


def inside(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    return bool(
        (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] >= 1).all()
    )


def test_crop_resized_boxes_stay_within_image_area_and_ratio() -> None:
    sizes = np.random.default_rng(1).integers(60, 400, (3000, 2))
    boxes = views.resized_boxes(draws(3000), sizes, SCALE, RATIO, clamp=False)
    assert inside(boxes, sizes)
    assert np.array_equal(boxes, np.rint(boxes))
    height, width = boxes[:, 2], boxes[:, 3]
    fallback = (boxes[:, :2] == np.floor((sizes - boxes[:, 2:]) / 2)).all(1) & (boxes[:, 2:] == sizes).any(1)
    area = (height * width / sizes.prod(1))[~fallback]
    assert area.min() > SCALE[0] * 0.97  # sides are rounded to whole pixels
    assert area.max() <= 1
    assert ((width + 0.5) / (height - 0.5)).min() > RATIO[0]
    assert ((width - 0.5) / (height + 0.5)).max() < RATIO[1]


def test_crop_clamped_boxes_are_the_first_attempt_cut_to_the_image() -> None:
    sizes = np.full((3000, 2), (40, 100))
    boxes = views.resized_boxes(draws(3000, 1), sizes, (0.08, 1.0), RATIO, clamp=True)
    assert inside(boxes, sizes)
    area = 4000 * (0.08 + 0.92 * draws(3000, 1)[:, 0, 0])
    aspect = np.exp(np.log(3 / 4) + 2 * np.log(4 / 3) * draws(3000, 1)[:, 0, 1])
    assert np.array_equal(boxes[:, 2], np.minimum(40, np.rint(np.sqrt(area / aspect))))
    assert np.array_equal(boxes[:, 3], np.minimum(100, np.rint(np.sqrt(area * aspect))))
    assert (boxes[:, 2] == 40).mean() > 0.3  # much is cut, where an unclamped box would have been drawn again


@pytest.mark.parametrize(("size", "box"), [((10, 200), (0, 93, 10, 13)), ((200, 10), (93, 0, 13, 10))])
def test_crop_of_extreme_aspect_falls_back_to_the_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    boxes = views.resized_boxes(draws(20), np.full((20, 2), size), (0.5, 1.0), RATIO, clamp=False)
    assert boxes.tolist() == [list(box)] * 20


@pytest.mark.parametrize("size", [(100, 130), (60, 200)])
def test_crop_resized_boxes_have_the_distribution_of_torchvision(size: tuple[int, int]) -> None:
    num = 6000
    ours = views.resized_boxes(draws(num), np.full((num, 2), size), SCALE, RATIO, clamp=False)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(num)], dtype=float)
    for ours_, theirs_ in [(ours, theirs), (ours[:, 2:].prod(1), theirs[:, 2:].prod(1)), (ours**2, theirs**2)]:
        error = np.sqrt((ours_.var(0) + theirs_.var(0)) / num)
        assert (np.abs(ours_.mean(0) - theirs_.mean(0)) < 4 * error).all()


def test_crop_shifted_boxes_are_uniform_over_shifts() -> None:
    boxes = views.shifted_boxes(np.random.default_rng(0).random((5000, 2)), np.full((5000, 2), (32, 24)), 2)
    assert (boxes[:, 2:] == (32, 24)).all()
    shifts, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert shifts.tolist() == [[y, x] for y in range(-2, 3) for x in range(-2, 3)]
    assert counts.min() > 140  # of 200 expected


def test_crop_center_boxes_are_central_squares() -> None:
    boxes = views.center_boxes(np.array([[100, 200], [81, 41]]), 0.875)
    assert boxes.tolist() == [[6.25, 56.25, 87.5, 87.5], [22.5625, 2.5625, 35.875, 35.875]]


def view(crop: str, training: bool = True, **changes: float) -> views.View:
    settings = schema.ViewConfig(crop=crop, **changes)  # pyright: ignore
    return views.View(settings, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), 9, training)


@pytest.mark.parametrize("crop", ["resized", "resized_clamped", "pad", "center"])
def test_view_draws_are_a_function_of_the_sample(crop: str) -> None:
    epochs, ids, sizes = np.array([0, 0, 1, 5]), np.array([3, 4, 3, 2**34]), np.array([[32, 40]] * 3 + [[50, 20]])
    boxes, flips = view(crop).boxes(epochs, ids, sizes)
    for i in range(4):
        box, flip = view(crop).boxes(epochs[i : i + 1], ids[i : i + 1], sizes[i : i + 1])
        assert np.array_equal(box[0], boxes[i])
        assert flip[0] == flips[i]
    if crop != "center":
        assert not np.array_equal(boxes[0], boxes[1])
        assert not np.array_equal(boxes[0], boxes[2])


def test_view_flips_have_their_probability_and_only_in_training() -> None:
    ids = np.arange(4000)
    zeros, sizes = np.zeros_like(ids), np.full((4000, 2), 32)
    for flip in (0.0, 0.3, 1.0):
        flips = view("pad", flip=flip).boxes(zeros, ids, sizes)[1]
        assert abs(flips.mean() - flip) < 0.03
    boxes, flips = view("pad", training=False, flip=1.0).boxes(zeros, ids, sizes)
    assert not flips.any()
    assert np.array_equal(boxes, views.center_boxes(sizes, 0.875))


def by_pil(images: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    parts = zip(images, boxes, flips, strict=True)
    return np.stack([views.crop(Image.fromarray(i), b, bool(f), size) for i, b, f in parts])


def by_matrix(images: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    return views.resample(torch.from_numpy(images), boxes, flips, size).permute(0, 2, 3, 1).numpy() * 255


@pytest.mark.parametrize("kind", ["resized", "pad", "center", "fractional"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (40, 24, 16), (16, 20, 48), (64, 50, 32), (32, 32, 8)]
)
def test_resample_agrees_with_pil(height: int, width: int, size: int, kind: str) -> None:
    num = 40
    sizes, flips = np.full((num, 2), (height, width)), np.arange(num) % 2 == 1
    boxes = {
        "resized": lambda: views.resized_boxes(draws(num), sizes, (0.08, 1.0), RATIO, clamp=False),
        "pad": lambda: views.shifted_boxes(draws(num)[:, 0, :2], sizes, 4),
        "center": lambda: views.center_boxes(sizes, 0.875),
        "fractional": lambda: views.center_boxes(sizes, 0.83),
    }[kind]()
    images = noise(num, height, width, 3, low=80, high=176)  # bicubic overshoots stay within 0..255
    limit = 1.5 if kind != "pad" else 2.5  # the black border does make them leave it
    assert np.abs(by_pil(images, boxes, flips, size) - by_matrix(images, boxes, flips, size)).max() < limit


def test_resample_clips_as_pil_does() -> None:
    """Saturated pixels; boxes no higher than wide, for which every version of Pillow resizes rows first."""
    images, sizes = noise(40, 30, 40, 3), np.full((40, 2), (30, 40))
    boxes = views.resized_boxes(draws(40), sizes, SCALE, (1.0, 2.0), clamp=False)
    assert (boxes[:, 2] <= boxes[:, 3] + 1).all()
    boxes[:, 2] = np.minimum(boxes[:, 2], boxes[:, 3])
    flips = np.zeros(40, dtype=bool)
    assert np.abs(by_pil(images, boxes, flips, 24) - by_matrix(images, boxes, flips, 24)).max() < 1.5


def test_resample_of_shifts_is_exact() -> None:
    images, num = noise(60, 32, 32, 3), 60
    boxes, flips = views.shifted_boxes(draws(num)[:, 0, :2], np.full((num, 2), 32), 4), np.arange(num) % 2 == 0
    assert np.array_equal(by_pil(images, boxes, flips, 32), np.rint(by_matrix(images, boxes, flips, 32)))
    assert np.abs(by_matrix(images, boxes, flips, 32) - by_pil(images, boxes, flips, 32)).max() < 1e-4
    top, left = (int(v) for v in boxes[1, :2])
    padded = np.pad(images[1], ((4, 4), (4, 4), (0, 0)))
    assert np.array_equal(by_pil(images, boxes, flips, 32)[1], padded[4 + top : 36 + top, 4 + left : 36 + left])


def test_normalise_and_denormalise_roundtrip() -> None:
    images, mean, std = noise(4, 8, 8, 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    normal = views.normalise(pixels, mean, std)
    assert torch.allclose(normal[:, 1], (pixels[:, 1] - 0.4) / 0.3, atol=1e-6)
    assert np.array_equal(views.denormalise(normal, mean, std), images)
