"""Resizing and encoding images anew: what is kept, what is changed, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mae_dist.data.decode import decode, decoded
from mae_dist.data.index import Sample
from mae_dist.data.pixels import Decoding
from mae_dist.data.reencode import Encoding


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that lossy formats keep nearly unchanged."""
    rows, columns = np.mgrid[:height, :width]
    channels = (rows / height, columns / width, (rows + columns) / (height + width))
    return np.stack([np.round(255 * channel) for channel in channels], -1).astype(np.uint8)


def file_of(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def pixels_of(extension: str, content: bytes) -> np.ndarray:
    return np.asarray(decode(Sample("k", extension, content, 0)))


def store(encoding: Encoding, extension: str, content: bytes) -> tuple[str, bytes, np.ndarray]:
    """Extension, content and pixels of the stored file; the pixels that `store` returns are those of lossless files."""
    extension, stored, pixels = encoding.store(extension, content, decoded(Sample("k", extension, content, 0)))
    if extension == "npy":
        np.testing.assert_array_equal(pixels_of(extension, stored), pixels)
    return extension, stored, pixels_of(extension, stored)


@pytest.mark.parametrize("extension", ["jpg", "webp", "npy"])
@pytest.mark.parametrize(("size", "expected"), [((60, 90), (20, 30)), ((91, 60), (30, 20)), ((20, 50), (20, 50)),
                                                ((8, 90), (8, 90))])  # fmt: skip
def test_encoding_short_side_reduces_and_never_enlarges(
    extension: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    found, _, pixels = store(Encoding(20, extension), "png", file_of(smooth(*size), "PNG"))
    assert (found, pixels.shape) == (extension, (*expected, 3))
    reference = Image.fromarray(smooth(*size)).resize((expected[1], expected[0]), Image.Resampling.BICUBIC)
    assert np.abs(pixels - np.asarray(reference, dtype=float)).max() <= {"jpg": 16, "webp": 20, "npy": 0}[extension]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_encoding_keeps_bytes_of_files_that_have_format_and_size(kind: str) -> None:
    extension = {"JPEG": "jpg", "WEBP": "webp"}[kind]
    content = file_of(smooth(20, 30), kind)
    for encoding in (Encoding(), Encoding(20, extension), Encoding(None, extension)):
        assert store(encoding, extension, content)[1] == content
    assert store(Encoding(20, extension, 30), extension, content)[1] != content
    assert store(Encoding(19, extension), extension, content)[1] != content


def test_encoding_png_named_jpg_becomes_jpeg() -> None:
    extension, content, _ = store(Encoding(20), "jpg", file_of(smooth(10, 10), "PNG"))
    assert extension == "jpg"
    assert Image.open(io.BytesIO(content)).format == "JPEG"


def test_encoding_quality_and_default() -> None:
    content = file_of(smooth(64, 64), "PNG")
    low, default, high = (len(store(Encoding(None, "jpg", q), "png", content)[1]) for q in (30, None, 98))
    assert low < default == len(store(Encoding(None, "jpg", 90), "png", content)[1]) < high


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "RGBA", "LA", "L", "1"])
def test_encoding_stores_rgb_as_decode_gives_it(mode: str) -> None:
    picture = Image.fromarray(smooth(12, 16))
    image = (
        Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16)) if mode == "I;16" else picture.convert(mode)
    )
    kind = "JPEG" if mode == "CMYK" else "PNG"
    extension, content = kind.lower(), file_of(image, kind)
    np.testing.assert_array_equal(store(Encoding(None, "npy"), extension, content)[2], pixels_of(extension, content))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, None, None), "--short-side 0: must be 1 or more"),
        ((None, "gif", None), "--format gif: must be one of jpg, webp, npy"),
        ((256, None, 0), "--quality 0: must be 1 to 100"),
        ((256, "jpg", 101), "--quality 101: must be 1 to 100"),
        ((256, "npy", 90), "--quality 90: npy stores pixels without loss"),
        ((None, None, 90), "--quality 90: nothing is encoded anew"),
    ],
)
def test_encoding_options_that_make_no_sense_are_refused(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(*options)


def test_encoding_image_too_large_for_the_format_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="cannot be stored as webp"):
        store(Encoding(None, "webp"), "png", file_of(smooth(1, 17_000), "PNG"))


def test_encoding_turns_images_upright_and_then_has_no_orientation_left() -> None:
    image = Image.fromarray(smooth(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    content = file_of(image, "JPEG", exif=exif)
    encoding = Encoding(format="jpg", how=Decoding(upright=True))
    _, stored, _ = encoding.store("jpg", content, decoded(Sample("k", "jpg", content, 0), how=encoding.how))
    assert Image.open(io.BytesIO(stored)).size == (20, 30)
    assert 0x0112 not in Image.open(io.BytesIO(stored)).getexif()
    assert encoding.store("jpg", stored, decoded(Sample("k", "jpg", stored, 0), how=encoding.how))[1] is stored
