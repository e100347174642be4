"""Files whose values Pillow reads otherwise than they are meant, or in part only: right pixels, or a ValueError."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_dist.data.decode import decoded, stored_size
from mae_dist.data.index import Sample
from mae_dist.data.pixels import FIRST, ON_WHITE, Decoding
from mae_dist.data.reencode import as_png

RAMP = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
GREY = (RAMP >> 8).astype(np.uint8)
DEEP_COLOURS = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), dtype=np.uint16)
COLOURS = (DEEP_COLOURS >> 8).astype(np.uint8)


def found(content: bytes, **how: Any) -> tuple[np.ndarray, str]:
    """Pixels, and what decoding has changed."""
    pixels, changes = decoded(Sample("k", "img", content, 0), how=Decoding(**how))
    return pixels, "; ".join(changes)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def scaled(values: np.ndarray, white: float) -> np.ndarray:
    return np.rint(np.minimum(values, white).astype(np.float32) * np.float32(255 / white)).astype(np.uint8)


def tiff(values: bytes, photometric: int, bits: list[int], packed: bool = False, tags: Any = None) -> bytes:
    """A little-endian TIFF of 40 x 24 pixels in one strip; `tags` are others, as lists."""
    body = zlib.compress(values) if packed else values
    rows = {256: [40], 257: [24], 258: bits, 259: [8 if packed else 1], 262: [photometric], 273: [8], 277: [len(bits)],
            278: [24], 279: [len(body)]} | (tags or {})  # fmt: skip
    file, entries = bytearray(struct.pack("<2sHI", b"II", 42, 0) + body + b"\0" * (len(body) % 2)), b""
    for tag, numbers in sorted(rows.items()):
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        place = struct.pack("<I", len(file)) if len(data) > 4 else data
        file += data if len(data) > 4 else b""
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + place
    file[4:8] = struct.pack("<I", len(file))
    return bytes(file) + struct.pack("<H", len(rows)) + entries + bytes(4)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colours, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pnm(kind: str, white: int, values: np.ndarray) -> bytes:
    text = " ".join(map(str, values.ravel().tolist())).encode()
    return f"{kind} 40 24 {white}\n".encode() + (text if kind in ("P2", "P3") else values.astype(">u2").tobytes())


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_decode_of_16_bit_pnm_says_what_it_does_and_heeds_data_white(kind: str) -> None:
    values, in_rgb = (RAMP, rgb) if kind in ("P2", "P5") else (DEEP_COLOURS, np.array)
    pixels, said = found(pnm(kind, 65535, values))
    assert np.array_equal(pixels, in_rgb((values >> 8).astype(np.uint8)))
    assert said == "of 16-bit values the upper 8 bits are taken"
    pixels, said = found(pnm(kind, 4095, values >> 4))
    assert np.array_equal(pixels, in_rgb(scaled(values >> 4, 4095)))
    assert said == "uint16 values are multiplied by 255 / 4095"
    pixels, said = found(pnm(kind, 65535, values >> 4), white=1000)
    assert np.array_equal(pixels, in_rgb(scaled(values >> 4, 1000)))
    assert said == "uint16 values are multiplied by 255 / 1000; values above 1000 are cut to it"
    assert as_png(pnm(kind, 65535, values)) is None  # which would lose the lower 8 bits


def test_decode_of_float_pnm_is_none_of_integers() -> None:
    content = b"Pf 40 24 -1.0\n" + (RAMP[::-1] / 65535).astype("<f4").tobytes()  # rows from the bottom
    pixels, said = found(content)
    assert np.array_equal(pixels, rgb(scaled((RAMP / 65535).astype(np.float32), 1)))
    assert said == "floats are multiplied by 255"


@pytest.mark.parametrize("packed", [False, True])
def test_decode_of_tiff_in_which_zero_is_white_is_not_inverted(packed: bool) -> None:
    shallow = tiff(GREY.tobytes(), 0, [8], packed)
    assert np.array_equal(found(shallow)[0], rgb(255 - GREY))
    deep = tiff(RAMP.tobytes(), 0, [16], packed)
    assert np.array_equal(found(deep)[0], rgb(255 - GREY))
    assert np.array_equal(found(deep, white=65535)[0], rgb(255 - scaled(RAMP, 65535)))
    assert as_png(deep) is None
    for content in (shallow, tiff(np.packbits(GREY > 99, 1).tobytes(), 0, [1], packed)):
        stored = as_png(content)
        assert stored is not None
        assert np.array_equal(found(stored)[0], found(content)[0])
    floats = tiff((RAMP / 65535).astype("<f4").tobytes(), 0, [32], packed, {339: [3]})
    assert np.array_equal(found(floats)[0], rgb(255 - scaled((RAMP / 65535).astype(np.float32), 1)))


def test_decode_of_12_bit_tiff_knows_its_white() -> None:
    pairs = (RAMP >> 4).astype(np.uint32).reshape(24, 20, 2)
    both = pairs[..., 0] << 12 | pairs[..., 1]
    content = tiff(np.stack([both >> 16, both >> 8, both], -1).astype(np.uint8).tobytes(), 1, [12])
    pixels, said = found(content)
    assert np.array_equal(pixels, rgb(scaled(RAMP >> 4, 4095)))
    assert said == "uint16 values are multiplied by 255 / 4095"
    assert as_png(content) is None


def test_decode_of_16_bit_colours_says_so_and_refuses_data_white() -> None:
    for content in (deep_png(DEEP_COLOURS), tiff(DEEP_COLOURS.tobytes(), 2, [16] * 3)):
        pixels, said = found(content)
        assert np.array_equal(pixels, COLOURS)
        assert said == "of 16-bit values the upper 8 bits are taken"
        with pytest.raises(ValueError, match=r"data\.white needs \.npy files"):
            found(content, white=4095)


def test_decode_refuses_tiffs_that_pillow_reads_wrongly() -> None:
    planes = DEEP_COLOURS.transpose(2, 0, 1)
    places = {273: [8, 8 + 1920, 8 + 3840], 279: [1920] * 3, 284: [2]}
    with pytest.raises(ValueError, match="16-bit colours in planes"):
        found(tiff(planes.tobytes(), 2, [16] * 3, tags=places))
    with pytest.raises(ValueError, match="signed 8-bit values"):
        found(tiff(GREY.tobytes(), 1, [8], tags={339: [2]}))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_of_premultiplied_transparency_and_lab(channels: int) -> None:
    half = np.full_like(GREY, 128)
    pixels, said = found(tiff(np.dstack([GREY // 2, half]).tobytes(), 1, [8, 8], tags={338: [1]}), channels=channels)
    if channels == 4:
        assert (pixels[..., 3] == 128).all()
        assert np.abs(pixels[..., 0] - GREY.astype(int)).max() <= 2
    else:
        assert np.abs(pixels[..., 0] - (GREY / 2 + 127.5)).max() <= 2
        assert said == ON_WHITE
    assert found(tiff(COLOURS.tobytes(), 8, [8] * 3), channels=channels)[0].shape == (24, 40, channels)


def test_decode_of_cmyk_says_that_it_has_no_profile() -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOURS).convert("CMYK").save(stream, "JPEG", quality=100)
    assert found(stream.getvalue())[1] == "CMYK colours become RGB without their profile"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_decode_of_several_images_in_a_file_says_that_it_takes_the_first(kind: str) -> None:
    image, options = Image.fromarray(GREY), {"lossless": True} if kind == "WEBP" else {}
    for others, expected in (([], ""), ([Image.fromarray(255 - GREY)], FIRST)):
        stream = io.BytesIO()
        image.save(stream, kind, save_all=True, append_images=others, **options)
        pixels, said = found(stream.getvalue())
        assert np.array_equal(pixels, rgb(GREY))
        assert said == expected


@pytest.mark.parametrize("channels", [3, 4])
def test_decode_of_mpo_says_that_it_takes_the_first_image(channels: int) -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    pixels, said = found(stream.getvalue(), channels=channels)
    assert said == FIRST
    assert pixels.shape == (24, 40, channels)
    assert pixels[..., :3].mean() > 100


def test_decode_of_tiff_with_smaller_copies_takes_the_first_page(tmp_path: Path) -> None:
    def pages(*kinds: int) -> bytes:
        images = [Image.fromarray(COLOURS[:: 1 + page, :: 1 + page]) for page in range(len(kinds))]
        for image, kind in zip(images, kinds, strict=True):
            image.encoderinfo = {"tiffinfo": {254: kind}}  # pyright: ignore[reportAttributeAccessIssue]
        images[0].save(tmp_path / "x.tif", save_all=True, append_images=images[1:], tiffinfo={254: kinds[0]})
        return (tmp_path / "x.tif").read_bytes()

    content = pages(0, 1, 5)
    pixels, said = found(content)
    assert np.array_equal(pixels, COLOURS)
    assert said == FIRST
    stored = as_png(content)
    assert stored is not None
    assert np.array_equal(found(stored)[0], COLOURS)
    for kinds in ((0, 0), (0, 1, 0), (1, 0)):
        with pytest.raises(ValueError, match="a TIFF of several pages"):
            found(pages(*kinds))


def test_decode_of_tiff_orientation_is_that_of_pillow_once() -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, "TIFF", tiffinfo={274: 6})
    content, upright = stream.getvalue(), np.rot90(COLOURS, -1)
    for how in ({}, {"upright": True}):
        assert np.array_equal(found(content, **how)[0], upright)
        assert stored_size(Sample("k", "tif", content, 0), Decoding(**how)) == (40, 24)
    stored = as_png(content)
    assert stored is not None
    assert np.array_equal(found(stored, upright=True)[0], upright)
