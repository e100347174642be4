"""Stored image files to 8-bit pixels: the one place that knows the formats. Imports no torch.

JPEG files are decoded by libjpeg-turbo (simplejpeg), everything else, and what simplejpeg refuses, by Pillow. Both give
the same pixels, except that simplejpeg can decode at a fraction of the size. The values of arrays (.npy) are copied.
What is no 8-bit image of the wanted channels becomes one by the rules of `pixels.Decoding`, or is refused.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mae_dist.data.index import Sample
from mae_dist.data.pixels import (
    RGB,
    ChannelsError,
    Decoding,
    Pixels,
    eight_bits,
    from_image,
    layout,
    mode_of,
    scaling,
    turned,
    with_channels,
)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may recognise in a file. Of all that it knows, others start programs (EPS) or fail in unforeseen ways."""
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of one channel with more than 8 bits."""
MAX_HEADER = 10_000
"""Largest header of an array in bytes, as in NumPy."""
ORIENTATION = 0x0112
"""EXIF tag: 1 is upright; 2 to 8 name the mirroring and the quarter turns that make an image so."""


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


def decode(sample: Sample, shrink: int = 1, memory: Memory | None = None, how: Decoding = RGB) -> Pixels:
    """Decode a sample's image to uint8 (height, width, how.channels), by the rules of `Decoding`.

    With `shrink` (2, 4 or 8) a JPEG is decoded at that fraction of its size, rounded up, by leaving out its highest
    frequencies; other images keep their size. With `memory` the pixels may lie there, until its next use. Raises
    ValueError when the bytes are not a complete image of a known format, or one that the rules refuse.
    """
    try:
        if sample.extension == "npy":
            return _decode_array(sample.image, how)
        size = _jpeg_size(sample.image) if how.channels in (1, 3) else None
        if size is None:
            pixels = _decode_by_pillow(sample.image, how)
        else:
            how.check_size(*size)
            pixels = _decode_jpeg(sample.image, -(-size[0] // shrink), -(-size[1] // shrink), memory, how)
        return turned(pixels, orientation(sample.image)) if how.upright else pixels
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"is no {', '.join(FORMATS)} image, or a damaged one") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def stored_size(sample: Sample, how: Decoding | None = None) -> tuple[int, int] | None:
    """(height, width) of a sample's decoded image, from the header of its file; None if that is damaged. Without `how`
    an array counts as an image of whatever channels it has.
    """
    how = how or Decoding(own_channels(sample))
    try:
        if sample.extension == "npy":
            shape, _, _ = _array_header(sample.image)
            height, width = (shape[axis] for axis in layout(shape, how.channels)[:2] or (0, 1))
            return height, width
        size = _jpeg_size(sample.image)
        if size is None:
            with _opened(sample.image) as image:
                size = image.height, image.width
        return (size[1], size[0]) if how.upright and orientation(sample.image) > 4 else size
    except Exception:  # as in `decode`
        return None


def own_channels(sample: Sample) -> int:
    """Channels of a sample that `decode` gives without a word: 3, or those of an array that is neither grey nor RGB."""
    try:
        shape, _, _ = _array_header(sample.image) if sample.extension == "npy" else ((), False, None)
    except ValueError:
        return 3
    number = min(shape[0], shape[2]) if len(shape) == 3 else 3
    return 3 if number == 1 else number


def check_channels(sample: Sample, how: Decoding, name: str) -> None:
    """Raise ValueError, which begins with `name`, for a file whose channels cannot become those of `how`."""
    try:
        if sample.extension == "npy":
            layout(_array_header(sample.image)[0], how.channels)
        else:
            mode_of(how.channels)
    except ChannelsError as error:
        raise ValueError(f"{name}: {error}") from error
    except ValueError:  # damaged
        return


def changes(sample: Sample, how: Decoding = RGB) -> str:
    """What `decode` changes in the pixels of a file, as a phrase; "" where it changes nothing worth a word."""
    try:
        if sample.extension == "npy":
            return scaling(_array_header(sample.image)[2], how.white)
        with _opened(sample.image) as image:
            if image.mode in DEEP:
                return scaling(np.dtype(np.float32 if image.mode == "F" else np.uint16), how.white)
            if is_deep(image):
                return scaling(np.dtype(np.uint16), None)
            if image.has_transparency_data and how.channels % 2:
                return "transparency is drawn on white"
            return "EXIF orientation is ignored" if not how.upright and orientation(sample.image) > 1 else ""
    except Exception:  # as in `decode`
        return ""


def _array_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order of columns, and type of an array, after a check that it is an image that lies in its file whole."""
    start = _start(content)
    shape, by_columns, kind = _parsed(content[:start])
    if len(content) - start < math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of {kind} {shape} that is cut short, or damaged")
    return shape, by_columns, kind


def _start(content: bytes) -> int:
    """Bytes before the values in a .npy file."""
    first = 10 if content[6:7] == b"\x01" else 12
    return first + int.from_bytes(content[8:first], "little")


@functools.lru_cache(maxsize=4096)
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What the header of a .npy file says. Cached: parsing is slower than copying."""
    stream = io.BytesIO(header[:MAX_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"an array in version {version} of its format")
        long = version > (1, 0)
        read = np.lib.format.read_array_header_2_0 if long else np.lib.format.read_array_header_1_0
        shape, by_columns, kind = read(stream)
        if kind.kind not in "biuf" or len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"an array of {kind} {shape}, expected numbers in 2 or 3 axes")
    except (Exception, MemoryError) as error:  # a parser of Python's reads it, which may run out of its own stack
        raise ValueError(str(error) or "damaged header") from error
    return shape, by_columns, kind


def _decode_array(content: bytes, how: Decoding) -> Pixels:
    shape, by_columns, kind = _array_header(content)
    axes = layout(shape, how.channels)
    values = np.frombuffer(content, kind, math.prod(shape), _start(content))
    values = values.reshape(shape, order="F" if by_columns else "C")
    values = values.transpose(axes) if axes else values[:, :, None]
    how.check_size(*values.shape[:2])
    pixels = eight_bits(values, how.white)
    return with_channels(np.array(pixels, order="C", copy=True if pixels is values else None), how.channels)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of an image that simplejpeg decodes as Pillow does; None for any other."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (int(height), int(width)) if colours in ("YCbCr", "Gray") else None


def _decode_jpeg(content: bytes, height: int, width: int, memory: Memory | None, how: Decoding) -> Pixels:
    buffer = memory.of(height * width * how.channels) if memory else None
    colours = "RGB" if how.channels == 3 else "Gray"
    try:
        return simplejpeg.decode_jpeg(content, colours, min_height=height, min_width=width, min_factor=1, buffer=buffer)
    except ValueError:  # simplejpeg refuses any damage, Pillow only what makes an image incomplete
        return _decode_by_pillow(content, how)


def _decode_by_pillow(content: bytes, how: Decoding) -> Pixels:
    with _opened(content) as image:
        how.check_size(image.height, image.width)
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise ValueError("a TIFF of several pages; store each as a file of its own")
        if image.mode in DEEP:
            values = np.asarray(image)
            values = values.astype(np.uint16) if image.format == "PPM" else values  # Pillow holds them in 32 bits
            image = Image.fromarray(eight_bits(values, how.white))
        elif how.white is not None and is_deep(image):
            raise ValueError("16-bit colours, of which only the upper 8 bits can be read: data.white needs .npy files")
        return from_image(image, how.channels)


def is_deep(image: Image.Image) -> bool:
    """Whether a file that was only opened has colours of 16 bits, of which Pillow reads the upper 8."""
    return any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def orientation(content: bytes) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 where it has none. Raises what Pillow raises."""
    with _opened(content) as image:
        found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """An image file with its header read, by one of FORMATS; its size has no limit of Pillow's meanwhile."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield Image.open(io.BytesIO(content), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
