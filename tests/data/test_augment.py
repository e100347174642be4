"""RandAugment and random erasing: as timm's, but functions of the sample, for any source and any workers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from shared_types import Tars
from timm.data.auto_augment import rand_augment_transform

from mae_dist import schema
from mae_dist.data import augment, loader
from mae_dist.data.views import View
from mae_dist.rng import Purpose

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
RECIPE = "rand-m9-mstd0.5-inc1"


def view(training: bool = True, **changes: object) -> View:
    return View(schema.ViewConfig(**changes), 24, MEAN, STD, seed=3, training=training)  # pyright: ignore


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def test_randaugment_equals_timm_with_the_samples_seed_and_restores_global_rng() -> None:
    ours = augment.rand_augment(RECIPE, 24, MEAN, seed=3)
    timms = rand_augment_transform(
        RECIPE, {"translate_const": 10, "img_mean": (128, 102, 76), "interpolation": Image.Resampling.BICUBIC}
    )
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    changed = 0
    for id_ in range(20):
        found = ours(pixels(), 2, id_)
        with augment.seeded(3, Purpose.AUGMENT, 2, id_):
            expected = np.asarray(timms(Image.fromarray(pixels())))
        assert np.array_equal(found, expected)
        changed += not np.array_equal(found, pixels())
    assert changed > 15
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # pyright: ignore


@pytest.mark.parametrize("recipe", ["rand-m10-n4-inc1-p1", "rand-m15-n2-mmax15-p1", "rand-m15-n4-mmax15-inc1-p1"])
def test_randaugment_accepts_the_largest_magnitudes(recipe: str) -> None:
    """Posterize keeps no bit there, which Pillow 13 would refuse."""
    ours = augment.rand_augment(recipe, 24, MEAN, seed=3)
    found = [ours(pixels(), 0, id_) for id_ in range(100)]
    assert any(not image.any() for image in found) == ("inc1" in recipe)


def test_randaugment_posterize_keeps_the_highest_bits() -> None:
    for bits in range(9):
        kept = np.asarray(augment.posterize(Image.fromarray(pixels()), bits))
        assert np.array_equal(kept, pixels() >> (8 - bits) << (8 - bits))


def test_randaugment_unknown_to_timm_is_refused() -> None:
    for recipe in ("strong", "rand-mx", "augmix-m3", "rand-m9-x7"):
        with pytest.raises(ValueError, match=rf"view\.randaugment={recipe}: timm does not know it"):
            augment.rand_augment(recipe, 24, MEAN, seed=3)


def test_augmented_images_are_identical_for_any_source_workers_and_batch(tars: Tars) -> None:
    data = tars([4, 5, 3])
    shown = view(randaugment=RECIPE, random_erasing=0.5, crop="pad")
    plan = [(np.array([0, 0, 1]), np.array([3, 7, 3])), (np.array([2, 0]), np.array([11, 0]))]
    source = loader.open_source(data, CPU, 0, shown.needs_pil)
    assert isinstance(source, loader.TarSource)
    whole = list(source.batches(plan, shown))
    again = list(loader.TarSource(data, CPU, 2).batches(plan, shown))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.images, other.images)
    alone = [(epochs[i : i + 1], ids[i : i + 1]) for epochs, ids in plan for i in range(len(ids))]
    singles = torch.cat([batch.images for batch in loader.TarSource(data, CPU, 0).batches(alone, shown)])
    assert torch.equal(singles, torch.cat([batch.images for batch in whole]))
    assert not torch.equal(whole[0].images[0], whole[0].images[2])  # another epoch, another look


def test_evaluation_images_are_not_augmented(tars: Tars) -> None:
    data = tars([4])
    plan = [(np.zeros(4, dtype=np.int64), np.arange(4))]
    plain, augmented = view(training=False), view(training=False, randaugment=RECIPE, random_erasing=1.0)
    assert not augmented.needs_pil
    for source in (loader.InMemorySource(data, CPU, quiet=True), loader.TarSource(data, CPU, 0)):
        (a,), (b,) = source.batches(plan, plain), source.batches(plan, augmented)
        assert torch.equal(a.images, b.images)


def test_random_erasing_boxes_have_the_configured_frequency_and_size() -> None:
    ids = np.arange(4000)
    boxes = np.array(augment.erased_boxes(0.25, 0, np.zeros_like(ids), ids, (64, 48)))
    top, left, height, width = boxes.T
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert (top + height <= 64).all()
    assert (left + width <= 48).all()
    area = (height * width)[erased] / (64 * 48)
    assert area.min() > 0.015
    assert area.max() < 1.05 / 3
    assert 0.13 < area.mean() < 0.18  # uniform in 0.02..0.33, large narrow boxes drawn again
    assert np.array_equal(boxes[10:20], augment.erased_boxes(0.25, 0, np.zeros(10, np.int64), ids[10:20], (64, 48)))


def test_random_erasing_fills_the_box_with_normal_noise_and_keeps_the_rest() -> None:
    images = torch.full((400, 3, 32, 32), 7.0)
    ids = np.arange(400)
    epochs = np.zeros_like(ids)
    found = augment.erase(images, 1.0, 5, epochs, ids)
    assert (images == 7).all()
    boxes = augment.erased_boxes(1.0, 5, epochs, ids, (32, 32))
    noise = []
    for image, (top, left, height, width) in zip(found, boxes, strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (image[:, ~inside] == 7).all()
        noise.append(image[:, inside].flatten())
    values = torch.cat(noise).double()
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / len(values))
    assert abs((values.abs() > 1.96).double().mean() - 0.05) < 0.002
    assert torch.equal(augment.erase(images[:3], 1.0, 5, epochs[:3], ids[:3]), found[:3])
