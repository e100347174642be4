"""Stored image files to pixels: the one place that knows the formats. Imports no torch.

JPEG files are decoded by libjpeg-turbo (simplejpeg), everything else, and what simplejpeg refuses, by Pillow. Both give
the same pixels, except that simplejpeg can decode at a fraction of the size.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from mae_dist.data.index import Sample

Pixels = UInt8[np.ndarray, "h w 3"]


def decode(sample: Sample, shrink: int = 1, memory: bytearray | None = None) -> Pixels:
    """Decode a sample's image to RGB, uint8 (height, width, 3); EXIF orientation is ignored, as in the official code.

    With `shrink` (2, 4 or 8) a JPEG is decoded at that fraction of its size, rounded up, by leaving out its highest
    frequencies; other images keep their size. With `memory` the pixels of a JPEG may lie there, until the next call:
    new memory for each image costs a tenth of the time. Raises ValueError when the bytes are not a complete image of a
    known format.
    """
    try:
        size = _jpeg_size(sample)
        if size is None:
            return np.array(_open(sample).convert("RGB"))
        return _decode_jpeg(sample.image, -(-size[0] // shrink), -(-size[1] // shrink), memory)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def stored_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) of a sample's image, from the header of its file; None if that is damaged."""
    try:
        if size := _jpeg_size(sample):
            return size
        image = _open(sample)
        return image.height, image.width
    except Exception:  # as in `decode`
        return None


def _jpeg_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) of an image that simplejpeg decodes as Pillow does; None for any other."""
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(sample.image)
    except ValueError:
        return None
    (height, width), limit = map(int, size), Image.MAX_IMAGE_PIXELS  # Pillow warns of larger images, or refuses them
    return (height, width) if colours in ("YCbCr", "Gray") and (limit is None or height * width <= limit) else None


def _decode_jpeg(content: bytes, height: int, width: int, memory: bytearray | None) -> Pixels:
    if memory is not None and len(memory) < height * width * 3:
        memory.extend(bytes(height * width * 3 - len(memory)))
    try:
        return simplejpeg.decode_jpeg(content, min_height=height, min_width=width, min_factor=1, buffer=memory)
    except ValueError:  # simplejpeg refuses any damage, Pillow only what makes an image incomplete
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def _open(sample: Sample) -> Image.Image:
    if sample.extension != "npy":
        return Image.open(io.BytesIO(sample.image))
    array = np.lib.format.read_array(io.BytesIO(sample.image), allow_pickle=False)  # np.load would also take archives
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"array of {array.dtype} {array.shape}, expected uint8 (height, width, 3)")
    return Image.fromarray(array)
