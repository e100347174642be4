"""Augmentations beyond the crop, each a pure function of (seed, epoch, id): RandAugment and random erasing.

RandAugment is timm's, which draws from Python's and NumPy's global generators: both are seeded for each sample and
restored afterwards. timm's random erasing draws from torch's global generator, for a batch at once, so it cannot be a
function of the sample; it is written here anew, with timm's distributions of boxes and pixels.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from mae_dist import rng

ATTEMPTS = 10
PATTERN = re.compile(r"rand(-((m|n|inc|mstd|mmax|p)\d+(\.\d+)?|t\w+))+")
AREA = (0.02, 1 / 3)
ASPECT = (0.3, 1 / 0.3)

Augment = Callable[[UInt8[np.ndarray, "h w 3"], int, int], UInt8[np.ndarray, "h w 3"]]


@contextmanager
def seeded(seed: int, purpose: rng.Purpose, epoch: int, id_: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators for one sample; restore their states at the end."""
    before = random.getstate(), np.random.get_state()
    words = rng.bits(seed, purpose, epoch, np.array([id_]), 2)[0]
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def rand_augment(recipe: str, size: int, mean: tuple[float, float, float], seed: int) -> Augment:
    """timm's RandAugment (Cubuk et al. 2020) for a string such as rand-m9-mstd0.5, as (pixels, epoch, id) -> pixels.

    Translations reach 0.45 of the image's side, and pixels from outside have the mean colour, as in timm's training.
    Raises ValueError for a string that timm does not know.
    """
    from timm.data import auto_augment  # a second of imports that few runs need

    colour = tuple(min(255, round(255 * channel)) for channel in mean)
    hints = {"translate_const": int(size * 0.45), "img_mean": colour, "interpolation": Image.Resampling.BICUBIC}
    try:
        if not PATTERN.fullmatch(recipe):  # timm ignores parts that it does not know
            raise ValueError("expected rand-m<magnitude>-...")
        transform = auto_augment.rand_augment_transform(recipe, hints)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"view.randaugment={recipe}: timm does not know it ({error or 'unknown part'}); try rand-m9-mstd0.5-inc1"
        ) from error

    for op in transform.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize

    def augment(pixels: UInt8[np.ndarray, "h w 3"], epoch: int, id_: int) -> UInt8[np.ndarray, "h w 3"]:
        with seeded(seed, rng.Purpose.AUGMENT, epoch, id_):
            return np.asarray(transform(Image.fromarray(pixels)))

    return augment


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each channel; with 0 bits the image is black.

    At full magnitude timm keeps 0 bits, which Pillow 13 refuses; earlier versions gave black, as in the papers' runs.
    """
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


def erase(
    images: Float[Tensor, "b c h w"], probability: float, seed: int, epochs: np.ndarray, ids: np.ndarray
) -> Float[Tensor, "b c h w"]:
    """Random erasing (Zhong et al. 2020, algorithm 1) of normalised images.

    With `probability`, a box of an image is filled with N(0, 1) noise. `epochs` and `ids` are int64 (b,).
    """
    images, size = images.clone(), (images.shape[2], images.shape[3])
    boxes = erased_boxes(probability, seed, epochs, ids, size)
    for i, (top, left, height, width) in enumerate(boxes):
        if height:
            shape = (images.shape[1], height, width)
            box = noise(seed, int(epochs[i]), int(ids[i]), math.prod(shape), images.device).view(shape)
            images[i, :, top : top + height, left : left + width] = box
    return images


def erased_boxes(
    probability: float, seed: int, epochs: np.ndarray, ids: np.ndarray, size: tuple[int, int]
) -> list[list[int]]:
    """[top, left, height, width] of each sample's erased box, in pixels; height 0 where nothing is erased."""
    draws = rng.uniform(seed, rng.Purpose.ERASE, epochs, ids, 1 + 4 * ATTEMPTS)
    area, aspect, y, x = np.moveaxis(draws[:, 1:].reshape(len(ids), ATTEMPTS, 4), 2, 0)
    area = (AREA[0] + area * (AREA[1] - AREA[0])) * size[0] * size[1]
    aspect = np.exp(math.log(ASPECT[0]) + aspect * (math.log(ASPECT[1]) - math.log(ASPECT[0])))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < size[0]) & (width < size[1])
    top, left = np.floor(y * (size[0] - height + 1)), np.floor(x * (size[1] - width + 1))
    boxes = np.stack([top, left, height, width], 2)[np.arange(len(ids)), fits.argmax(1)].astype(np.int64)
    erased = fits.any(1) & (draws[:, 0] < probability)
    return (boxes * erased[:, None]).tolist()


def noise(seed: int, epoch: int, id_: int, num: int, device: torch.device) -> Float[Tensor, " num"]:
    """N(0, 1) numbers of one sample (Box and Muller 1958)."""
    words = rng.bits(seed, rng.Purpose.ERASE_PIXELS, epoch, torch.tensor([id_], device=device), 2 * num)[0]
    first, second = words.view(2, num).double() / 2.0**32
    return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).float()
