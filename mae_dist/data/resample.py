"""Pixels from boxes, for whole batches of equally large images on any device, which nothing here waits for.

`cut` moves whole pixels; `resize` computes new ones with two small matrix products per image. Both give pixels in 0..1
without rounding them to 8 bits.
"""

import math

import torch
from jaxtyping import Bool, Float32, Float64, Int, UInt8
from torch import Tensor


def cut(
    images: UInt8[Tensor, "b c h w"], boxes: Float64[Tensor, "b 4"], flips: Bool[Tensor, " b"], size: tuple[int, int]
) -> Float32[Tensor, "b c rows columns"]:
    """Cut boxes of `size` (height, width) whole pixels out of images, and flip them; their outside is black."""
    batch, channels, height, width = images.shape
    top, left = boxes[:, :2, None].long().unbind(1)
    y, x = top + torch.arange(size[0], device=images.device), left + mirrored(flips, size[1], size[1])
    planes = torch.arange(0, batch * channels * height, height, device=images.device).view(batch, channels, 1)
    lines = images.flatten(0, 2).index_select(0, (planes + y.clamp(0, height - 1)[:, None]).flatten())
    lines = lines.view(batch, channels, size[0], width)
    pixels = lines.gather(3, x.clamp(0, width - 1)[:, None, None].expand(-1, channels, size[0], -1))
    inside = ((y >= 0) & (y < height)).byte()[:, :, None] * ((x >= 0) & (x < width)).byte()[:, None]
    return pixels.mul_(inside[:, None]).float().div_(255)


def resize(
    images: UInt8[Tensor, "b c h w"], boxes: Float64[Tensor, "b 4"], flips: Bool[Tensor, " b"], size: tuple[int, int]
) -> Float32[Tensor, "b c rows columns"]:
    """Crop images to boxes, resize to `size` (height, width), flip.

    A box of whole pixels is cut out first; pixels around a fractional box count too. A box is no larger than an image.
    """
    channels, height, width = images.shape[1:]
    rows, columns = resize_matrices(boxes, flips, height, width, size)
    pixels = images.float().div_(255)
    with torch.autocast(images.device.type, enabled=False):  # pixels are fp32 whatever precision surrounds them
        wide = torch.bmm(pixels.flatten(1, 2), columns.mT).clamp_(0, 1)  # bicubic overshoots, and PIL clips twice
        return (rows[:, None] @ wide.unflatten(1, (channels, height))).clamp_(0, 1)


def resize_matrices(
    boxes: Float64[Tensor, "n 4"], flips: Bool[Tensor, " n"], height: int, width: int, size: tuple[int, int]
) -> tuple[Float32[Tensor, "n rows height"], Float32[Tensor, "n columns width"]]:
    """Matrices that resize the columns and the rows of pixels in a box to `size`; the second also flips.

    Bicubic (Keys 1981, a = -0.5), antialiased as in PIL. For a box of whole pixels, pixels around it have no weight and
    the outside of the image is black; for any other, pixels around it count, and the outside of the image does not.
    """
    longer, most, device = max(height, width), max(size), boxes.device
    start, length = boxes[:, :2, None], boxes[:, 2:, None]  # of both axes, (n, 2, 1)
    # both axes get as many targets as the longer side of `size` has; those that one has too many are cut off in the end
    step = length / (size[0] + (size[1] - size[0]) * torch.arange(2, device=device)[:, None])
    scale = step.clamp(min=1)
    targets = torch.stack([mirrored(torch.zeros_like(flips), size[0], most), mirrored(flips, size[1], most)], 1)
    center = start + (targets + 0.5) * step - 0.5
    first = (center - 2 * scale).floor() + 1
    taps = torch.arange(math.ceil(4 * max(1, height / size[0], width / size[1])), device=device)
    places = first.long()[..., None] + taps  # (n, 2, most, taps)
    distance = ((first - center) / scale).float()[..., None] + (taps / scale).float()[:, :, None]
    distance = distance.abs_().clamp_(max=2)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * -0.5 + 2
    whole = (boxes == boxes.round()).all(1)[:, None, None]
    sides = height + (width - height) * torch.arange(2, device=device)[:, None]
    low = torch.where(whole, start, 0).long()[..., None]
    high = torch.where(whole, start + length, sides).long()[..., None]
    weights = near.where(distance < 1, far).where((places >= low) & (places < high), 0)
    weights = weights / weights.sum(3, keepdim=True)
    matrices = weights.new_zeros((len(boxes), 2, most, longer + 2))  # a column on either side for the outside
    matrices.scatter_(3, places.clamp_(-1, longer).add_(1), weights)
    return matrices[:, 0, : size[0], 1 : height + 1], matrices[:, 1, : size[1], 1 : width + 1]


def mirrored(flips: Bool[Tensor, " n"], size: int, count: int) -> Int[Tensor, "n count"]:
    """The places 0..count-1 of pixels on an axis of `size`, mirrored on it where `flips`."""
    places = torch.arange(count, device=flips.device)
    return torch.where(flips[:, None], size - 1 - places, places)
