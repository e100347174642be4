"""Stored image files to 8-bit pixels: the one place that knows the formats. Imports no torch.

JPEG files are decoded by libjpeg-turbo (simplejpeg), everything else, and what simplejpeg refuses, by Pillow. Both give
the same pixels, except that simplejpeg can decode at a fraction of the size. The values of arrays (.npy) are copied.
What is no 8-bit image of the wanted channels becomes one by the rules of `pixels.Decoding`, or is refused.
"""

import functools
import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from mae_dist.data.index import Sample
from mae_dist.data.pixels import (
    DEEP,
    FIRST,
    NOT_TURNED,
    RGB,
    TURNED,
    Changes,
    ChannelsError,
    Decoding,
    Pixels,
    eight_bits,
    from_image,
    layout,
    mode_of,
    turned,
    with_channels,
)

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs what it raises, too, for each image
warnings.filterwarnings("ignore", module="PIL")  # of EXIF data that are damaged, which count as none

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may recognise in a file. Of all that it knows, others start programs (EPS) or fail in unforeseen ways."""
SEVERAL = ("GIF", "MPO", "PNG", "TIFF", "WEBP")
"""Formats in which a file may have several images."""
ONE_CHANNEL = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of one channel with more than 8 bits."""
KIND, BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 254, 258, 262, 284, 339
"""TIFF tags: 1 and 4 in a page that is a smaller copy, or a mask, of another; bits of a value; 0 where 0 is white; 2
where each channel is a plane; 2 for signed integers.
"""
MAX_HEADER = 10_000
"""Largest header of an array in bytes, as in NumPy."""
ORIENTATION = 0x0112
"""EXIF tag: 1 is upright; 2 to 8 name the mirroring and the quarter turns that make an image so."""
SCAN, SEQUENTIAL, MOST_SCANS = b"\xff\xda", (b"\xff\xc0", b"\xff\xc1"), 100
"""The mark of a scan of a JPEG, those of the headers of frames that are not progressive, and the scans of a progressive
one: encoders write about ten; of more, each may take the time of a small image and have 20 bytes.
"""
JPEG, EXIF, APP2, MPO, HEAD = b"\xff\xd8", b"Exif\0\0", b"\xff\xe2", b"MPF\0", 2**16
"""What a JPEG begins with; what EXIF data in it begin with (two bytes of their length before); the mark (and length)
before the list of the images in a file of several (MPO), what that begins with; and where both lie.
"""


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


class Decoded(NamedTuple):
    """The pixels of an image, and what decoding has changed in them."""

    pixels: Pixels
    changes: Changes


def decode(sample: Sample, shrink: int = 1, memory: Memory | None = None, how: Decoding = RGB) -> Pixels:
    """The pixels of `decoded`."""
    return decoded(sample, shrink, memory, how).pixels


def decoded(sample: Sample, shrink: int = 1, memory: Memory | None = None, how: Decoding = RGB) -> Decoded:
    """Decode a sample's image to uint8 (height, width, how.channels), by the rules of `Decoding`.

    With `shrink` (2, 4 or 8) a JPEG is decoded at that fraction of its size, rounded up, by leaving out its highest
    frequencies; other images keep their size. With `memory` the pixels may lie there, until its next use; those of an
    array may be the sample's own bytes, which cannot be written. Raises ValueError when the bytes are not a complete
    image of a known format, or one that the rules refuse.
    """
    try:
        if sample.extension == "npy":
            return _decode_array(sample.image, how)
        if sample.image.startswith(JPEG) and _has_endless_scans(sample.image):
            raise ValueError(f"a progressive JPEG of more than {MOST_SCANS} scans, which would take long")
        size = _jpeg_size(sample.image) if how.channels in (1, 3) else None
        if size is None:
            return _decode_by_pillow(sample.image, how)
        how.check_size(*size)
        return _decode_jpeg(sample.image, -(-size[0] // shrink), -(-size[1] // shrink), memory, how)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        if sample.image[:4] in (b"II*\0", b"MM\0*"):
            raise ValueError("a damaged TIFF, or one of more than 4 channels; store these as .npy") from None
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
    """Raise ChannelsError, which begins with `name`, for a file whose channels cannot become those of `how`."""
    try:
        if sample.extension == "npy":
            layout(_array_header(sample.image)[0], how.channels)
        else:
            mode_of(how.channels)
    except ChannelsError as error:
        raise ChannelsError(f"{name}: {error}") from error
    except ValueError:  # damaged
        return


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


def _decode_array(content: bytes, how: Decoding) -> Decoded:
    shape, by_columns, kind = _array_header(content)
    values = np.frombuffer(content, kind, math.prod(shape), _start(content))
    return of_array(values.reshape(shape, order="F" if by_columns else "C"), how)


def of_array(values: np.ndarray, how: Decoding) -> Decoded:
    """The pixels of an array of two or three axes, by the rules of `Decoding`. Raises ValueError."""
    axes = layout(values.shape, how.channels)
    values = values.transpose(axes) if axes else values[:, :, None]
    how.check_size(*values.shape[:2])
    pixels, changes = eight_bits(values, how.white)
    pixels = np.ascontiguousarray(pixels)
    return Decoded(with_channels(pixels, how.channels), changes)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of an image that simplejpeg decodes as Pillow does; None for any other."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (int(height), int(width)) if colours in ("YCbCr", "Gray") else None


def _has_endless_scans(content: bytes) -> bool:
    """Whether a JPEG that may be progressive has more than MOST_SCANS."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] not in b"\xc0\xc1\xc2":
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return content[place : place + 2] not in SEQUENTIAL and content.count(SCAN) > MOST_SCANS


def _decode_jpeg(content: bytes, height: int, width: int, memory: Memory | None, how: Decoding) -> Decoded:
    buffer = memory.of(height * width * how.channels) if memory else None
    colours = "RGB" if how.channels == 3 else "Gray"
    try:
        pixels = simplejpeg.decode_jpeg(
            content, colours, min_height=height, min_width=width, min_factor=1, buffer=buffer
        )
    except ValueError:  # simplejpeg refuses any damage, Pillow only what makes an image incomplete
        return _decode_by_pillow(content, how)
    place = content.find(MPO, 0, HEAD)
    changes = (FIRST,) if place > 3 and content[place - 4 : place - 2] == APP2 else ()
    return _upright(Decoded(pixels, changes), orientation(content), how)


def _decode_by_pillow(content: bytes, how: Decoding) -> Decoded:
    with _opened(content) as image:
        how.check_size(image.height, image.width)
        deep, several, white, changes = is_deep(image), has_several(image), how.white or own_white(image), ()
        if several and image.format == "TIFF" and not _has_copies_alone(image):
            raise ValueError("a TIFF of several pages; store each as a file of its own")
        values, number = _deep_values(image, content), _orientation(image)
        if values is not None:
            pixels, changes = eight_bits(values, white if white != 65535 else how.white)
            image = Image.fromarray(255 - pixels if is_white_zero(image) else pixels)
        elif deep:
            if how.white is not None:
                raise ValueError("16-bit colours, of which the upper 8 bits can be read: data.white needs .npy files")
            changes = (DEEP,)
        pixels, converted = from_image(image, how.channels)
    return _upright(Decoded(pixels, (*changes, *converted, *([FIRST] if several else []))), number, how)


def of_pil(image: Image.Image, how: Decoding) -> Decoded:
    """The pixels of an image that Pillow has opened or made, by the rules of `Decoding`. Raises ValueError."""
    try:
        if image.mode in ONE_CHANNEL:
            return of_array(np.asarray(image), how)
        how.check_size(image.height, image.width)
        return _upright(Decoded(*from_image(image, how.channels)), _orientation(image), how)
    except (OSError, SyntaxError) as error:  # it is decoded only now
        raise ValueError(f"cannot be decoded ({error})") from error


def _upright(found: Decoded, number: int, how: Decoding) -> Decoded:
    """An image that has an EXIF orientation, turned where that is wanted."""
    if number == 1:
        return found
    if not how.upright:
        return Decoded(found.pixels, (*found.changes, NOT_TURNED))
    return Decoded(turned(found.pixels, number), (*found.changes, TURNED))


def _deep_values(image: ImageFile.ImageFile, content: bytes) -> np.ndarray | None:
    """The stored values of more than 8 bits, (h, w) or (h, w, 3), or None. Those of a PNM file are read here, since
    Pillow scales them, and to 8 bits if they are colours. Raises ValueError for a TIFF that Pillow reads wrongly.
    """
    tags = _tags(image)
    if image.mode == "L" and 2 in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError("signed 8-bit values; store them unsigned")
    if tags.get(PLANAR) == 2 and max(tags.get(BITS, (1,))) > 8 and image.mode not in ONE_CHANNEL:
        raise ValueError("16-bit colours in planes; store them pixel by pixel, or as .npy")
    if image.format != "PPM" or (own_white(image) or 0) <= 255:
        return np.asarray(image) if image.mode in ONE_CHANNEL else None
    codec, _, start, _ = image.tile[0]
    shape = (image.height, image.width, 3)[: 3 if image.mode == "RGB" else 2]
    body, count = content[start:], math.prod(shape)
    values = np.array(body.split()[:count], int) if codec == "ppm_plain" else np.frombuffer(body, ">u2", count)
    return values.astype(np.uint16).reshape(shape)


def own_white(image: ImageFile.ImageFile) -> int | None:
    """The value that is white by the header of a file that was only opened: of PNM, and of TIFF with 12 bits."""
    if image.format == "PPM" and image.mode in ("I", "L", "RGB"):
        arguments = image.tile[0][3]
        return arguments[1] if isinstance(arguments, tuple) else 65535 if arguments == "I;16B" else 255
    return 4095 if _tags(image).get(BITS) == (12,) else None


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF; none of other files."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def is_white_zero(image: Image.Image) -> bool:
    """Whether 0 is white in a file of more than 8 bits, which Pillow does not heed; with fewer bits it does."""
    return image.mode in ONE_CHANNEL and _tags(image).get(PHOTOMETRIC) == 0


def has_several(image: Image.Image) -> bool:
    """Whether a file that was only opened has several images or pages."""
    return image.format in SEVERAL and getattr(image, "is_animated", False)


def _has_copies_alone(image: ImageFile.ImageFile) -> bool:
    """Whether all pages of a TIFF behind the first are smaller copies or masks, as thumbnails and overviews are."""
    kinds = []
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        kinds.append(_tags(image).get(KIND, 0))
    image.seek(0)
    return all(kind & 5 for kind in kinds)


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a file that was only opened has values of 16 bits; of colours Pillow reads the upper 8."""
    return any(";16" in str(tile) for tile in image.tile) or (image.format == "PPM" and (own_white(image) or 0) > 255)


def orientation(content: bytes) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 where it has none. Raises what Pillow raises."""
    if not content.startswith(JPEG):
        with _opened(content) as image:
            return _orientation(image)
    start, exif = content.find(EXIF, 0, HEAD), Image.Exif()
    if start < 0:
        return 1
    with suppress(Exception):  # damaged EXIF data are none
        exif.load(content[start : start + int.from_bytes(content[start - 2 : start])])
        return _one_of_8(exif)
    return 1


def _orientation(image: Image.Image) -> int:
    with suppress(SyntaxError, struct.error):  # damaged EXIF data are none
        return 1 if image.format == "TIFF" else _one_of_8(image.getexif())  # Pillow turns a TIFF itself
    return 1


def _one_of_8(exif: Image.Exif) -> int:
    found = exif.get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


@contextmanager
def _opened(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """An image file with its header read, by one of FORMATS; its size has no limit of Pillow's meanwhile."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield Image.open(io.BytesIO(content), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
