"""The synthetic set: a pure function of (seed, split, id), balanced, with splits that share no pair of hues."""

import colorsys

import numpy as np

from mae_dist.data import synthetic


def test_synthetic_picture_is_a_pure_function_of_seed_split_and_id() -> None:
    pictures, labels = synthetic.draw(0, "train", np.arange(40))
    assert pictures.shape == (40, 32, 32, 3)
    assert pictures.dtype == np.uint8
    some, same = synthetic.draw(0, "train", np.array([33, 7]))
    assert np.array_equal(some, pictures[[33, 7]])
    assert np.array_equal(same, labels[[33, 7]])
    for other in (synthetic.draw(1, "train", np.arange(40)), synthetic.draw(0, "test", np.arange(40))):
        assert not np.array_equal(other[0], pictures)


def test_synthetic_classes_are_balanced_and_named() -> None:
    _, labels = synthetic.draw(0, "test", np.arange(100))
    assert np.bincount(labels).tolist() == [10] * len(synthetic.CLASSES)


def test_synthetic_splits_share_no_pair_of_hues() -> None:
    train, test = (set(synthetic.hue_pairs(split)) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    for side in (0, 1):  # but every hue is seen in training, as a shape and as a ground
        assert {pair[side] for pair in test} <= {pair[side] for pair in train}


def test_synthetic_test_pictures_are_no_near_copies_of_training_ones() -> None:
    train, _ = synthetic.draw(0, "train", np.arange(1000))
    test, _ = synthetic.draw(0, "test", np.arange(200))
    a, b = (p.reshape(len(p), -1).astype(np.float32) / 255 for p in (train, test))
    across = np.sqrt(np.maximum((b**2).sum(1)[:, None] + (a**2).sum(1) - 2 * b @ a.T, 0) / a.shape[1])
    assert across.min() > 0.05  # root mean square per channel, of 1


def test_synthetic_pictures_have_the_hues_of_their_split() -> None:
    """The commonest hue of a plain, lightly lit ground lies in a sector, not in a gap between two."""
    hue, ground = synthetic.hue_pairs("train")[0]
    assert 0 <= hue < synthetic.HUES
    assert 0 <= ground < synthetic.HUES
    pictures, _ = synthetic.draw(0, "train", np.arange(300))
    corners = pictures[:, 0, 0] / 255
    saturated = [colorsys.rgb_to_hsv(*corner)[0] * synthetic.HUES % 1 for corner in corners if np.ptp(corner) > 0.4]
    inside = np.mean([0.05 < place < 0.95 for place in saturated])
    assert len(saturated) > 50
    assert inside > 0.85


def test_synthetic_raw_pixel_baselines_are_near_chance() -> None:
    """Nearest neighbours of pixels stay near chance (10 %), so a demo that does well has learned something."""
    train, labels = synthetic.draw(0, "train", np.arange(3000))
    test, truth = synthetic.draw(0, "test", np.arange(500))
    a, b = (p.reshape(len(p), -1).astype(np.float32) / 255 for p in (train, test))
    nearest = (2 * b @ a.T - (a**2).sum(1)).argmax(1)
    top1 = 100 * (labels[nearest] == truth).mean()
    print(f"1-nearest neighbour on raw pixels: {top1:.1f} %")
    assert 8 < top1 < 30


def test_synthetic_golden_pictures() -> None:
    """Golden pixels, so that the README's numbers keep their meaning; elsewhere sine may differ by one step."""
    golden = {
        ("train", 0): [[12, 143, 35], [2, 87, 13], [36, 115, 56], [12, 163, 40]],
        ("train", 1234): [[61, 61, 160], [10, 125, 85], [8, 86, 54], [16, 148, 100]],
        ("test", 8): [[90, 47, 33], [81, 59, 187], [95, 63, 230], [101, 71, 255]],
    }
    for (split, sample), expected in golden.items():
        pictures, _ = synthetic.draw(0, split, np.array([sample]))
        assert np.abs(pictures[0, 16, [4, 12, 20, 28]].astype(int) - expected).max() <= 1
