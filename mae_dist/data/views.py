"""Views: from decoded images to the pixels that a model sees. A view is one box of the image, resized and perhaps
flipped; `augment` has the other augmentations.

Boxes and flips are drawn for many samples at once, as pure functions of (seed, epoch, id, image size). Two functions
make pixels from a box: `crop.crop` for one image of any size, and `resample` for a batch of images of one size on any
device, where cropping, flipping and resizing are two small matrix products per image.

Knows no model, no file layout and no rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from mae_dist import rng, schema
from mae_dist.data import augment

ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """How samples are cropped, augmented and normalised.

    ``settings`` is the section `view`, ``image_size`` the side in pixels, ``mean`` and ``std`` are per channel in 0..1.
    """

    settings: schema.ViewConfig
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int
    training: bool

    def boxes(
        self, epochs: Int[Tensor, " n"], ids: Int[Tensor, " n"], sizes: Int[Tensor, "n 2"]
    ) -> tuple[Float64[Tensor, "n 4"], Bool[Tensor, " n"]]:
        """Boxes: top, left, height, width in pixels; and whether each is flipped. `sizes`: height, width. All tensors
        are on one device.
        """
        kind = self.settings.crop
        if not self.training:
            return center_boxes(sizes, self.settings.test_crop), torch.zeros_like(ids, dtype=torch.bool)
        flips = self._draw(rng.Purpose.FLIP, epochs, ids, 1)[:, 0] < self.settings.flip
        if kind == "center":
            return center_boxes(sizes, self.settings.test_crop), flips
        if kind == "pad":
            return shifted_boxes(self._draw(rng.Purpose.CROP, epochs, ids, 2), sizes, self.settings.pad), flips
        attempts = 1 if kind == "resized_clamped" else ATTEMPTS
        draws = self._draw(rng.Purpose.CROP, epochs, ids, 4 * attempts).reshape(len(ids), attempts, 4)
        scale, ratio = self.settings.scale, self.settings.ratio
        return resized_boxes(draws, sizes, scale, ratio, clamp=kind == "resized_clamped"), flips

    @property
    def needs_pil(self) -> bool:
        """Whether images must be augmented one at a time as PIL images, as timm's RandAugment does."""
        return self.training and self.settings.randaugment is not None

    def augment(self) -> augment.RandAugment | None:
        """RandAugment for the pixels of one crop, or None. Raises ValueError for a policy that timm does not know."""
        if not self.needs_pil:
            return None
        return augment.RandAugment(self.settings.randaugment or "", self.image_size, self.mean, self.seed)

    def finish(self, images: Float[Tensor, "b c h w"], epochs: np.ndarray, ids: np.ndarray) -> Float[Tensor, "b c h w"]:
        """Normalise pixels in 0..1, in place; in training with colour jitter before and random erasing after it."""
        jitter, erasing = self.settings.color_jitter, self.settings.random_erasing
        if self.training and jitter:
            images = augment.color_jitter(images, jitter, self.seed, epochs, ids)
        images = normalise(images, self.mean, self.std)
        return augment.erase(images, erasing, self.seed, epochs, ids) if self.training and erasing else images

    def _draw(self, purpose: rng.Purpose, epochs: Tensor, ids: Tensor, num: int) -> Float64[Tensor, "n num"]:
        if ids.device.type == "cpu":  # the same bits, and NumPy is quicker for the few samples of a chunk
            return torch.from_numpy(rng.uniform(self.seed, purpose, epochs.numpy(), ids.numpy(), num))
        return rng.uniform(self.seed, purpose, epochs, ids, num)


def center_boxes(sizes: Int[Tensor, "n 2"], share: float) -> Float64[Tensor, "n 4"]:
    """Central squares with `share` of the shorter side: "resize, then centre crop" as one box."""
    side = share * sizes.amin(1, keepdim=True).double()
    return torch.cat([(sizes - side) / 2, side, side], 1)


def shifted_boxes(draws: Float64[Tensor, "n 2"], sizes: Int[Tensor, "n 2"], pad: int) -> Float64[Tensor, "n 4"]:
    """Boxes of whole images shifted by -pad..pad whole pixels in each direction; the outside is black."""
    offsets = (draws * (2 * pad + 1)).floor() - pad
    return torch.cat([offsets, sizes.double()], 1)


def resized_boxes(
    draws: Float64[Tensor, "n attempts 4"], sizes: Int[Tensor, "n 2"], scale: tuple[float, float],
    ratio: tuple[float, float], clamp: bool,
) -> Float64[Tensor, "n 4"]:  # fmt: skip
    """Boxes of random resized crops as in torchvision: area, log aspect ratio and place uniform, whole pixels.

    `draws` are uniform in [0, 1). The first attempt that fits into the image is taken, else a centre crop of the
    nearest allowed aspect ratio. With `clamp` (the crop of MAE's linear probe) sides are cut to the image instead, so
    that one attempt is enough.
    """
    height, width = sizes.double()[:, None].unbind(2)
    area = height * width * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + draws[..., 1] * (high - low)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    if clamp:
        w, h = w.minimum(width), h.minimum(height)
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    attempts = torch.stack([h, w, draws[..., 2], draws[..., 3]], 2)
    first = fits.byte().argmax(1)
    h, w, y, x = attempts.take_along_dim(first[:, None, None], 1)[:, 0].unbind(1)
    height, width = height[:, 0], width[:, 0]
    chosen = torch.stack([(y * (height - h + 1)).floor(), (x * (width - w + 1)).floor(), h, w], 1)
    w = torch.where(width / height > ratio[1], (height * ratio[1]).round(), width)
    h = torch.where(width / height < ratio[0], (width / ratio[0]).round(), height)
    fallback = torch.stack([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], 1)
    return torch.where(fits.any(1, keepdim=True), chosen, fallback)


def resample(
    images: UInt8[Tensor, "b h w c"], boxes: np.ndarray, flips: np.ndarray, size: int
) -> Float[Tensor, "b c size size"]:
    """Crop, resize and flip a batch on its device, as `crop` does but without rounding to 8 bits; values in 0..1."""
    if not len(images):
        return images.new_zeros((0, images.shape[3], size, size), dtype=torch.float32)
    height, width = images.shape[1:3]
    cut = (boxes == np.rint(boxes)).all(1)
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], cut, height, size)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], cut, width, size)
    columns = np.where(flips[:, None, None], columns[:, ::-1], columns)
    rows, columns = (torch.from_numpy(m.astype(np.float32)).to(images.device) for m in (rows, columns))
    pixels = rearrange(images, "b h w c -> b c h w").float() / 255
    with torch.autocast(images.device.type, enabled=False):  # pixels are fp32 whatever precision surrounds them
        wide = (pixels @ columns[:, None].transpose(-1, -2)).clamp_(0, 1)  # bicubic overshoots, and PIL clips twice
        return (rows[:, None] @ wide).clamp_(0, 1)


def resize_matrix(start: np.ndarray, length: np.ndarray, cut: np.ndarray, source: int, target: int) -> np.ndarray:
    """Matrices (n, target, source) that resize `length` pixels from `start` (n,) on one axis to `target` pixels.

    Bicubic (Keys 1981, a = -0.5), antialiased as in PIL. Where `cut` (n,), pixels around the box have no weight and the
    outside of the image is black; elsewhere pixels around the box count.
    """
    start, end, cut = (v[:, None, None] for v in (start, start + length, cut))
    step = (end - start) / target
    center = start + (np.arange(target)[:, None] + 0.5) * step
    first = min(0, math.floor(start.min()))
    places = np.arange(first, max(source, math.ceil(end.max())))
    distance = np.abs((places + 0.5 - center) / np.maximum(step, 1.0))
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights *= np.where(cut, (places >= start) & (places < end), (places >= 0) & (places < source))
    return (weights / weights.sum(2, keepdims=True))[:, :, -first : source - first]


def normalise(images: Float[Tensor, "b c h w"], mean: tuple, std: tuple) -> Float[Tensor, "b c h w"]:
    """Normalise pixels in 0..1, in place, with the given mean and standard deviation per channel."""
    mean_, std_ = (torch.tensor(v, device=images.device, dtype=images.dtype) for v in (mean, std))
    if images.stride(1) == 1:  # channels last: a row of all channels is long enough to be fast
        rows, width = rearrange(images, "b c h w -> b h (w c)"), images.shape[3]
        rows.sub_(mean_.repeat(width)).div_(std_.repeat(width))
        return images
    return images.sub_(mean_[:, None, None]).div_(std_[:, None, None])


def denormalise(images: Float[Tensor, "b c h w"], mean: tuple, std: tuple) -> UInt8[np.ndarray, "b h w c"]:
    """8-bit pixels (b, h, w, c) of normalised images, for figures."""
    mean_, std_ = (torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None] for v in (mean, std))
    pixels = ((images * std_ + mean_).clamp(0, 1) * 255).round().byte()
    return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
