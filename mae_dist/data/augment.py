"""Augmentations beyond the crop, each a pure function of (seed, epoch, id): RandAugment, colour jitter, random erasing.

RandAugment is timm's: its operations and its draws, from Python's generator and NumPy's, which are seeded for each
sample. It works on the 8-bit pixels of one image. Colour jitter and random erasing work on whole batches, on their
device, and are written here anew, since torchvision and timm draw from torch's global generator, for a batch at once.
"""

import functools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mae_dist import rng
from mae_dist.data.image_ops import OPERATIONS
from mae_dist.data.pixels import Pixels

ATTEMPTS = 10
PATTERN = re.compile(r"rand(-((m|n|inc|mstd|mmax|p)\d+(\.\d+)?|t\w+))+")
AREA = (0.02, 1 / 3)
ASPECT = (0.3, 1 / 0.3)
NOISE = 2**20
"""Places in the fixed noise at which that of a box can begin."""
NOISE_ROW = 4096
"""Numbers of the fixed noise that are drawn as those of one sample."""
GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a pixel's luma (ITU-R BT.601), as in torchvision."""
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020) for a policy such as rand-m9-mstd0.5.

    Translations reach 0.45 of the image's shorter side `size`, and pixels from outside have the mean colour, as in
    timm's training. Raises ValueError for a policy that timm does not know.
    """

    def __init__(self, policy: str, size: int, mean: tuple[float, ...], seed: int):
        from timm.data import auto_augment  # a second of imports that few runs need

        colour = tuple(min(255, round(255 * channel)) for channel in mean)
        hints = {"translate_const": int(size * 0.45), "img_mean": colour, "interpolation": Image.Resampling.BICUBIC}
        try:
            if not PATTERN.fullmatch(policy):  # timm ignores parts that it does not know
                raise ValueError("expected rand-m<magnitude>-...")
            transform = auto_augment.rand_augment_transform(policy, hints)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"view.randaugment={policy}: timm does not know it ({error or 'unknown part'}); "
                f"try rand-m9-mstd0.5-inc1"
            ) from error
        for op in transform.ops:
            op.aug_fn = OPERATIONS.get(op.aug_fn.__name__) or _by_pillow(op.aug_fn)
        self.seed, self.ops, self.numpy = seed, transform.ops, np.random.RandomState()
        self.num_ops, self.weights = transform.num_layers, transform.choice_weights

    def seeds(self, epochs: Int[np.ndarray, " n"], ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
        """The seeds of samples for Python's generator and NumPy's."""
        return rng.bits(self.seed, rng.Purpose.AUGMENT, epochs, ids, 2)

    def __call__(self, pixels: Pixels, seeds: Int[np.ndarray, " 2"]) -> Pixels:
        """Augment an image as timm does with these seeds; Python's global generator is as before at the end."""
        before = random.getstate()
        random.seed(int(seeds[0]))  # timm's operations draw from it
        self.numpy.seed(int(seeds[1]))
        try:
            chosen = self.numpy.choice(len(self.ops), self.num_ops, replace=self.weights is None, p=self.weights)
            return functools.reduce(lambda image, number: self.ops[number](image), chosen, pixels)
        finally:
            random.setstate(before)


def _by_pillow(operation: Callable[..., Image.Image]) -> Callable[..., Pixels]:
    def on_pixels(pixels: Pixels, *arguments: Any, **options: Any) -> Pixels:
        return np.asarray(operation(Image.fromarray(pixels), *arguments, **options))

    return on_pixels


def color_jitter(
    images: Float[Tensor, "b 3 h w"], strength: float, seed: int, epochs: np.ndarray, ids: np.ndarray
) -> Float[Tensor, "b 3 h w"]:
    """torchvision's ColorJitter(strength, strength, strength) of images in 0..1.

    Brightness, contrast and saturation change in random order, each by a factor uniform in max(0, 1 - strength) to
    1 + strength. `epochs` and `ids` are int64 (b,) on the host.
    """
    low = max(0.0, 1 - strength)
    draws = rng.uniform(seed, rng.Purpose.COLOR_JITTER, epochs, ids, 6)
    order = draws[:, 3:].argsort(1, kind="stable")
    factors = np.take_along_axis(low + draws[:, :3] * (1 + strength - low), order, 1)
    images = images.contiguous()  # channel by channel, which is faster here
    for step in range(3):
        factor, kind = (
            torch.from_numpy(values[:, step, None, None]).to(images.device, non_blocking=True)
            for values in (factors, order)
        )
        red, green, blue = images.unbind(1)
        grey = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
        base = grey.where(kind == SATURATION, grey.mean((1, 2), keepdim=True).where(kind == CONTRAST, 0.0))
        base *= (1 - factor).float()
        images.mul_(factor.float()[:, None]).add_(base[:, None]).clamp_(0, 1)
    return images


def erase(
    images: Float[Tensor, "b c h w"], probability: float, seed: int, epochs: np.ndarray, ids: np.ndarray
) -> Float[Tensor, "b c h w"]:
    """Random erasing (Zhong et al. 2020, algorithm 1) of normalised images, in place.

    With `probability`, a box of an image is filled with N(0, 1) noise: a stretch of fixed numbers from a random place
    on, which costs next to nothing. `epochs` and `ids` are int64 (b,) on the host, which does not wait for the device.
    """
    channels, height, width = images.shape[1:]
    boxes = erased_boxes(probability, seed, epochs, ids, (height, width))
    starts = rng.bits(seed, rng.Purpose.ERASE_PIXELS, epochs, ids, 1)[:, 0] % NOISE
    noise = normal_numbers(NOISE + channels * height * width, images.device)
    for image, (top, left, h, w), start in zip(images, boxes.tolist(), starts.tolist(), strict=True):
        if h:
            pixels = noise[start : start + channels * h * w]
            image[:, top : top + h, left : left + w] = rearrange(pixels, "(h w c) -> c h w", h=h, w=w)
    return images


def erased_boxes(
    probability: float, seed: int, epochs: np.ndarray, ids: np.ndarray, size: tuple[int, int]
) -> Int[np.ndarray, "b 4"]:
    """Top, left, height and width of each sample's erased box, in pixels; height 0 where nothing is erased."""
    draws = rng.uniform(seed, rng.Purpose.ERASE, epochs, ids, 1 + 4 * ATTEMPTS)
    area, aspect, y, x = np.moveaxis(draws[:, 1:].reshape(len(ids), ATTEMPTS, 4), 2, 0)
    area = (AREA[0] + area * (AREA[1] - AREA[0])) * size[0] * size[1]
    aspect = np.exp(math.log(ASPECT[0]) + aspect * (math.log(ASPECT[1]) - math.log(ASPECT[0])))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < size[0]) & (width < size[1])
    top, left = np.floor(y * (size[0] - height + 1)), np.floor(x * (size[1] - width + 1))
    boxes = np.stack([top, left, height, width], 2)[np.arange(len(ids)), fits.argmax(1)].astype(np.int64)
    erased = fits.any(1) & (draws[:, 0] < probability)
    return boxes * erased[:, None]


@functools.cache
def normal_numbers(count: int, device: torch.device) -> Float[Tensor, " count"]:
    """The same N(0, 1) numbers on every device and in every run."""
    words = rng.bits(0, rng.Purpose.ERASE_PIXELS, 0, np.arange(-(-count // NOISE_ROW)), NOISE_ROW)
    return torch.special.ndtri((torch.from_numpy(words).view(-1)[:count] + 0.5) / 2**32).float().to(device)
