"""Stored image files to pixels: the one place that knows the formats. Imports no torch."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mae_dist.data.index import Sample


def decode(sample: Sample) -> Image.Image:
    """Decode a sample's image to RGB; EXIF orientation is ignored, as in the official code.

    Raises ValueError when its bytes are not a complete image of a known format.
    """
    try:
        image = _open(sample.extension, sample.image)
        image.load()
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def stored_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) of a sample's image, from the header of its file; None if that is damaged."""
    try:
        image = _open(sample.extension, sample.image)
        return image.height, image.width
    except Exception:  # as in `decode`
        return None


def _open(extension: str, content: bytes) -> Image.Image:
    if extension != "npy":
        return Image.open(io.BytesIO(content))
    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)  # np.load would also take archives
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"array of {array.dtype} {array.shape}, expected uint8 (height, width, 3)")
    return Image.fromarray(array)
