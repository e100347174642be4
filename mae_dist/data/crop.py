"""From stored samples to the pixels of their crops: read, decode, cut, resize, flip, augment.

The resize is bicubic and antialiased on 8-bit pixels, as Pillow's: by torch, several times as fast, where the box has
whole pixels of the image, by Pillow elsewhere. Knows no rank, no batch and no process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8

from mae_dist.data.decode import Decoded, Memory, decoded, stored_size
from mae_dist.data.index import Sample, ShardIndex
from mae_dist.data.pixels import RGB, Decoding, Pixels, resize
from mae_dist.data.shard_files import ChangedError
from mae_dist.data.views import View

log = logging.getLogger(__name__)

_resize = torch.ops.aten._upsample_bicubic2d_aa.out
"""What F.interpolate(mode="bicubic", antialias=True) calls, to which only this gives the memory to write to."""
_flip = torch.ops.aten.flip.out
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # stored arrays are only read
SHRINKS = (8, 4, 2)
"""A JPEG can be decoded at these fractions of its size."""


class Rows(NamedTuple):
    """Images in the host's memory, labels (-1: none), and whether another sample replaces an unreadable one (bad)."""

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]
    bad: Bool[np.ndarray, " n"]

    def part(self, first: int, count: int) -> Rows:
        """At most `count` rows from `first` on, in the same memory."""
        return Rows(*(array[first : first + count] for array in self))


class Met(NamedTuple):
    """What reading has met: unreadable samples by id, with the reason; and what decoding has changed, with the number
    of images and the least id of one.
    """

    unreadable: dict[int, str]
    changes: dict[str, tuple[int, int]]


class Reader:
    """Reads samples of an index, decoded as `how` says, cropped and augmented as `view` says; None: whole, which all
    have one size. Each image is a function of its (epoch, id) alone.
    """

    def __init__(self, index: ShardIndex, view: View | None, how: Decoding = RGB):
        self.index, self.view, self.augment, self.how = index, view, view.augment() if view else None, how
        self.memory = Memory()
        self.unreadable: dict[int, str] = {}
        self.decoded: tuple[Sample, int, Decoded] | None = None

    def fill(self, epochs: Int[np.ndarray, " n"], ids: Int[np.ndarray, " n"], rows: Rows) -> Met:
        """Write images, labels and marks of n samples into `rows`, and say what was met.

        An unreadable sample is replaced (`ShardIndex.neighbours`) and `bad` set. Raises ValueError where none of these
        can be read, where the tar has changed (`ShardFiles`), or where an image has another size than `rows`, and
        MachineFault when the storage fails.
        """
        places, left = ids.copy(), np.argsort(ids, kind="stable")  # copies of a sample follow each other
        others: dict[int, Iterator[int]] = {}
        met = Met({}, {})
        while len(left):
            samples = [self._read(place) for place in places[left].tolist()]
            sizes = [self._size(sample) for sample in samples]
            boxes, flips = self._boxes(epochs[left], ids[left], sizes)
            unreadable = []
            for row, sample, size, box, flip in zip(left, samples, sizes, boxes, flips, strict=True):
                place = int(places[row])
                try:
                    if place in self.unreadable:  # perhaps since a moment ago
                        raise ValueError(self.unreadable[place])
                    if isinstance(sample, ValueError):
                        raise sample
                    self._write(sample, size, box, flip, rows.images[row])
                    rows.labels[row] = sample.label
                    for what in self.decoded[2].changes if self.decoded else ():
                        count, first = met.changes.get(what, (0, place))
                        met.changes[what] = count + 1, min(first, place)
                except ChangedError as error:
                    raise ValueError(f"{self.index.sample_name(place)}: {error}") from error
                except ValueError as error:
                    met.unreadable[place] = self.unreadable[place] = str(error)
                    places[row] = self._next(others.setdefault(row, self.index.neighbours(place)), place)
                    unreadable.append(row)
            left = np.array(unreadable, dtype=np.int64)
        rows.bad[:] = places != ids
        if self.augment:
            for image, seeds in zip(rows.images, self.augment.seeds(epochs, ids), strict=True):
                image[:] = self.augment(image, seeds)
        return met

    def _size(self, sample: Sample | ValueError) -> tuple[int, int]:
        """(height, width) of a sample; any where it is unreadable, or without a view."""
        return (self.view and isinstance(sample, Sample) and stored_size(sample, self.how)) or (1, 1)

    def _boxes(
        self, epochs: np.ndarray, ids: np.ndarray, sizes: list[tuple[int, int]]
    ) -> tuple[list[list[float]], list[bool]]:
        """The boxes and flips that `view` draws; whole images without a view."""
        if self.view is None:
            return [[0, 0, *size] for size in sizes], [False] * len(sizes)
        boxes, flips = self.view.boxes(torch.from_numpy(epochs), torch.from_numpy(ids), torch.tensor(sizes))
        return boxes.tolist(), flips.tolist()

    def _write(self, sample: Sample, size: tuple[int, int], box: Sequence[float], flip: bool, out: Pixels) -> None:
        """Write a crop, or a whole image, into `out`."""
        if self.view is not None:
            decode_crop(sample, size, box, flip, out, self._decode)
            return
        pixels = self._decode(sample, 1)
        if pixels.shape != out.shape:
            found, wanted = (f"{shape[0]}x{shape[1]}" for shape in (pixels.shape, out.shape))
            raise ChangedError(f"{found} pixels, but image_size in dataset.json is {wanted}; index the data again")
        out[:] = pixels

    def _decode(self, sample: Sample, shrink: int) -> Pixels:
        """See `decode`. The pixels stay until the next call, and for a copy of the same sample (data.aug_repeats)."""
        if self.decoded is None or self.decoded[:2] != (sample, shrink):
            self.decoded = None  # its pixels lie in the same memory
            self.decoded = sample, shrink, decoded(sample, shrink, self.memory, self.how)
        return self.decoded[2].pixels

    def _read(self, place: int) -> Sample | ValueError:
        """The stored sample, or why it is unreadable."""
        try:
            return self.index.read(place)
        except ChangedError:
            raise
        except ValueError as error:
            return error

    def _next(self, others: Iterator[int], place: int) -> int:
        """The next of the samples that may replace the unreadable sample `place`."""
        found = next((other for other in others if other not in self.unreadable), None)
        if found is None:
            name, reason = self.index.sample_name(place), self.unreadable[place]
            raise ValueError(f"{name}: cannot be read ({reason}), nor any sample that may replace it")
        return found


def log_unreadable(index: ShardIndex, unreadable: Mapping[int, str], named: set[int]) -> None:
    """Log the samples that `Reader.fill` could not read, each once: those that are not in `named`, which grows."""
    for sample in unreadable.keys() - named:
        found = {"sample": index.sample_name(sample), "reason": unreadable[sample]}
        log.error("unreadable: %s (%s)", *found.values(), extra={"unreadable": found})  # every rank prints errors
    named.update(unreadable)


def decode_crop(
    sample: Sample, stored: tuple[int, int], box: Sequence[float], flip: bool, out: Pixels,
    decode: Callable[[Sample, int], Pixels],
) -> None:  # fmt: skip
    """Decode an image of `stored` height and width by `decode` (sample, shrink), and crop it to `box`, top, left,
    height, width in its pixels: see `crop`.

    A JPEG is decoded at a half, quarter or eighth of its size where its box then still has at least twice the pixels a
    side of `out`, so that the antialiased resize decides what is seen. Raises ValueError when the image cannot be
    decoded.
    """
    (top, left, height, width), most = box, min(box[2] / (2 * out.shape[0]), box[3] / (2 * out.shape[1]))
    inside = min(top, left) >= 0 and top + height <= stored[0] and left + width <= stored[1]
    shrink = next((shrink for shrink in SHRINKS if inside and shrink <= most), 1)
    pixels = decode(sample, shrink)
    crop(pixels, box if pixels.shape[:2] == stored else [value / shrink for value in box], flip, out)


def crop(pixels: Pixels, box: Sequence[float], flip: bool, out: Pixels) -> None:
    """Crop an image to a box (top, left, height, width), resize (bicubic, antialiased), flip, write to `out`.

    A box of whole pixels is cut out first, black outside the image, as in torchvision. For a fractional box (a centre
    crop) pixels around it count too, as if the whole image were resized before cropping.
    """
    top, left, height, width = map(float, box)
    right, bottom = left + width, top + height
    whole, target = all(value.is_integer() for value in (top, left, height, width)), torch.from_numpy(out)
    if whole and min(top, left) >= 0 and bottom <= pixels.shape[0] and right <= pixels.shape[1]:
        cut = torch.from_numpy(pixels[int(top) : int(bottom), int(left) : int(right)])
        shown = torch.empty_like(target) if flip else target
        _resize(cut.permute(2, 0, 1)[None], out.shape[:2], False, out=shown.permute(2, 0, 1)[None])
    else:
        if whole:
            pixels = _cut(pixels, int(top), int(left), int(height), int(width))
            left, top, right, bottom = 0, 0, width, height
        inside = max(left, 0), max(top, 0), min(right, pixels.shape[1]), min(bottom, pixels.shape[0])
        shown = torch.from_numpy(resize(pixels, (out.shape[1], out.shape[0]), inside).copy())
    if shown is not target:
        _flip(shown, (1,), out=target) if flip else target.copy_(shown)


def _cut(pixels: Pixels, top: int, left: int, height: int, width: int) -> Pixels:
    """A box of whole pixels, black outside the image."""
    cut = np.zeros((height, width, pixels.shape[2]), dtype=np.uint8)
    inside = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    y, x = max(-top, 0), max(-left, 0)
    cut[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return cut
