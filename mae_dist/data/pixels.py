"""The rules by which stored values become 8-bit pixels of a number of channels. Knows no file format, imports no torch.

Nothing is guessed: what the rules do not say is refused, and what they change is named beside the pixels.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w c"]
MAX_PIXELS = 178_956_970
"""Default of `Decoding.max_pixels`: the size above which Pillow refuses an image as a decompression bomb."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's mode of an image that has them."""
VIA = {"La": "LA", "LAB": "RGB"}
"""Pillow's modes that it does not convert to all others -> the mode on the way."""
WHITE = (255, 255, 255, 255)
Changes = tuple[str, ...]
"""What decoding has changed in an image, each as a phrase."""
DEEP = "of 16-bit values the upper 8 bits are taken"
TURNED, NOT_TURNED = "turned as the EXIF orientation says", "EXIF orientation is ignored"
ON_WHITE, FIRST = "transparency is drawn on white", "the first of several images in a file is taken"


class ChannelsError(ValueError):
    """A file has channels that cannot become those that are wanted."""


@dataclass(frozen=True)
class Decoding:
    """The rules for images of ``channels`` channels.

    8-bit values stay. Of 16-bit values the upper 8 bits are taken, and floats must be in 0..1 and are multiplied by
    255. With ``white``, values of more than 8 bits are multiplied by 255 / white instead, and larger ones are white;
    without it the white of a PNM file is what its header says, and that of a TIFF with 12 bits is 4095. Other integers,
    negative and non-finite values are refused.

    In image files grey is repeated for 3 channels and colour weighted to its luma for 1; transparency is drawn on
    white, or is the last of 2 or 4 channels. Arrays are (h, w), or have their channels last or first; these must be as
    many as ``channels``, except that 1 and 3 are converted as in image files.

    ``upright`` turns an image as its EXIF orientation says, which is ignored otherwise, as in the official code; a TIFF
    is always upright. Of several images in a file the first is taken; a TIFF of several pages is refused, unless all
    but the first are smaller copies of it. So are images of more than ``max_pixels`` pixels, before they are decoded.
    """

    channels: int = 3
    white: float | None = None
    upright: bool = False
    max_pixels: int = MAX_PIXELS

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an image with more than `max_pixels` pixels."""
        if height * width > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels are more than data.max_pixels={self.max_pixels}")


RGB = Decoding()


def eight_bits(values: np.ndarray, white: float | None) -> tuple[np.ndarray, Changes]:
    """Stored values as uint8, by the rules of `Decoding`, and what that changes; uint8 itself is not copied. Raises
    ValueError.
    """
    kind = values.dtype
    if kind == np.uint8:
        return values, ()
    if kind.kind == "b":
        return values * np.uint8(255), ()
    if kind.kind not in "iuf":
        raise ValueError(f"values of type {kind}: expected integers or floats")
    if white is None and kind.kind == "u" and kind.itemsize == 2:
        return (values >> 8).astype(np.uint8), (DEEP,)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if white is None and kind.kind == "f" else white
    if top is None or not (low >= 0 and high < np.inf) or (white is None and high > top):
        white_is = "data.white=V (data pack: --white V) says which value is white"
        advice = white_is if low >= 0 else "store them as 8 or 16 bits, or in 0..1"
        raise ValueError(f"{kind} values from {low:g} to {high:g}: {advice}")
    pixels = np.rint(np.minimum(values, top).astype(np.float32) * np.float32(255 / top)).astype(np.uint8)
    scaled = f"{kind.name} values are multiplied by 255 / {top:g}" if top != 1 else "floats are multiplied by 255"
    return pixels, (scaled, f"values above {top:g} are cut to it")[: 1 + (high > top)]


def layout(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The order of axes that makes an array's last one its channels; () for one of two axes. Raises ChannelsError for
    an array that is no image of `channels` channels, by the rules of `Decoding`.
    """
    if len(shape) == 2 and channels in (1, 3):
        return ()
    if len(shape) == 3:
        for number in (channels, *((4 - channels,) if channels in (1, 3) else ())):
            if shape[2] == number:
                return (0, 1, 2)
            if shape[0] == number:
                return (1, 2, 0)
    number = min(shape[0], shape[2]) if len(shape) == 3 else 1
    raise ChannelsError(
        f"an array of shape {shape} is no image of {channels} channels; set data.channels={number} "
        f"(data pack: --channels {number})"
    )


def mode_of(channels: int) -> str:
    """Pillow's mode of images with this number of channels. Raises ChannelsError where there is none."""
    if channels not in MODES:
        raise ChannelsError(f"an image file has at most 4 channels, and data.channels={channels}; only .npy has more")
    return MODES[channels]


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Pixels with grey repeated for 3 channels, or with colour weighted to its luma for 1; others unchanged."""
    if pixels.shape[2] == channels:
        return pixels
    return from_image(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), channels)[0]


def from_image(image: Image.Image, channels: int) -> tuple[Pixels, Changes]:
    """Pixels of an 8-bit image in any mode of Pillow, by the rules of `Decoding`, and what that changes. Raises
    ChannelsError.
    """
    mode, changes = mode_of(channels), ()
    if image.mode in VIA:
        image = image.convert(VIA[image.mode])
    if image.has_transparency_data and channels % 2:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image, changes = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image), (ON_WHITE,)
    elif image.mode == "RGBX" and channels == 4:
        return np.array(image), ()
    elif image.mode == "CMYK":
        changes = ("CMYK colours become RGB without their profile",)
    pixels = np.array(image.convert(mode))
    return (pixels[:, :, None] if channels == 1 else pixels), changes


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels made upright as an EXIF orientation (1 to 8) says: mirrored in 2, 4, 5 and 7, with axes swapped from 5."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (-1 if orientation in places else 1 for places in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels[::rows, ::columns])


def resize(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Pillow's bicubic resize of a `box` (left, top, right, bottom; None: all) to `size` = (width, height).

    Channels that are not RGB are resized one by one, since Pillow takes the last of 2 or 4 for transparency.
    """
    planes = [pixels] if pixels.shape[2] == 3 else list(np.moveaxis(pixels, 2, 0))
    images = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box)) for image in images]
    return resized[0] if pixels.shape[2] == 3 else np.stack(resized, 2)
