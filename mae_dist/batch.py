"""Batch: the only type that data and models share."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet's training images in 0..1 (RGB), the usual normalisation of `Batch.images`."""


class Batch(NamedTuple):
    """Samples of one micro-batch, on one device.

    ``ids`` and ``epochs`` determine the random draws of a sample (see `rng`) on any rank. ``labels`` is -1 where a
    sample has none. ``bad`` marks unreadable samples that another sample of their shard replaces.
    """

    images: Float[Tensor, "b ..."]  # normalised, (b, c, h, w); or features in their place, (b, d)
    labels: Int[Tensor, " b"]
    ids: Int[Tensor, " b"]
    epochs: Int[Tensor, " b"]
    bad: Bool[Tensor, " b"]

    @property
    def size(self) -> int:
        """Number of samples. (`len` is the number of fields, on which torch relies when it moves named tuples.)"""
        return self.ids.shape[0]

    def split(self, size: int) -> list[Batch]:
        """Split into batches of at most `size` samples."""
        return [Batch(*parts) for parts in zip(*(part.split(size) for part in self), strict=True)]
