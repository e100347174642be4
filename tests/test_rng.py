"""Philox: the published numbers, identical bits from NumPy and torch, and draws that are functions of the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_dist import rng
from mae_dist.rng import Purpose

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, ...], expected: str) -> None:
    """Random123's file kat_vectors, lines philox4x32 10."""
    for array in (lambda v: np.array([v], dtype=np.int64), lambda v: torch.tensor([v])):
        c0, c1, c2, c3 = (array(v) for v in counter)
        words = rng.philox((c0, c1, c2, c3), (array(key[0]), array(key[1])))
        assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_philox_numpy_and_torch_draws_are_identical() -> None:
    generator = np.random.default_rng(0)
    ids, epochs = generator.integers(0, 2**40, 50), generator.integers(0, 2**31, 50)
    for num in (1, 4, 7):
        ours = rng.bits(123, Purpose.MASK, epochs, ids, num)
        theirs = rng.bits(123, Purpose.MASK, torch.from_numpy(epochs), torch.from_numpy(ids), num)
        assert ours.shape == (50, num)
        assert np.array_equal(ours, theirs.numpy())
    ours = rng.uniform(123, Purpose.MASK, epochs, ids, 5)
    theirs = rng.uniform(123, Purpose.MASK, torch.from_numpy(epochs), torch.from_numpy(ids), 5)
    assert theirs.dtype == torch.float64
    assert np.array_equal(ours, theirs.numpy())


def test_rng_draw_is_independent_of_other_samples() -> None:
    ids, epochs = np.array([4, 9, 2, 9]), np.array([0, 1, 0, 2])
    together = rng.bits(5, Purpose.CROP, epochs, ids, 6)
    for i in range(4):
        alone = rng.bits(5, Purpose.CROP, epochs[i : i + 1], ids[i : i + 1], 6)
        assert np.array_equal(alone[0], together[i])
        assert np.array_equal(rng.bits(5, Purpose.CROP, int(epochs[i]), ids[i : i + 1], 6)[0], together[i])
    assert np.array_equal(rng.bits(5, Purpose.CROP, epochs, ids, 11)[:, :6], together)  # more words change no word


def test_rng_draw_depends_on_every_argument() -> None:
    def draw(seed: int, purpose: Purpose, epoch: int, sample: int) -> tuple[int, ...]:
        return tuple(rng.bits(seed, purpose, epoch, np.array([sample]), 4)[0].tolist())

    draws = {draw(0, purpose, 0, 1) for purpose in Purpose} | {
        draw(seed, Purpose.CROP, 0, 1) for seed in (1, 2**32 - 1)
    }
    draws |= {draw(0, Purpose.CROP, epoch, 1) for epoch in (1, 2)}
    draws |= {draw(0, Purpose.CROP, 0, sample) for sample in (2, 1 + 2**32, 1 + 2**33)}  # ids beyond 32 bits
    assert len(draws) == len(Purpose) + 7


def test_rng_uniform_is_uniform_in_0_1() -> None:
    draws = rng.uniform(1, Purpose.CROP, 0, np.arange(20_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 1 / 2).max() < 0.01
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.003
    counts = np.histogram(draws, bins=16, range=(0, 1))[0]
    expected = draws.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square, 15 degrees: p < 0.0005
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_rng_golden_numbers() -> None:
    """If this fails, every earlier run has become irreproducible."""
    words = rng.bits(7, Purpose.CROP, np.array([0, 3]), np.array([5, 2**33 + 1]), 5)
    assert words.tolist() == [
        [295058, 1877714658, 2967061588, 2772651909, 1713888502],
        [1677660712, 1914094770, 1000738350, 1820696470, 2883504269],
    ]
    assert {p.name: p.value for p in Purpose} == {
        "SHARDS": 1, "SAMPLES": 2, "CROP": 3, "FLIP": 4, "MASK": 5, "DROP_PATH": 6, "SYNTHETIC": 7, "BLOCKS": 8,
        "AUGMENT": 9, "ERASE": 10, "MIX": 11, "HELD_OUT": 12, "BOOTSTRAP": 13, "ERASE_PIXELS": 14,
        "COLOR_JITTER": 15, "PARTS": 16,
    }  # fmt: skip
