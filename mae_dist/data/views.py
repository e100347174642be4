"""Views: from decoded images to the pixels that a model sees. A view is one box of the image, resized and perhaps
flipped; `augment` has the other augmentations.

Boxes and flips are drawn for many samples at once, as pure functions of (seed, epoch, id, image size). Two functions
make pixels from a box: `crop.crop` for one image of any size, and `resample` for a batch of images of one size on any
device, where cropping, flipping and resizing are two small matrix products per image.

Knows no model, no file layout and no rank.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from mae_dist import rng, schema
from mae_dist.data import augment
from mae_dist.model_sizes import sides

ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """How samples are cropped, augmented and normalised.

    ``settings`` is the section `view`, ``image_size`` the side in pixels or (height, width), ``mean`` and ``std`` are
    per channel in 0..1.
    """

    settings: schema.ViewConfig
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    training: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that the model sees."""
        return sides(self.image_size)

    def boxes(
        self, epochs: Int[Tensor, " n"], ids: Int[Tensor, " n"], sizes: Int[Tensor, "n 2"]
    ) -> tuple[Float64[Tensor, "n 4"], Bool[Tensor, " n"]]:
        """Boxes: top, left, height, width in pixels; and whether each is flipped. `sizes`: height, width. All tensors
        are on one device.
        """
        kind = self.settings.crop
        if not self.training:
            return self._center_boxes(sizes), torch.zeros_like(ids, dtype=torch.bool)
        flips = self._draw(rng.Purpose.FLIP, epochs, ids, 1)[:, 0] < self.settings.flip
        if kind == "center":
            return self._center_boxes(sizes), flips
        if kind == "pad":
            return shifted_boxes(self._draw(rng.Purpose.CROP, epochs, ids, 2), sizes, self.settings.pad), flips
        attempts = 1 if kind == "resized_clamped" else ATTEMPTS
        draws = self._draw(rng.Purpose.CROP, epochs, ids, 4 * attempts).reshape(len(ids), attempts, 4)
        scale, ratio = self.settings.scale, self.settings.ratio
        return resized_boxes(draws, sizes, scale, ratio, clamp=kind == "resized_clamped"), flips

    def keeps_pixels(self, height: int, width: int) -> bool:
        """Whether the box of every image of this size is `size` whole pixels, so that none is resized."""
        if self.training and self.settings.crop == "pad":
            return (height, width) == self.size
        if self.training and self.settings.crop != "center":
            return False
        top, left, *box = self._center_boxes(torch.tensor([[height, width]]))[0].tolist()
        return (*box,) == self.size and top.is_integer() and left.is_integer()

    def _center_boxes(self, sizes: Int[Tensor, "n 2"]) -> Float64[Tensor, "n 4"]:
        return center_boxes(sizes, self.settings.test_crop, self.size)

    @property
    def needs_pil(self) -> bool:
        """Whether images must be augmented one at a time as PIL images, as timm's RandAugment does."""
        return self.training and self.settings.randaugment is not None

    def augment(self) -> augment.RandAugment | None:
        """RandAugment for the pixels of one crop, or None. Raises ValueError for a policy that timm does not know."""
        if not self.needs_pil:
            return None
        return augment.RandAugment(self.settings.randaugment or "", min(self.size), self.mean, self.seed)

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


def center_boxes(sizes: Int[Tensor, "n 2"], share: float, shape: tuple[int, int] = (1, 1)) -> Float64[Tensor, "n 4"]:
    """The largest central boxes with the aspect ratio of `shape` (height, width), times `share`: "resize, then centre
    crop" as one box.
    """
    height, width = sizes.double().unbind(1)
    box = share * torch.stack(
        [height.minimum(width * shape[0] / shape[1]), width.minimum(height * shape[1] / shape[0])], 1
    )
    return torch.cat([(sizes - box) / 2, box], 1)


def shifted_boxes(draws: Float64[Tensor, "n 2"], sizes: Int[Tensor, "n 2"], pad: int) -> Float64[Tensor, "n 4"]:
    """Boxes of whole images shifted by -pad..pad whole pixels in each direction; the outside is black."""
    offsets = (draws * (2 * pad + 1)).floor() - pad
    return torch.cat([offsets, sizes.double()], 1)


def resized_boxes(
    draws: Float64[Tensor, "n attempts 4"], sizes: Int[Tensor, "n 2"], scale: tuple[float, float],
    ratio: tuple[float, float], clamp: bool,
) -> Float64[Tensor, "n 4"]:  # fmt: skip
    """Boxes of random resized crops as in torchvision: area, log aspect ratio and place uniform, whole pixels. The
    aspect ratio is the box's own, whatever shape it is resized to.

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


def normalise(images: Float[Tensor, "b c h w"], mean: tuple, std: tuple) -> Float[Tensor, "b c h w"]:
    """Normalise pixels in 0..1, in place, with the given mean and standard deviation per channel."""
    mean_, std_ = (_constant(v, images.device, images.dtype) for v in (mean, std))
    if images.stride(1) == 1:  # channels last: a row of all channels is long enough to be fast
        rows, width = rearrange(images, "b c h w -> b h (w c)"), images.shape[3]
        rows.sub_(mean_.repeat(width)).div_(std_.repeat(width))
        return images
    return images.sub_(mean_[:, None, None]).div_(std_[:, None, None])


@functools.lru_cache
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Numbers as a tensor, kept, since the host would wait for each copy to a GPU."""
    return torch.tensor(values, device=device, dtype=dtype)


def denormalise(images: Float[Tensor, "b c h w"], mean: tuple, std: tuple) -> UInt8[np.ndarray, "b h w c"]:
    """8-bit pixels (b, h, w, c) of normalised images, for figures."""
    mean_, std_ = (torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None] for v in (mean, std))
    pixels = ((images * std_ + mean_).clamp(0, 1) * 255).round().byte()
    return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
