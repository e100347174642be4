"""Crop: the pixels of Pillow, from every kind of file, faster; unreadable samples are replaced."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared_types import Tars

from mae_dist import schema
from mae_dist.data.crop import Reader, Rows, crop, decode_crop
from mae_dist.data.decode import Decoded, Memory, decode, decoded, stored_size
from mae_dist.data.index import Sample
from mae_dist.data.pixels import Decoding
from mae_dist.data.views import View


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Pixels with the smoothness of a photograph: noise of several scales, saturated in places."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells, weight in ((3, 90), (12, 50), (60, 25), (200, 10)):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (
            weight / 128 * (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)).astype(float) - 128)
        )
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def stored(
    extension: str, pixels: np.ndarray | None = None, mode: str = "RGB", kind: str = "JPEG", **how: Any
) -> Sample:
    stream = io.BytesIO()
    Image.fromarray(photo(150, 201) if pixels is None else pixels).convert(mode).save(stream, kind, **how)
    return Sample("k", extension, stream.getvalue(), 0)


def array_file(array: np.ndarray | None = None, version: tuple[int, int] = (1, 0)) -> Sample:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, photo(40, 50) if array is None else array, version)
    return Sample("k", "npy", stream.getvalue(), 0)


SAMPLES = {
    "420": stored("jpg"), "444": stored("jpg", subsampling=0, quality=95), "422": stored("jpg", subsampling=1),
    "progressive": stored("jpg", progressive=True), "gray": stored("jpg", mode="L"), "cmyk": stored("jpg", mode="CMYK"),
    "restart": stored("jpg", restart_marker_rows=2), "png named jpg": stored("jpg", kind="PNG"),
    "jpg named png": stored("png"), "palette": stored("png", mode="P", kind="PNG"),
    "alpha": stored("png", mode="RGBA", kind="PNG"),
    "webp": stored("webp", kind="WEBP"), "1 pixel": stored("jpg", photo(1, 1)), "narrow": stored("jpg", photo(3, 97)),
}  # fmt: skip
SAMPLES["trailing bytes"] = Sample("k", "jpg", SAMPLES["420"].image + b"after the end", 0)


@pytest.mark.parametrize("name", SAMPLES)
def test_decode_gives_the_pixels_and_size_of_pillow(name: str) -> None:
    sample = SAMPLES[name]
    expected = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
    assert np.array_equal(decode(sample), expected)
    assert stored_size(sample) == expected.shape[:2]


def test_decode_reuses_memory_that_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, large, small = Memory(), SAMPLES["444"], stored("jpg", photo(40, 50))
    for sample in (small, large, small, large):
        assert np.array_equal(decode(sample, 1, memory), decode(sample))
    assert np.shares_memory(decode(small, 1, memory), decode(large, 1, memory))
    monkeypatch.setattr(Memory, "LARGEST", 40 * 50 * 3)
    assert not np.shares_memory(decode(large, 1, memory), decode(large, 1, memory))


ARRAYS = {
    "np.save": array_file(),
    "columns first": array_file(np.asfortranarray(photo(40, 50))),
    "version 2": array_file(version=(2, 0)),
}


@pytest.mark.parametrize("sample", ARRAYS.values(), ids=ARRAYS)
def test_decode_of_arrays_is_exact(sample: Sample) -> None:
    pixels = decode(sample)
    assert np.array_equal(pixels, photo(40, 50))
    assert stored_size(sample) == (40, 50)


def test_decode_refuses_arrays_that_are_no_image_or_cut_short() -> None:
    whole = array_file().image
    for sample in (array_file(photo(40, 50).astype(float)), array_file(photo(40, 50)[:, :, :2]),
                   *(Sample("k", "npy", whole[:end], 0) for end in (0, 20, 128, len(whole) - 1))):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            decode(sample)


@pytest.mark.parametrize("name", ["420", "progressive", "gray", "cmyk", "png named jpg", "webp"])
def test_decode_refuses_a_file_that_is_cut_short(name: str) -> None:
    image = SAMPLES[name].image
    for end in (0, 2, 20, len(image) // 2, len(image) - 40):
        with pytest.raises(ValueError, match=r"."):
            decode(Sample("k", "jpg", image[:end], 0))


def cropped(
    image: Sample | np.ndarray, box: np.ndarray, flip: bool, size: int, decode: Callable[..., np.ndarray] = decode
) -> np.ndarray:
    """The crop as a new array; of a stored image by way of `decode_crop`."""
    out = np.zeros((size, size, 3), dtype=np.uint8)
    if isinstance(image, Sample):
        decode_crop(image, stored_size(image) or (0, 0), box.tolist(), flip, out, decode)
    else:
        crop(image, box.tolist(), flip, out)
    return out


def by_pillow(sample: Sample, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """The crop as torchvision makes it on Pillow's images."""
    top, left, height, width = (int(value) for value in box)
    image = Image.open(io.BytesIO(sample.image)).convert("RGB").crop((left, top, left + width, top + height))
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return array[:, ::-1] if flip else array


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("size", [64, 224])
def test_crop_agrees_with_pillow(size: int) -> None:
    sample = stored("jpg", photo(375, 500))
    generator = np.random.default_rng(0)
    for number in range(30):
        height, width = generator.integers(20, 2 * size - 1), generator.integers(20, 376)
        top, left = generator.integers(0, 376 - min(height, 375)), generator.integers(0, 501 - width)
        box = np.array([top, left, min(height, 375), width], dtype=float)
        found = cropped(sample, box, number % 2 == 1, size)
        assert difference(found, by_pillow(sample, box, number % 2 == 1, size)) <= 0.5


@pytest.mark.parametrize(("side", "shrink"), [(127, 1), (128, 2), (300, 4), (520, 8)])
def test_crop_decodes_at_a_fraction_where_the_box_is_large(side: int, shrink: int) -> None:
    asked: list[int] = []

    def noted(sample: Sample, shrink: int) -> np.ndarray:
        asked.append(shrink)
        return decode(sample, shrink)

    for seed, odd in ((0, 0), (1, 1)):
        sample = stored("jpg", photo(700 + odd, 901, seed))
        for top, left in ((0, 0), (31, 77), (140 + odd, 901 - side)):
            box, found = np.array([top, left, side, side], dtype=float), np.zeros((32, 32, 3), dtype=np.uint8)
            decode_crop(sample, (700 + odd, 901), box.tolist(), False, found, noted)
            assert difference(found, by_pillow(sample, box, False, 32)) <= (0.5 if shrink == 1 else 1.5)
    assert set(asked) == {shrink}


def test_crop_beyond_a_large_jpeg_has_the_pixels_of_other_formats() -> None:
    pixels, box = photo(500, 500), np.array([-41.0, 31, 500, 500])
    whole = stored("jpg", pixels)
    same = stored("png", decode(whole), kind="PNG")
    assert np.array_equal(cropped(whole, box, False, 64), cropped(same, box, False, 64))
    assert not cropped(whole, box, False, 64)[:5].any()


def test_crop_of_files_that_are_no_jpeg_is_whole_however_large_the_box() -> None:
    sample = stored("png", photo(300, 300), kind="PNG")
    box = np.array([0.0, 0, 300, 300])
    assert difference(cropped(sample, box, False, 64), by_pillow(sample, box, False, 64)) <= 0.5


def test_crop_of_fractional_boxes_counts_pixels_around_them() -> None:
    image = photo(60, 80)
    box = np.array([6.25, 16.25, 47.5, 47.5])
    expected = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC, box=(16.25, 6.25, 63.75, 53.75))
    assert np.array_equal(cropped(image, box, False, 32), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("box", [(4, 6, 50, 60), (-5, 9, 60, 80), (6.25, 16.25, 47.5, 31.5)])
def test_crop_of_any_channels_is_that_of_each_alone(channels: int, box: tuple[float, ...]) -> None:
    pixels = np.concatenate([photo(60, 80, seed) for seed in (0, 1)], 2)[:, :, :channels].copy()
    found = np.zeros((24, 40, channels), dtype=np.uint8)
    for flip in (False, True):
        crop(pixels, box, flip, found)
        for number in range(channels):
            alone = np.zeros((24, 40, 3), dtype=np.uint8)
            crop(np.repeat(pixels[:, :, number : number + 1], 3, 2), box, flip, alone)
            assert np.array_equal(found[:, :, number], alone[:, :, 0])


def test_crop_beyond_the_image_is_black() -> None:
    image = photo(32, 32)
    found = cropped(image, np.array([-3.0, 2, 32, 32]), False, 32)
    assert np.array_equal(found, np.pad(image, ((3, 0), (0, 2), (0, 0)))[:32, 2:])


def test_reader_raises_where_no_sample_is_readable(tars: Tars) -> None:
    rows = Rows(np.empty((1, 32, 32, 3), np.uint8), np.empty(1, np.int64), np.empty(1, np.bool_))
    with pytest.raises(ValueError, match=r"s0000\.png in x-0\.tar: cannot be read \(.*nor any sample that may"):
        Reader(tars([2, 3], broken={0, 2, 3, 4, 1}), None).fill(np.zeros(1, np.int64), np.array([3]), rows)


def test_reader_decodes_copies_of_a_sample_once_and_crops_each(tars: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples 4 and 5 three times each, as repeated augmentation has them, and 2 copies of a broken one."""
    view = View(schema.ViewConfig(), 24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), seed=3, training=True)
    reader = Reader(tars([3, 6], extension="jpg", size=None, broken={6}), view)
    ids, epochs = np.array([4, 5, 4, 5, 4, 5, 6, 6]), np.array([0, 0, 1, 1, 2, 2, 0, 1])
    alone = [Rows(np.empty((1, 24, 24, 3), np.uint8), np.empty(1, np.int64), np.empty(1, np.bool_)) for _ in ids]
    for i, row in enumerate(alone):
        reader.fill(epochs[i : i + 1], ids[i : i + 1], row)
    keys: list[str] = []

    def noted(sample: Sample, shrink: int, memory: Memory, how: Decoding) -> Decoded:
        keys.append(sample.key)
        return decoded(sample, shrink, memory, how)

    monkeypatch.setattr("mae_dist.data.crop.decoded", noted)
    rows = Rows(np.empty((8, 24, 24, 3), np.uint8), np.empty(8, np.int64), np.empty(8, np.bool_))
    reader.fill(epochs, ids, rows)
    for found, expected in zip(rows, zip(*alone, strict=True), strict=True):
        assert np.array_equal(found, np.concatenate(expected))
    assert len({image.tobytes() for image in rows.images}) == 8
    assert rows.bad.tolist() == [False] * 6 + [True] * 2
    assert [key for key in keys if key != "s0006"] == ["s0004", "s0005", "s0007"]
