"""Stored image files to pixels: the one place that knows the formats. Imports no torch.

JPEG files are decoded by libjpeg-turbo (simplejpeg), everything else, and what simplejpeg refuses, by Pillow. Both give
the same pixels, except that simplejpeg can decode at a fraction of the size. Raw pixels (.npy) are copied.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from mae_dist.data.index import Sample

Pixels = UInt8[np.ndarray, "h w 3"]
NPY_HEADER = 128
"""Bytes before the pixels in a file that np.save makes of them."""


class Memory:
    """Memory for the pixels of one image after the other: new memory for each would cost a tenth of decoding."""

    LARGEST = 2**26

    def __init__(self) -> None:
        self.bytes = bytearray()

    def of(self, size: int) -> bytearray | None:
        """At least `size` bytes, the same as before where that is possible; None for very large images."""
        if len(self.bytes) < size <= self.LARGEST:
            self.bytes = bytearray(size)
        return self.bytes if size <= self.LARGEST else None


def decode(sample: Sample, shrink: int = 1, memory: Memory | None = None) -> Pixels:
    """Decode a sample's image to RGB, uint8 (height, width, 3); EXIF orientation is ignored, as in the official code.

    With `shrink` (2, 4 or 8) a JPEG is decoded at that fraction of its size, rounded up, by leaving out its highest
    frequencies; other images keep their size. With `memory` the pixels may lie there, until its next use. Raises
    ValueError when the bytes are not a complete image of a known format.
    """
    try:
        if shape := _npy_shape(sample):
            return np.frombuffer(sample.image, np.uint8, math.prod(shape), NPY_HEADER).reshape(shape).copy()
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
        if shape := _npy_shape(sample):
            return shape[:2]
        if size := _jpeg_size(sample):
            return size
        image = _open(sample)
        return image.height, image.width
    except Exception:  # as in `decode`
        return None


def _npy_shape(sample: Sample) -> tuple[int, int, int] | None:
    """The shape of a .npy file's array if it lies in it as np.save writes an image; None for any other file."""
    return _shape_in(sample.image[:NPY_HEADER]) if sample.extension == "npy" else None


@functools.lru_cache(maxsize=4096)
def _shape_in(header: bytes) -> tuple[int, int, int] | None:
    """What `_npy_shape` says of a file that begins with this header. Cached: parsing is slower than copying."""
    stream = io.BytesIO(header)
    try:
        np.lib.format.read_magic(stream)
        (height, width, channels), is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:  # another version, a longer header, or another number of dimensions
        return None
    is_image = channels == 3 and dtype == np.uint8 and not is_fortran and min(height, width) > 0
    return (height, width, 3) if is_image and stream.tell() == NPY_HEADER else None


def _jpeg_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) of an image that simplejpeg decodes as Pillow does; None for any other."""
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(sample.image)
    except ValueError:
        return None
    (height, width), limit = map(int, size), Image.MAX_IMAGE_PIXELS  # Pillow warns of larger images, or refuses them
    return (height, width) if colours in ("YCbCr", "Gray") and (limit is None or height * width <= limit) else None


def _decode_jpeg(content: bytes, height: int, width: int, memory: Memory | None) -> Pixels:
    buffer = memory.of(height * width * 3) if memory else None
    try:
        return simplejpeg.decode_jpeg(content, min_height=height, min_width=width, min_factor=1, buffer=buffer)
    except ValueError:  # simplejpeg refuses any damage, Pillow only what makes an image incomplete
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def _open(sample: Sample) -> Image.Image:
    if sample.extension != "npy":
        return Image.open(io.BytesIO(sample.image))
    array = np.lib.format.read_array(io.BytesIO(sample.image), allow_pickle=False)  # np.load would also take archives
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"array of {array.dtype} {array.shape}, expected uint8 (height, width, 3)")
    return Image.fromarray(array)
