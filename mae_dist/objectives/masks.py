"""Masks: which patches of each sample are hidden, as pure functions of (seed, epoch, id).

A mask is two lists of patch positions; there are no boolean masks, so nobody must remember what True means. All three
kinds of mask are one stable sort of integers per sample, so every device gives identical lists.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mae_dist import rng

NUM_BLOCKS = 32
"""Rectangles drawn for a block mask: enough to cover what is to be hidden."""
SMALLEST_BLOCK = 16 / 196
"""Area of the smallest rectangle, as a share of the grid (BEiT: 16 patches of 14 x 14)."""
LONGEST_BLOCK = 0.3
"""Smallest aspect ratio of a rectangle (BEiT)."""


class Mask(NamedTuple):
    """Positions of each sample's visible and masked patches; together the two lists hold every patch once.

    `masked` is in random order, so its first k entries are a random subset.
    """

    visible: Int[Tensor, "b v"]
    masked: Int[Tensor, "b m"]


def draw(
    kind: str, seed: int, epochs: Int[Tensor, " b"], ids: Int[Tensor, " b"], grid: tuple[int, int], num_visible: int
) -> Mask:
    """Draw the masks of samples. ``kind`` is "random", "block" or "grid" (He et al. 2022, figure 6)."""
    num = grid[0] * grid[1]
    if kind == "random":
        order = torch.argsort(rng.bits(seed, rng.Purpose.MASK, epochs, ids, num), dim=1, stable=True)
        return Mask(order[:, :num_visible], order[:, num_visible:])
    # `words` decides which patches of the last rectangle are hidden, so it cannot decide their order as well
    words, others = rng.bits(seed, rng.Purpose.MASK, epochs, ids, 2 * num).split(num, 1)
    if kind == "block":
        late = block_ranks(seed, epochs, ids, grid, num - num_visible)
    else:
        late = in_phase(seed, epochs, ids, grid).logical_not().long()
    order = torch.argsort(words + (late << 32), dim=1, stable=True)
    visible, masked = order[:, :num_visible], order[:, num_visible:]
    return Mask(visible, masked.gather(1, torch.argsort(others.gather(1, masked), dim=1, stable=True)))


def block_ranks(
    seed: int, epochs: Int[Tensor, " b"], ids: Int[Tensor, " b"], grid: tuple[int, int], num_hidden: int
) -> Int[Tensor, "b n"]:
    """NUM_BLOCKS - i for patches that the i-th rectangle is the first to cover, 0 for those that none covers.

    Hiding the `num_hidden` patches of largest rank is block-wise masking (BEiT, Bao et al. 2022, algorithm 1) with an
    exact count: whole rectangles one after another, and part of the last one. All rectangles are drawn at once, so the
    number of operations does not depend on the draws. As in BEiT, rectangles lie within the grid, so corners are hidden
    seldom (18 % of the time on a grid of 14 x 14 with three quarters hidden) and the centre nearly always (98 %).
    """
    rows, columns = grid
    draws = rng.bits(seed, rng.Purpose.BLOCKS, epochs, ids, 4 * NUM_BLOCKS).double() / 2.0**32
    area, aspect, top, left = draws.view(len(ids), 4, NUM_BLOCKS).unbind(1)
    smallest = min(max(1.0, SMALLEST_BLOCK * rows * columns), num_hidden)
    area = smallest + area * (num_hidden - smallest)
    aspect = (math.log(LONGEST_BLOCK) * (2 * aspect - 1)).exp()
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
    y = _within(torch.arange(rows, device=ids.device), top, height)
    x = _within(torch.arange(columns, device=ids.device), left, width)
    covered = (y[:, :, :, None] & x[:, :, None, :]).flatten(2)
    rank = NUM_BLOCKS - torch.arange(NUM_BLOCKS, device=ids.device)
    return (covered * rank[:, None]).amax(1)


def _within(
    places: Int[Tensor, " n"], start: Float[Tensor, "b blocks"], length: Float[Tensor, "b blocks"]
) -> Bool[Tensor, "b blocks n"]:
    return (places >= start[..., None]) & (places < (start + length)[..., None])


def in_phase(
    seed: int, epochs: Int[Tensor, " b"], ids: Int[Tensor, " b"], grid: tuple[int, int]
) -> Bool[Tensor, "b n"]:
    """Mark one patch of every 2 x 2: one of the four corners per image, drawn for each image."""
    phase = rng.bits(seed, rng.Purpose.BLOCKS, epochs, ids, 1) & 3
    y, x = torch.meshgrid(*(torch.arange(side, device=ids.device) for side in grid), indexing="ij")
    return (2 * (y % 2) + x % 2).flatten() == phase
