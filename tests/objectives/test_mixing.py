"""Mixup and CutMix: timm's arithmetic for equal draws, pairs that no rank divides, a correct Beta distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from mae_dist import rng
from mae_dist.batch import Batch
from mae_dist.data.order import num_micro, share
from mae_dist.objectives import mixing
from mae_dist.schema import MixConfig


def batch_of(num: int, first: int = 0, epoch: int = 0) -> Batch:
    images = torch.randn(num + first, 3, 12, 16, generator=torch.Generator().manual_seed(1))[first:]
    ids = torch.arange(first, first + num)
    return Batch(images, ids % 5, ids, torch.full((num,), epoch), torch.zeros(num, dtype=torch.bool))


def targets_of(batch: Batch, smoothing: float = 0.1) -> torch.Tensor:
    return mixing.smoothed(batch.labels, 5, smoothing, batch.images.dtype)


@pytest.fixture
def float64() -> Iterator[None]:
    """timm's targets have torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "settings", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(mixup=0.8, cutmix=1.0, prob=0.7)]
)
def test_mixup_images_and_targets_equal_timm_for_equal_draws(
    settings: MixConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm mixes a batch of two with its flip, which is its partner; lambda and the box's centre are given to it."""
    batch = batch_of(40)
    images, targets = mixing.mix(batch, targets_of(batch), settings, seed=3)
    words = rng.bits(3, rng.Purpose.MIX, batch.epochs[::2], batch.ids[::2], 4 + 2 * mixing.ATTEMPTS)
    draws, kinds = words.double() / 2.0**32, set()
    both = settings.mixup > 0 and settings.cutmix > 0
    for pair, (kind, mixed, y, x) in enumerate(draws[:, :4].tolist()):
        cut = kind < settings.switch if both else settings.cutmix > 0
        alpha = torch.tensor([settings.cutmix if cut else settings.mixup])
        lam = mixing.beta(draws[pair : pair + 1, 4:], alpha).item() if mixed < settings.prob else 1.0
        kinds.add("none" if lam == 1 else "cut" if cut else "mix")
        theirs = Mixup(label_smoothing=0.1, num_classes=5)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda lam=lam, cut=cut: (lam, cut))
        centre = iter([math.floor(y * 12), math.floor(x * 16)])
        monkeypatch.setattr(np.random, "randint", lambda *_, size=None, centre=centre: np.int64(next(centre)))  # noqa: ARG005
        own = slice(2 * pair, 2 * pair + 2)
        expected = theirs(batch.images[own].clone(), batch.labels[own])
        assert (images[own] - expected[0]).abs().max() < 1e-12
        assert (targets[own] - expected[1]).abs().max() < 1e-12
    possible = {"mix": settings.mixup > 0, "cut": settings.cutmix > 0, "none": settings.prob < 1}
    assert kinds == {kind for kind, wanted in possible.items() if wanted}


def test_cutmix_boxes_equal_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's box for the same lambda and centre, and lambda corrected by what the border leaves of it."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        lam, y, x = generator.random(3)
        centres = iter([math.floor(y * 12), math.floor(x * 16)])
        monkeypatch.setattr(np.random, "randint", lambda *_, size=None: np.int64(next(centres)))  # noqa: ARG005, B023
        (top, bottom, left, right), corrected = cutmix_bbox_and_lam((3, 12, 16), lam)
        draws = torch.full((1, 4 + 2 * mixing.ATTEMPTS), 0.5, dtype=torch.float64)
        draws[0, :4] = torch.tensor([0.0, 0.0, y, x])
        monkeypatch.setattr(mixing, "beta", lambda *_: torch.tensor([lam], dtype=torch.float64))  # noqa: B023
        weights = mixing.pixel_weights(draws, MixConfig(cutmix=1.0), (12, 16))[0]
        expected = torch.ones(12, 16, dtype=torch.float64)
        expected[int(top) : int(bottom), int(left) : int(right)] = 0
        assert torch.equal(weights, expected)
        assert weights.mean().item() == pytest.approx(corrected)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0])
def test_mixup_beta_has_the_beta_distribution(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), fourth central moment of the symmetric Beta, symmetric."""
    draws = torch.rand(40_000, 2 * mixing.ATTEMPTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = mixing.beta(draws, torch.full((40_000,), alpha)) - 0.5
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert abs(values.mean()) < 4 * math.sqrt(variance / 40_000)
    assert values.square().mean().item() == pytest.approx(variance, rel=0.02)
    assert values.pow(4).mean().item() == pytest.approx(fourth, rel=0.03)


def test_mixup_of_a_pair_is_independent_of_its_batch() -> None:
    settings = MixConfig(mixup=0.8, cutmix=1.0)
    whole, part = batch_of(12), batch_of(4, first=6)
    images, targets = mixing.mix(whole, targets_of(whole), settings, seed=3)
    again = mixing.mix(part, targets_of(part), settings, seed=3)
    assert torch.equal(images[6:10], again[0])
    assert torch.equal(targets[6:10], again[1])
    other = batch_of(4, first=6, epoch=1)
    assert not torch.equal(mixing.mix(other, targets_of(other), settings, seed=3)[0], again[0])


def test_label_smoothing_targets_equal_cross_entropy() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    ours = -(mixing.smoothed(labels, 5, 0.1, torch.float64) * logits.log_softmax(1)).sum(1)
    assert (ours - F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)).abs().max() < 1e-12


def test_mixup_pairs_are_never_divided_by_ranks_or_micro_batches() -> None:
    for pairs, world, micro_batch in itertools.product(range(1, 20), range(1, 6), (2, 3, 6, 64)):
        if world > pairs:
            continue
        micro = num_micro(2 * pairs, world, micro_batch, 2)
        seen = []
        for rank in range(world):
            first, last = share(2 * pairs, rank, world, 2)
            for part in range(micro):
                a, b = share(last - first, part, micro, 2)
                assert a % 2 == b % 2 == 0
                assert b > a
                seen += range(first + a, first + b)
        assert seen == list(range(2 * pairs))
