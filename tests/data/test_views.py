"""Views: boxes with the distribution of torchvision's, pixels as PIL computes them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from mae_dist import schema
from mae_dist.data import views

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def noise(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high, shape, dtype=np.uint8)


def draws(num: int, attempts: int = 10) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((num, attempts, 4)))


def sizes_of(num: int, height: int, width: int) -> Tensor:
    return torch.tensor([[height, width]]).expand(num, 2)


def inside(boxes: Tensor, sizes: Tensor) -> bool:
    return bool(
        (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] >= 1).all()
    )


def test_crop_resized_boxes_stay_within_image_area_and_ratio() -> None:
    sizes = torch.from_numpy(np.random.default_rng(1).integers(60, 400, (3000, 2)))
    boxes = views.resized_boxes(draws(3000), sizes, SCALE, RATIO, clamp=False)
    assert inside(boxes, sizes)
    assert torch.equal(boxes, boxes.round())
    height, width = boxes[:, 2], boxes[:, 3]
    central = (boxes[:, :2] == ((sizes - boxes[:, 2:]) / 2).floor()).all(1)
    fallback = central & (boxes[:, 2:] == sizes).any(1)
    area = (height * width / sizes.prod(1))[~fallback]
    assert area.min() > SCALE[0] * 0.97  # sides are rounded to whole pixels
    assert area.max() <= 1
    assert ((width + 0.5) / (height - 0.5)).min() > RATIO[0]
    assert ((width - 0.5) / (height + 0.5)).max() < RATIO[1]


def test_crop_clamped_boxes_are_the_first_attempt_cut_to_the_image() -> None:
    sizes = sizes_of(3000, 40, 100)
    boxes = views.resized_boxes(draws(3000, 1), sizes, (0.08, 1.0), RATIO, clamp=True)
    assert inside(boxes, sizes)
    area = 4000 * (0.08 + 0.92 * draws(3000, 1)[:, 0, 0])
    aspect = (math.log(3 / 4) + 2 * math.log(4 / 3) * draws(3000, 1)[:, 0, 1]).exp()
    assert torch.equal(boxes[:, 2], (area / aspect).sqrt().round().clamp(max=40))
    assert torch.equal(boxes[:, 3], (area * aspect).sqrt().round().clamp(max=100))
    assert (boxes[:, 2] == 40).double().mean() > 0.3  # much is cut, where an unclamped box would be drawn again


@pytest.mark.parametrize(("size", "box"), [((10, 200), (0, 93, 10, 13)), ((200, 10), (93, 0, 13, 10))])
def test_crop_of_extreme_aspect_falls_back_to_the_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    boxes = views.resized_boxes(draws(20), sizes_of(20, *size), (0.5, 1.0), RATIO, clamp=False)
    assert boxes.tolist() == [list(box)] * 20


@pytest.mark.parametrize("size", [(100, 130), (60, 200)])
def test_crop_resized_boxes_have_the_distribution_of_torchvision(size: tuple[int, int]) -> None:
    num = 6000
    ours = views.resized_boxes(draws(num), sizes_of(num, *size), SCALE, RATIO, clamp=False).numpy()
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(num)], dtype=float)
    for ours_, theirs_ in [(ours, theirs), (ours[:, 2:].prod(1), theirs[:, 2:].prod(1)), (ours**2, theirs**2)]:
        error = np.sqrt((ours_.var(0) + theirs_.var(0)) / num)
        assert (np.abs(ours_.mean(0) - theirs_.mean(0)) < 4 * error).all()


def test_crop_shifted_boxes_are_uniform_over_shifts() -> None:
    boxes = views.shifted_boxes(draws(5000)[:, 0, :2], sizes_of(5000, 32, 24), 2)
    assert torch.equal(boxes[:, 2:], sizes_of(5000, 32, 24).double())
    shifts, counts = boxes[:, :2].unique(dim=0, return_counts=True)
    assert shifts.tolist() == [[y, x] for y in range(-2, 3) for x in range(-2, 3)]
    assert counts.min() > 140  # of 200 expected


def test_crop_center_boxes_are_central_squares() -> None:
    boxes = views.center_boxes(torch.tensor([[100, 200], [81, 41]]), 0.875)
    assert boxes.tolist() == [[6.25, 56.25, 87.5, 87.5], [22.5625, 2.5625, 35.875, 35.875]]


def test_crop_center_boxes_have_the_aspect_ratio_of_the_model() -> None:
    boxes = views.center_boxes(torch.tensor([[100, 200], [100, 100]]), 0.5, (96, 160))
    assert boxes.tolist() == [[25, 100 - 125 / 3, 50, 250 / 3], [35, 25, 30, 50]]


def view(crop: str, training: bool = True, **changes: Any) -> views.View:
    settings = schema.ViewConfig(crop=crop, **changes)  # pyright: ignore
    return views.View(settings, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), 9, training)


@pytest.mark.parametrize(
    ("crop", "digest", "box", "flipped"),
    [
        ("resized", "39b3dc9f1556e87c", [12, 29, 42, 43], 135),
        ("resized_clamped", "c42f708ac954eab1", [0, 41, 57, 66], 135),
        ("pad", "64a0595728b33a61", [0, 1, 57, 121], 135),
        ("center", "1d93c0f649e56959", [4.845000000000002, 36.845, 47.309999999999995, 47.309999999999995], 135),
        ("test", "2bfbbe6ab90b8f59", [4.845000000000002, 36.845, 47.309999999999995, 47.309999999999995], 0),
    ],
)
def test_view_boxes_golden_numbers(crop: str, digest: str, box: list[float], flipped: int) -> None:
    """256 samples of many sizes, every bit. If this fails, every earlier run has become irreproducible."""
    i = torch.arange(256)
    ids = torch.where(i % 4 == 3, 2**33 + 7 * i, 11 * i)
    sizes = torch.stack([20 + 37 * i % 481, 20 + 101 * i % 613], 1)
    sizes[::2] = 32
    training = crop != "test"
    shown = view(crop if training else "pad", training, scale=(0.08, 1.0), test_crop=0.83)
    boxes, flips = shown.boxes(i % 5, ids, sizes)
    assert boxes[1].tolist() == box
    assert int(flips.sum()) == flipped
    assert hashlib.sha256(boxes.numpy().tobytes() + flips.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("crop", ["resized", "resized_clamped", "pad", "center"])
def test_view_draws_are_a_function_of_the_sample(crop: str) -> None:
    epochs, ids = torch.tensor([0, 0, 1, 5]), torch.tensor([3, 4, 3, 2**34])
    sizes = torch.tensor([[32, 40]] * 3 + [[50, 20]])
    boxes, flips = view(crop).boxes(epochs, ids, sizes)
    for i in range(4):
        box, flip = view(crop).boxes(epochs[i : i + 1], ids[i : i + 1], sizes[i : i + 1])
        assert torch.equal(box[0], boxes[i])
        assert flip[0] == flips[i]
    if crop != "center":
        assert not torch.equal(boxes[0], boxes[1])
        assert not torch.equal(boxes[0], boxes[2])


def test_view_flips_have_their_probability_and_only_in_training() -> None:
    ids = torch.arange(4000)
    zeros, sizes = torch.zeros_like(ids), sizes_of(4000, 32, 32)
    for flip in (0.0, 0.3, 1.0):
        flips = view("pad", flip=flip).boxes(zeros, ids, sizes)[1]
        assert abs(flips.double().mean() - flip) < 0.03
    boxes, flips = view("pad", training=False, flip=1.0).boxes(zeros, ids, sizes)
    assert not flips.any()
    assert torch.equal(boxes, views.center_boxes(sizes, 0.875))


@pytest.mark.parametrize(
    ("crop", "training", "share", "size", "whole"),
    [
        ("pad", True, 0.5, (16, 16), True), ("pad", True, 0.5, (16, 20), False),
        ("pad", False, 1.0, (16, 16), True), ("pad", False, 0.5, (16, 16), False),
        ("center", True, 0.5, (32, 34), True), ("center", True, 0.5, (32, 33), False),
        ("center", True, 0.51, (32, 32), False), ("resized", True, 1.0, (16, 16), False),
    ],
)  # fmt: skip
def test_view_keeps_pixels_where_all_boxes_are_whole_pixels(
    crop: str, training: bool, share: float, size: tuple[int, int], whole: bool
) -> None:
    shown, ids = view(crop, training, test_crop=share), torch.arange(50)
    assert shown.keeps_pixels(*size) == whole
    boxes, _ = shown.boxes(torch.zeros_like(ids), ids, sizes_of(50, *size))
    assert bool((boxes[:, 2:] == 16).all() and (boxes == boxes.round()).all()) == whole


def test_normalise_and_denormalise_roundtrip() -> None:
    images, mean, std = noise(4, 8, 8, 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    normal = views.normalise(pixels.clone(), mean, std)
    assert torch.allclose(normal[:, 1], (pixels[:, 1] - 0.4) / 0.3, atol=1e-6)
    assert np.array_equal(views.denormalise(normal, mean, std), images)
    last = pixels.to(memory_format=torch.channels_last, copy=True)
    assert torch.equal(views.normalise(last, mean, std), normal)
    assert last.stride(1) == 1
