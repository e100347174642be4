"""What packing sums over pictures: counts, bytes, sizes, labels and the moments of all pixels. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image

from mae_dist.data.pixels import DEEP
from mae_dist.printed import counted

DARK = 64
"""8-bit value below which all images together are so dark that their 16-bit values may have another range."""
NO_SIZE = (2**31, 2**31)
"""A size that every picture's is smaller than."""
Sums = tuple[int, ...]


@dataclass(frozen=True)
class Tally:
    """Sums over pictures. ``a + b`` is the tally of both; all are integers, so the order of a sum changes nothing.

    ``bad`` counts pictures that are left out, by reason; they count nowhere else. ``kinds`` counts stored files by
    extension. ``source_bytes`` and ``stored_bytes`` are those of the image files before and after; ``num_resized`` and
    ``num_encoded`` count the pictures whose pixels were resized and whose files were written anew. ``top_label`` is the
    largest label (-1: none); ``smallest`` and ``largest`` are (height, width), each extent by itself. ``num_pixels``,
    and per channel ``sums`` and ``squares`` (of 0..255), give mean and standard deviation. ``changes`` are pairs of
    what decoding changed (`decode.changes`) and in how many pictures, sorted; ``top_value`` is the largest 8-bit value.
    """

    bad: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    source_bytes: int = 0
    stored_bytes: int = 0
    num_resized: int = 0
    num_encoded: int = 0
    top_label: int = -1
    smallest: tuple[int, int] = NO_SIZE
    largest: tuple[int, int] = (0, 0)
    num_pixels: int = 0
    sums: Sums = ()
    squares: Sums = ()
    changes: tuple[tuple[str, int], ...] = ()
    top_value: int = 0

    def __add__(self, other: Tally) -> Tally:
        counts = ("source_bytes", "stored_bytes", "num_resized", "num_encoded", "num_pixels")
        return Tally(
            **{name: getattr(self, name) + getattr(other, name) for name in counts},
            bad=dict(Counter(self.bad) + Counter(other.bad)),
            kinds=dict(Counter(self.kinds) + Counter(other.kinds)),
            top_label=max(self.top_label, other.top_label),
            smallest=_each(min, self.smallest, other.smallest),
            largest=_each(max, self.largest, other.largest),
            sums=_plus(self.sums, other.sums),
            squares=_plus(self.squares, other.squares),
            changes=tuple(sorted((Counter(dict(self.changes)) + Counter(dict(other.changes))).items())),
            top_value=max(self.top_value, other.top_value),
        )

    @staticmethod
    def of(pixels: np.ndarray, label: int, changes: Sequence[str] = (), **counts: Any) -> Tally:
        """The tally of one picture with these pixels, uint8 (height, width, channels), the changes that decoding made,
        and these other counts.
        """
        size = pixels.shape[:2]
        planes = [pixels] if pixels.shape[2] == 3 else list(np.moveaxis(pixels, 2, 0))
        counted = [Image.fromarray(np.ascontiguousarray(plane)).histogram() for plane in planes]
        histogram, values = np.reshape(counted, (-1, 256)), np.arange(256)
        sums, squares = (tuple((histogram @ powers).tolist()) for powers in (values, values**2))
        return Tally(
            **counts, top_label=label, smallest=size, largest=size, num_pixels=size[0] * size[1],
            sums=sums, squares=squares, changes=tuple((what, 1) for what in changes),
            top_value=int(np.flatnonzero(histogram.sum(0))[-1]),
        )  # fmt: skip

    def remarks(self) -> Iterator[str]:
        """What decoding changes in pictures, a sentence each, and 16-bit values that use little of their range."""
        yield from (f"{counted(count, 'image')}: {what}" for what, count in self.changes)
        if DEEP in dict(self.changes) and self.top_value < DARK:
            top = 256 * self.top_value + 255
            yield f"no 16-bit value exceeds {top} of 65535; try data.white (data pack: --white) with the largest"

    @property
    def num_bad(self) -> int:
        """Number of pictures that are left out."""
        return sum(self.bad.values())

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) if all pictures have one size, else None."""
        return self.largest if self.smallest == self.largest else None

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Mean of each channel over all pixels, in 0..1; None without pixels."""
        n = self.num_pixels
        return _each(lambda total: total / n / 255, self.sums) if n else None

    @property
    def std(self) -> tuple[float, ...] | None:
        """Standard deviation of each channel over all pixels, in 0..1; None without pixels."""
        n = self.num_pixels
        return _each(lambda s, q: (n * q - s**2) ** 0.5 / n / 255, self.sums, self.squares) if n else None

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Tally:
        """The tally of which this is `asdict`, after a way through JSON."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in plain.items()}
        values["changes"] = tuple((what, count) for what, count in values["changes"])
        return Tally(**values)


def _plus(one: Sums, other: Sums) -> Sums:
    """Channel by channel; without pictures there are no channels yet."""
    return tuple(map(sum, zip_longest(one, other, fillvalue=0)))


def _each(function: Any, *rows: Any) -> Any:
    return tuple(function(*values) for values in zip(*rows, strict=True))
