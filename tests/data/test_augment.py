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
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from mae_dist import rng, schema
from mae_dist.data import augment, loader
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import View

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
RECIPE = "rand-m9-mstd0.5-inc1"


def view(training: bool = True, **changes: object) -> View:
    return View(schema.ViewConfig(**changes), 24, MEAN, STD, seed=3, training=training)  # pyright: ignore


def photo(height: int = 24, width: int = 24, seed: int = 0) -> np.ndarray:
    """Smooth areas, edges, and saturated pixels."""
    small = np.random.default_rng(seed).integers(-80, 336, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def by_timm(policy: str, seeds: np.ndarray, image: np.ndarray) -> np.ndarray:
    hints = {"translate_const": 10, "img_mean": (128, 102, 76), "interpolation": Image.Resampling.BICUBIC}
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    return np.asarray(rand_augment_transform(policy, hints)(Image.fromarray(image)))


POLICIES = [
    RECIPE,
    "rand-m9",
    "rand-m9-n4-p0.9-mstd101-inc1",
    "rand-m6-n3-tweights",
    "rand-m5-n2-t3a-p1",
    "rand-m7-t3aw",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_randaugment_equals_timm_with_the_samples_seeds_and_restores_the_global_generators(policy: str) -> None:
    ours = augment.RandAugment(policy, 24, MEAN, seed=3)
    ids = np.arange(40)
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    seeds = ours.seeds(np.full_like(ids, 2), ids)
    found = [ours(photo(seed=i), seeds[i]) for i in range(40)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # pyright: ignore
    assert all(np.array_equal(found[i], by_timm(policy, seeds[i], photo(seed=i))) for i in range(40))
    assert sum(not np.array_equal(found[i], photo(seed=i)) for i in range(40)) > 20
    assert np.array_equal(ours.seeds(np.full(3, 2), ids[7:10]), seeds[7:10])


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1-p1", "rand-m15-n2-mmax15-p1", "rand-m15-n4-mmax15-inc1-p1"])
def test_randaugment_accepts_the_largest_magnitudes(policy: str) -> None:
    """Posterize keeps no bit there, which Pillow 13 would refuse."""
    ours = augment.RandAugment(policy, 24, MEAN, seed=3)
    found = [ours(photo(), seeds) for seeds in ours.seeds(np.zeros(100, dtype=np.int64), np.arange(100))]
    assert any(not image.any() for image in found) == ("inc1" in policy)


def test_randaugment_unknown_to_timm_is_refused() -> None:
    for recipe in ("strong", "rand-mx", "augmix-m3", "rand-m9-x7"):
        with pytest.raises(ValueError, match=rf"view\.randaugment={recipe}: timm does not know it"):
            augment.RandAugment(recipe, 24, MEAN, seed=3)


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
    for source in (ResidentSource(data, CPU, quiet=True), loader.TarSource(data, CPU, 0)):
        (a,), (b,) = source.batches(plan, plain), source.batches(plan, augmented)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_color_jitter_equals_torchvision_with_the_samples_draws(strength: float) -> None:
    """torchvision's operations, exactly on floats; on 8-bit pixels, as in timm, each cuts off up to 1 / 255."""
    ids = np.arange(60)
    images = torch.from_numpy(np.stack([photo(seed=i) for i in range(60)])).permute(0, 3, 1, 2)
    found = augment.color_jitter(images.float() / 255, strength, 5, ids % 3, ids)
    draws = rng.uniform(5, rng.Purpose.COLOR_JITTER, ids % 3, ids, 6)
    low, steps = max(0.0, 1 - strength), (adjust_brightness, adjust_contrast, adjust_saturation)
    orders = set()
    for i, draw in enumerate(draws):
        exact, rounded = images[i].float() / 255, Image.fromarray(photo(seed=i))
        for number in draw[3:].argsort():
            factor = low + draw[number] * (1 + strength - low)
            exact, rounded = steps[number](exact, factor), steps[number](rounded, factor)
        assert torch.allclose(found[i], exact, atol=1e-6)
        assert np.abs(found[i].permute(1, 2, 0).numpy() * 255 - np.asarray(rounded)).mean() < (2 if strength < 1 else 5)
        orders.add(tuple(draw[3:].argsort().tolist()))
    assert len(orders) == 6
    assert torch.equal(augment.color_jitter(images[7:9].float() / 255, strength, 5, ids[7:9] % 3, ids[7:9]), found[7:9])


def test_color_jitter_is_the_same_on_both_roads_and_only_in_training(tars: Tars) -> None:
    data, plan = tars([4, 5], size=(24, 24)), [(np.array([0, 0, 1]), np.array([3, 7, 3]))]
    jittered, plain = view(color_jitter=0.4, crop="pad"), view(crop="pad")
    sources = loader.open_source(data, CPU, 0, jittered.needs_pil), loader.TarSource(data, CPU, 0)
    assert isinstance(sources[0], ResidentSource)
    (resident,), (decoded,) = (source.batches(plan, jittered) for source in sources)
    (without,) = sources[1].batches(plan, plain)
    assert torch.allclose(resident.images, decoded.images, atol=1e-5)
    assert not torch.allclose(decoded.images, without.images, atol=0.1)
    (tested,), (plain_test,) = (sources[1].batches(plan, view(False, color_jitter=j)) for j in (0.4, 0.0))
    assert torch.equal(tested.images, plain_test.images)


def test_random_erasing_boxes_have_the_configured_frequency_and_size() -> None:
    ids = np.arange(4000)
    boxes = augment.erased_boxes(0.25, 0, np.zeros_like(ids), ids, (64, 48))
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
    ids = np.arange(400)
    epochs = ids % 7
    found = augment.erase(torch.full((400, 3, 32, 32), 7.0), 1.0, 5, epochs, ids)
    noise = []
    for image, (top, left, height, width) in zip(
        found, augment.erased_boxes(1.0, 5, epochs, ids, (32, 32)), strict=True
    ):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (image[:, ~inside] == 7).all()
        noise.append(image[:, inside].flatten())
    values = torch.cat(noise).double()
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / len(values))
    assert abs((values.abs() > 1.96).double().mean() - 0.05) < 0.002
    neighbours = torch.stack([values[:-1], values[1:]])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 5 / math.sqrt(len(values))
    assert len({tuple(part[:4].tolist()) for part in noise}) == 400  # no two samples have the same noise
    part = [300, 4, 77]  # in another batch, channels last
    images = torch.full((3, 32, 32, 3), 7.0).permute(0, 3, 1, 2)
    assert torch.equal(augment.erase(images, 1.0, 5, epochs[part], ids[part]), found[part])
    assert torch.equal(augment.erase(images.clone(), 0.0, 5, epochs[part], ids[part]), images)


def test_random_erasing_golden_numbers() -> None:
    """If this fails, every earlier run with random erasing has become irreproducible."""
    noise = augment.normal_numbers(augment.NOISE + 100, CPU)
    assert [round(v, 4) for v in noise[:4].tolist()] == [-0.5695, -0.1612, 0.0529, 0.004]
    assert [round(v, 4) for v in noise[-2:].tolist()] == [0.3412, 0.6032]
    assert augment.erased_boxes(1.0, 3, np.array([1]), np.array([5]), (32, 32)).tolist() == [[1, 14, 23, 10]]
    images = augment.erase(torch.zeros(1, 3, 32, 32), 1.0, 3, np.array([1]), np.array([5]))
    assert [round(v, 4) for v in images[0, :, 1, 14:16].flatten().tolist()] == [
        0.2032, 2.4329, 0.3472, -1.7279, -0.9816, -1.4101,
    ]  # fmt: skip
