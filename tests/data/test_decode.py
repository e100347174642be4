"""Decode: by which rules values of any kind become 8-bit pixels, and that any bytes are an image or a ValueError."""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae_dist.data.decode import SCAN, decode, decoded, stored_size
from mae_dist.data.index import Sample
from mae_dist.data.pixels import Decoding

RAMP = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
GREY = (RAMP >> 8).astype(np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **how: Any) -> Sample:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return Sample("k", "png", stream.getvalue(), 0)


def array(values: np.ndarray) -> Sample:
    stream = io.BytesIO()
    np.save(stream, values)
    return Sample("k", "npy", stream.getvalue(), 0)


def changes(sample: Sample, how: Decoding = Decoding()) -> str:  # noqa: B008
    return "; ".join(decoded(sample, how=how).changes)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


DEEP = {
    "png": stored(Image.fromarray(RAMP)), "tiff": stored(Image.fromarray(RAMP), "TIFF"),
    "big-endian tiff": stored(Image.frombytes("I;16B", (40, 24), RAMP.astype(">u2").tobytes()), "TIFF"),
    "pgm": Sample("k", "png", b"P5 40 24 65535\n" + RAMP.astype(">u2").tobytes(), 0),
    "npy": array(RAMP), "big-endian npy": array(RAMP.astype(">u2")), "one channel npy": array(RAMP[:, :, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_decode_of_16_bits_takes_the_upper_8(name: str) -> None:
    assert np.array_equal(decode(DEEP[name]), rgb(GREY))
    assert stored_size(DEEP[name]) == (24, 40)
    assert "16-bit" in changes(DEEP[name])


def test_decode_of_16_bits_by_data_white_keeps_12_bit_images_bright() -> None:
    how = Decoding(white=4095)
    for sample in (array(RAMP >> 4), stored(Image.fromarray(RAMP >> 4))):
        assert np.array_equal(decode(sample, how=how), rgb(np.rint((RAMP >> 4) / 4095 * 255).astype(np.uint8)))
        assert "4095" in changes(sample, how)
    assert decode(array(RAMP), how=how).max() == 255
    assert np.array_equal(decode(stored(Image.fromarray(COLOUR)), how=how), COLOUR)


@pytest.mark.parametrize("kind", ["f2", "f4", ">f8"])
def test_decode_of_floats_in_0_to_1_multiplies_by_255(kind: str) -> None:
    assert np.array_equal(decode(array((COLOUR / 255).astype(kind))), COLOUR)


def test_decode_of_booleans_and_1_bit_images_is_black_and_white() -> None:
    bits = COLOUR[:, :, 0] > 99
    for sample in (array(bits), stored(Image.fromarray(bits))):
        assert np.array_equal(decode(sample), rgb(bits * np.uint8(255)))
        assert changes(sample) == ""


REFUSED = {
    "floats of 0..255": array(COLOUR.astype(np.float32)), "nan": array(np.full((4, 4, 3), np.nan)),
    "negative floats": array(np.full((4, 4, 3), -0.5)), "int32": array(COLOUR.astype(np.int32)),
    "int16": array(RAMP.astype(np.int16)), "complex": array(np.zeros((4, 4, 3), complex)),
    "int32 tiff": stored(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "float tiff": stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "dates": array(np.zeros((4, 4, 3), "M8[s]")),
    "many axes": array(np.zeros((1, 4, 4, 3), np.uint8)), "no pixels": array(np.zeros((0, 4, 3), np.uint8)),
    "pages": stored(Image.fromarray(COLOUR), "TIFF", save_all=True, append_images=[Image.fromarray(COLOUR)]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_decode_refuses_values_without_a_stated_range(name: str) -> None:
    with pytest.raises(ValueError, match=r"values from|array of|pages"):
        decode(REFUSED[name])


def test_decode_of_integers_and_floats_of_any_range_needs_data_white() -> None:
    for name in ("floats of 0..255", "int32"):
        assert np.array_equal(decode(REFUSED[name], how=Decoding(white=255)), COLOUR)
    assert np.array_equal(decode(REFUSED["int32 tiff"], how=Decoding(white=65535))[..., 0], np.rint(RAMP / 257))


def test_decode_of_transparency_draws_it_on_white() -> None:
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    image = Image.fromarray(np.dstack([COLOUR, alpha]))
    share = alpha[:, :, None] / 255
    assert np.abs(decode(stored(image)) - (COLOUR * share + 255 * (1 - share))).max() <= 1
    palette = Image.fromarray(GREY).convert("P")
    for index in (0, 77):
        found = decode(stored(palette, transparency=index))
        assert np.array_equal(found == 255, rgb((np.asarray(palette) == index) | (GREY == 255)))
    assert (decode(stored(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (40, 24))]))) == 255).all()
    assert changes(stored(image)) == "transparency is drawn on white"
    opaque = stored(Image.fromarray(COLOUR).convert("RGBA"))
    assert np.array_equal(decode(opaque), COLOUR)
    assert changes(opaque) == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("number", range(1, 9))
def test_decode_turns_images_upright_only_if_asked(kind: str, number: int) -> None:
    image, how = Image.fromarray(np.sort(COLOUR, 0)), Decoding(upright=True)
    exif = image.getexif()
    exif[0x0112] = number
    sample = stored(image, kind, exif=exif)
    found = Image.open(io.BytesIO(sample.image))
    assert np.array_equal(decode(sample), np.asarray(found))
    assert np.array_equal(decode(sample, how=how), np.asarray(ImageOps.exif_transpose(found)))
    assert (stored_size(sample), stored_size(sample, how)) == ((24, 40), decode(sample, how=how).shape[:2])
    assert changes(sample) == ("EXIF orientation is ignored" if number > 1 else "")


def test_decode_refuses_more_than_max_pixels_before_decoding() -> None:
    for sample in (stored(Image.fromarray(COLOUR)), stored(Image.fromarray(COLOUR), "JPEG"), array(COLOUR)):
        assert decode(sample, how=Decoding(max_pixels=960)).shape == (24, 40, 3)
        with pytest.raises(ValueError, match=r"40 x 24 pixels are more than data\.max_pixels=959"):
            decode(sample, how=Decoding(max_pixels=959))


def test_decode_refuses_decompression_bombs_without_a_warning() -> None:
    bomb = bytearray(stored(Image.fromarray(COLOUR)).image)
    for side in (10_000, 60_000):
        bomb[16:24] = struct.pack(">II", side, side)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=r"."):
                decode(Sample("k", "jpg", bytes(bomb), 0))


def test_decode_refuses_a_progressive_jpeg_of_scans_without_end() -> None:
    """A scan may have a few bytes, and each passes over the whole image. Marks in other data are none."""
    image, comment = stored(Image.fromarray(COLOUR), "JPEG", progressive=True).image, b"\xff\xfe\x02\x02" + SCAN * 256
    last = image[image.rindex(SCAN) : -2]
    assert decode(Sample("k", "jpg", image, 0)).shape == (24, 40, 3)
    for content in (image[:-2] + last * 100 + image[-2:], b"\xff\xd8\0" + image[2:-2] + last * 100 + image[-2:]):
        with pytest.raises(ValueError, match="a progressive JPEG of more than 100 scans"):
            decode(Sample("k", "jpg", content, 0))
    plain = stored(Image.fromarray(COLOUR), "JPEG").image
    assert decode(Sample("k", "jpg", plain[:2] + comment + plain[2:], 0)).shape == (24, 40, 3)


def npy_with(header: str, version: int = 1, length: int | None = None) -> bytes:
    content = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(content) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + content + b"0" * 99


SHAPE = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s)}"
HOSTILE = {
    "rows": npy_with(SHAPE % "1000000000000, 1, 3"), "more rows": npy_with(SHAPE % f"{10**30}, 1, 3"),
    "negative": npy_with(SHAPE % "-1, -1, 3"),
    "nested": npy_with("(" * 60), "deep": npy_with("(" * 5000), "code": npy_with("__import__('os').abort()"),
    "long": npy_with("{}", 2, 2**32 - 1), "version": npy_with(SHAPE % "4, 4, 3", 9), "empty": b"",
    "magic": b"\x93NUMPY", "objects": npy_with((SHAPE % "1, 1, 3").replace("|u1", "|O")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_decode_refuses_hostile_arrays(name: str) -> None:
    sample = Sample("k", "npy", HOSTILE[name], 0)
    with pytest.raises(ValueError, match=r"."):
        decode(sample)
    assert stored_size(sample) is None


def test_decode_never_starts_ghostscript_or_an_unlisted_decoder() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    others = [stored(Image.fromarray(COLOUR), kind).image for kind in ("DDS", "ICO", "PCX", "TGA", "SGI", "AVIF")]
    for content in (eps, *others):
        with pytest.raises(ValueError, match="is no BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP image"):
            decode(Sample("k", "jpg", content, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_decode_of_damaged_bytes_is_an_image_or_a_valueerror(kind: str) -> None:
    content = stored(Image.fromarray(COLOUR), kind).image
    generator = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(60):
            damaged = bytearray(content[: generator.integers(1, len(content))] if number % 2 else content)
            for place in generator.integers(0, len(damaged), 4):
                damaged[place] = generator.integers(0, 256)
            sample = Sample("k", "jpg", bytes(damaged), 0)
            stored_size(sample)
            with suppress(ValueError):
                assert decode(sample, how=Decoding(max_pixels=10**6)).shape[2] == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_of_damaged_exif_data_ignores_them(kind: str) -> None:
    for damage in (b"II", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b""):
        sample = stored(Image.fromarray(COLOUR), kind, exif=b"Exif\0\0" + damage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for how in (Decoding(), Decoding(upright=True)):
                assert decode(sample, how=how).shape == (24, 40, 3)
                assert changes(sample, how) == ""
