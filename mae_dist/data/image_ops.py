"""Operations of timm's RandAugment on uint8 arrays (h, w, 3), with the pixels that Pillow gives, in less time.

Each takes what timm's function of the same name takes (`timm.data.auto_augment`), and gives a new array. Those that are
not here cost as much with NumPy as with Pillow, or more (rotate). Knows no policy and draws nothing.

A shear or translation moves each line of the image along itself. Pillow's bicubic transform (Keys 1981, a = -1, not the
-0.5 of its resize; in float64, cut off instead of rounded) then interpolates along that line alone, which takes a fifth
of the arithmetic of its general case; `move_lines` does it in the same order of operations, so that no bit differs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int16

from mae_dist.data.pixels import Pixels

Colour = tuple[int, int, int]


def invert(pixels: Pixels, **_: Any) -> Pixels:
    """The negative."""
    return 255 - pixels


def solarize(pixels: Pixels, thresh: int, **_: Any) -> Pixels:
    """The negative of values from `thresh` on."""
    return pixels ^ (pixels >= thresh) * np.uint8(255)


def solarize_add(pixels: Pixels, add: int, **_: Any) -> Pixels:
    """Add `add` (0 to 128) to values below 128."""
    return pixels + (pixels < 128) * np.uint8(add)


def posterize(pixels: Pixels, bits_to_keep: int, **_: Any) -> Pixels:
    """Keep the highest bits of each value; without any the image is black.

    At full magnitude timm keeps 0 bits or fewer, which Pillow 13 refuses; earlier versions gave black, as in the
    papers' runs.
    """
    return pixels & np.uint8(256 - (256 >> min(max(bits_to_keep, 0), 8)))


def brightness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Multiply all values."""
    return blend(np.float32(0), pixels, factor)


def sharpness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Move away from the smoothed image (factor > 1), or towards it; the outermost pixels stay as they are."""
    height, width = pixels.shape[:2]
    wide = pixels.reshape(height, width * 3).astype(np.uint16)
    middle = wide[1:-1, 3:-3]
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * middle
    smooth = wide.astype(np.float32)
    smooth[1:-1, 3:-3] = (2 * total + 13) // 26  # a thirteenth, rounded to the nearest
    return blend(smooth.reshape(pixels.shape), pixels, factor)


def shear_x(pixels: Pixels, factor: float, fillcolor: Colour, **_: Any) -> Pixels:
    """Move row y to the left by `factor` * (y + 1/2) pixels."""
    return move_lines(pixels, factor * (np.arange(pixels.shape[0]) + 0.5), 0, fillcolor)


def shear_y(pixels: Pixels, factor: float, fillcolor: Colour, **_: Any) -> Pixels:
    """Move column x up by `factor` * (x + 1/2) pixels."""
    return move_lines(pixels, factor * (np.arange(pixels.shape[1]) + 0.5), 1, fillcolor)


def translate_x_rel(pixels: Pixels, pct: float, fillcolor: Colour, **_: Any) -> Pixels:
    """Move the image to the left by `pct` of its width."""
    return move_lines(pixels, np.full(pixels.shape[0], pct * pixels.shape[1]), 0, fillcolor)


def translate_y_rel(pixels: Pixels, pct: float, fillcolor: Colour, **_: Any) -> Pixels:
    """Move the image up by `pct` of its height."""
    return move_lines(pixels, np.full(pixels.shape[1], pct * pixels.shape[0]), 1, fillcolor)


def blend(base: Any, pixels: Pixels, factor: float) -> Pixels:
    """From `base` through `pixels` by `factor`, as Pillow's blend: in float32, clipped and cut off."""
    values = base + np.float32(factor) * (pixels - base)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def move_lines(pixels: Pixels, offsets: Float[np.ndarray, " lines"], axis: int, fill: Colour) -> Pixels:
    """The image whose pixel at place p of a line is that at p + offset of the line: bicubic, with the colour `fill`
    where that is outside. Lines are rows (`axis` 0) or columns (1), `offsets` in pixels, float64.

    Where rounding carries a place to the next whole pixel, its distance is 1, which gives exactly that pixel.
    """
    lines, length = pixels.shape[axis], pixels.shape[1 - axis]
    places = (np.arange(length) + 0.5) + offsets[:, None]
    outside = (places < 0) | (places >= length)
    places -= 0.5
    first = np.floor(places[:, 0])
    places -= first[:, None] + np.arange(length)
    before, after = max(1 - int(first.min()), 0), max(int(first.max()) + 2, 0)
    padded = np.empty((3, lines, before + length + after), dtype=np.int16)
    padded[..., before : before + length] = pixels.transpose(2, axis, 1 - axis)
    padded[..., :before] = padded[..., before, None]
    padded[..., before + length :] = padded[..., before + length - 1, None]
    windows = np.lib.stride_tricks.sliding_window_view(padded.reshape(3, -1), length, axis=1)
    starts = np.arange(lines) * padded.shape[2] + first.astype(np.int64) + before - 1
    moved = np.empty_like(pixels)
    for channel in range(3):
        values = cubic([windows[channel, starts + tap] for tap in range(4)], places).astype(np.int16)
        np.clip(values, 0, 255, out=values)
        np.copyto(values, fill[channel], where=outside)
        plane = moved[..., channel]
        (plane.T if axis else plane)[:] = values
    return moved


def cubic(taps: Sequence[Int16[np.ndarray, "lines n"]], distance: Float[np.ndarray, "lines n"]) -> np.ndarray:
    """Pillow's bicubic interpolation between the second and third of four taps, float64 (lines, n)."""
    a, b, c, d = taps
    left, right = a - b, c - d
    values = (left + right) * distance
    np.subtract(left + left + right, values, out=values)
    values *= distance
    values += c - a
    values *= distance
    values += b
    return values


OPERATIONS: dict[str, Callable[..., Pixels]] = {
    operation.__name__: operation
    for operation in (
        invert, solarize, solarize_add, posterize, brightness, sharpness, shear_x, shear_y, translate_x_rel,
        translate_y_rel,
    )
}  # fmt: skip
"""By the names of timm's functions."""
