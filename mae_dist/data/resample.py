"""Pixels from boxes, for whole batches of equally large images on any device, which nothing here waits for.

`cut` moves whole pixels; `resize` computes new ones with two small matrix products per image. Both give pixels in 0..1
without rounding them to 8 bits.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float32, Float64, Int, UInt8
from torch import Tensor

A = -0.5
"""Of the bicubic kernel (Keys 1981), as in PIL."""


def cut(
    images: UInt8[Tensor, "b c h w"], boxes: Float64[Tensor, "b 4"], flips: Bool[Tensor, " b"], size: int
) -> Float32[Tensor, "b c size size"]:
    """Cut boxes of `size` x `size` whole pixels out of images, and flip them; the outside of an image is black."""
    batch, channels, height, width = images.shape
    top, left = boxes[:, :2, None].long().unbind(1)
    y, x = top + torch.arange(size, device=images.device), left + mirrored(flips, size)
    planes = torch.arange(0, batch * channels * height, height, device=images.device).view(batch, channels, 1)
    lines = images.flatten(0, 2).index_select(0, (planes + y.clamp(0, height - 1)[:, None]).flatten())
    lines = lines.view(batch, channels, size, width)
    pixels = lines.gather(3, x.clamp(0, width - 1)[:, None, None].expand(-1, channels, size, -1))
    inside = ((y >= 0) & (y < height)).byte()[:, :, None] * ((x >= 0) & (x < width)).byte()[:, None]
    return pixels.mul_(inside[:, None]).float().div_(255)


def resize(
    images: UInt8[Tensor, "b c h w"], boxes: Float64[Tensor, "b 4"], flips: Bool[Tensor, " b"], size: int
) -> Float32[Tensor, "b c size size"]:
    """Crop images to boxes, resize to `size` x `size`, flip.

    A box of whole pixels is cut out first; pixels around a fractional box count too. A box is no larger than an image.
    """
    channels, height, width = images.shape[1:]
    whole = (boxes == boxes.round()).all(1)
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], whole, mirrored(flips & False, size), height)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], whole, mirrored(flips, size), width)
    pixels = images.float().div_(255)
    with torch.autocast(images.device.type, enabled=False):  # pixels are fp32 whatever precision surrounds them
        wide = torch.bmm(pixels.flatten(1, 2), columns.mT).clamp_(0, 1)  # bicubic overshoots, and PIL clips twice
        return (rows[:, None] @ wide.unflatten(1, (channels, height))).clamp_(0, 1)


def mirrored(flips: Bool[Tensor, " n"], size: int) -> Int[Tensor, "n size"]:
    """The places 0..size-1 of pixels on one axis, in reverse order where `flips`."""
    places = torch.arange(size, device=flips.device)
    return torch.where(flips[:, None], places.flip(0), places)


def resize_matrix(
    start: Float64[Tensor, " n"], length: Float64[Tensor, " n"], whole: Bool[Tensor, " n"],
    targets: Int[Tensor, "n target"], source: int,
) -> Float32[Tensor, "n target source"]:  # fmt: skip
    """Matrices that resize `length` (at most `source`) of `source` pixels on one axis, from `start`, to the pixels
    `targets` of as many.

    Bicubic, antialiased as in PIL. Where `whole`, pixels around the box have no weight and the outside of the image is
    black; elsewhere pixels around the box count, and the outside of the image has no weight.
    """
    size = targets.shape[1]
    start, end, whole = (value[:, None, None] for value in (start, start + length, whole))
    step = (end - start) / size
    scale = step.clamp(min=1)
    center = start + (targets[:, :, None] + 0.5) * step
    first = (center - 2 * scale - 0.5).floor() + 1
    places = first + torch.arange(math.ceil(4 * max(1, source / size)), device=start.device)
    distance = ((places + 0.5 - center).abs() / scale).clamp(max=2)
    near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * A - 4 * A
    low, high = torch.where(whole, start, 0), torch.where(whole, end, source)
    weights = torch.where(distance < 1, near, far) * ((places >= low) & (places < high))
    weights = (weights / weights.sum(2, keepdim=True)).float()
    matrix = weights.new_zeros((len(start), size, source + 2))  # a column on either side for the outside
    return matrix.scatter_(2, places.clamp(-1, source).long() + 1, weights)[:, :, 1:-1]
