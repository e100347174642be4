"""Masks: exact counts, functions of the sample, with the distributions of the papers."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from mae_dist import models
from mae_dist.objectives import masks
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.masks import Mask
from mae_dist.patch_counts import num_visible
from mae_dist.schema import MaeConfig

KINDS = ["random", "block", "grid"]


def random_mask(seed: int, epochs: Tensor, ids: Tensor, grid: tuple[int, int], num_visible: int) -> Mask:
    return masks.draw("random", seed, epochs, ids, grid, num_visible)


def ids_of(num: int, epoch: int) -> tuple[Tensor, Tensor]:
    return torch.full((num,), epoch), torch.arange(num)


def hidden(mask: Mask, grid: tuple[int, int]) -> Tensor:
    """(sample, row, column): 1 where a patch is hidden."""
    flat = torch.zeros(len(mask.masked), grid[0] * grid[1]).scatter(1, mask.masked, 1.0)
    return flat.view(-1, *grid)


def share_of_like_neighbours(hidden: Tensor) -> float:
    """Of all pairs of patches side by side, those of which both or none is hidden."""
    pairs = [hidden[:, 1:] == hidden[:, :-1], hidden[:, :, 1:] == hidden[:, :, :-1]]
    return torch.cat([pair.flatten() for pair in pairs]).float().mean().item()


def test_mask_visible_and_masked_together_are_all_patches() -> None:
    mask = random_mask(0, *ids_of(50, 0), (14, 14), 49)
    assert mask.visible.shape == (50, 49)
    assert mask.masked.shape == (50, 147)
    both = torch.cat([mask.visible, mask.masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(196).expand(50, -1))


def test_mask_is_a_function_of_sample_epoch_and_seed() -> None:
    masks = [random_mask(seed, *ids_of(30, epoch), (8, 8), 16).visible for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    rows = {tuple(row) for mask in masks for row in mask.tolist()}
    assert len(rows) == 90
    epochs, ids = ids_of(30, 1)
    again = random_mask(0, epochs[7:9], ids[7:9], (8, 8), 16).visible
    assert torch.equal(again, masks[1][7:9])


def test_mask_random_shows_every_patch_equally_often() -> None:
    visible = random_mask(0, *ids_of(4000, 0), (4, 4), 4).visible
    counts = visible.flatten().bincount(minlength=16)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 6)])
def test_mask_counts_are_exact(kind: str, grid: tuple[int, int]) -> None:
    num = grid[0] * grid[1]
    mask = masks.draw(kind, 0, *ids_of(200, 3), grid, num // 4)
    assert mask.visible.shape == (200, num // 4)
    both = torch.cat([mask.visible, mask.masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(num).expand(200, -1))


@pytest.mark.parametrize("num_visible", [1, 20, 100, 195])
def test_mask_block_hides_the_exact_number(num_visible: int) -> None:
    mask = masks.draw("block", 0, *ids_of(100, 0), (14, 14), num_visible)
    assert torch.equal(hidden(mask, (14, 14)).sum((1, 2)), torch.full((100,), 196.0 - num_visible))


@pytest.mark.parametrize("kind", KINDS)
def test_mask_of_every_kind_is_a_function_of_the_sample(kind: str) -> None:
    """A slice of a batch gives a slice of the masks; other samples, epochs and seeds give others."""
    epochs, ids = ids_of(60, 1)
    whole = masks.draw(kind, 0, epochs, ids, (8, 8), 16)
    order = torch.tensor([41, 7, 58])
    part = masks.draw(kind, 0, epochs[order], ids[order], (8, 8), 16)
    assert torch.equal(part.visible, whole.visible[order])
    assert torch.equal(part.masked, whole.masked[order])
    mixed = masks.draw(kind, 0, torch.tensor([0, 1]), torch.tensor([5, 5]), (8, 8), 16)
    assert torch.equal(mixed.masked[1], whole.masked[5])
    others = [whole, masks.draw(kind, 0, epochs + 1, ids, (8, 8), 16), masks.draw(kind, 1, epochs, ids, (8, 8), 16)]
    assert len({tuple(row) for mask in others for row in mask.masked.tolist()}) == 180


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(14, 14), (8, 8)])
def test_mask_masked_starts_with_a_random_subset(kind: str, grid: tuple[int, int]) -> None:
    """Every hidden patch is in the first quarter of the list in a quarter of the images in which it is hidden."""
    num = grid[0] * grid[1]
    mask = masks.draw(kind, 0, *ids_of(4000, 0), grid, num // 4)
    quarter = num * 3 // 4 // 4
    first = hidden(Mask(mask.visible, mask.masked[:, :quarter]), grid).sum(0)
    times, share = hidden(mask, grid).sum(0), quarter / mask.masked.shape[1]
    assert ((first - times * share).abs() < 5 * (times * share * (1 - share)).sqrt()).all()


def beit_blocks(generator: random.Random, rows: int, columns: int, num_hidden: int) -> Tensor:
    """Bao et al. 2022, algorithm 1, read plainly: rectangles of random area and shape while there is something to hide
    and each hides no more than is left. It may end before it has hidden `num_hidden`.
    """
    mask, left = torch.zeros(rows, columns), num_hidden
    for _ in range(200):
        area, aspect = generator.uniform(16, left), math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if height >= rows or width >= columns:
            continue
        top, start = generator.randint(0, rows - height), generator.randint(0, columns - width)
        block = mask[top : top + height, start : start + width]
        new = block.numel() - int(block.sum())
        if new <= left:
            block.fill_(1.0)
            left -= new
    return mask


def test_mask_block_equals_beit() -> None:
    """They are as contiguous, and corners and centre are hidden about as often: 0.14 and 0.99 of the time by BEiT's
    loop at three quarters of 14 x 14, where `draw` alone is exact in number.
    """
    grid = (14, 14)
    ours = hidden(masks.draw("block", 0, *ids_of(1500, 0), grid, 49), grid)
    generator = random.Random(0)
    beits = torch.stack([beit_blocks(generator, *grid, 147) for _ in range(500)])
    assert beits.sum((1, 2)).mean() > 145
    assert share_of_like_neighbours(ours) == pytest.approx(share_of_like_neighbours(beits), abs=0.03)
    scattered = hidden(masks.draw("random", 0, *ids_of(1500, 0), grid, 49), grid)
    unlike, unlike_scattered = (1 - share_of_like_neighbours(kind) for kind in (ours, scattered))
    assert unlike < unlike_scattered / 3
    gap = (ours.mean(0) - beits.mean(0)).abs()
    assert gap.mean() < 0.05
    assert gap.max() < 0.15
    assert ours.mean(0).min() > 0.1
    assert ours.mean(0).max() < 1.0
    assert (ours.mean(0) - ours.mean(0).flip(0, 1)).abs().max() < 0.06  # neither side is preferred
    assert (ours.mean(0) - ours.mean(0).T).abs().max() < 0.06


def test_mask_grid_shows_one_patch_of_every_four() -> None:
    """Of each 2 x 2 the same one all over an image, and each of the four in a quarter of the images."""
    seen = 1 - hidden(masks.draw("grid", 0, *ids_of(2000, 0), (4, 6), 6), (4, 6))
    squares = seen.view(2000, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).reshape(2000, 6, 4)
    assert (squares.sum(2) == 1).all()
    assert (squares == squares[:, :1]).all()
    assert (squares[:, 0].sum(0) - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            MaeConfig(masking="grid", mask_ratio=0.5),
            r"mae\.masking=grid: .* mae\.mask_ratio must be 0\.75 \(not 0\.5\)",
        ),
        (MaeConfig(mask_ratio=0.999), r"mae\.mask_ratio=0\.999: of 64 patches some must be hidden and some visible"),
        (MaeConfig(predict=0.001), r"mae\.predict=0\.001: leaves no patch to predict"),
        (
            MaeConfig(decoder_depth=0),
            r"mae\.decoder_depth=0: only mae\.hidden=token with mae\.decoder=full needs no block",
        ),
        (MaeConfig(hidden="token", decoder="cross", decoder_depth=0), r"mae\.decoder_depth=0: only mae\.hidden=token"),
        (
            MaeConfig(hidden="token", predict=0.5),
            r"mae\.predict=0\.5: mae\.hidden=token has all patches in its decoder",
        ),
    ],
)
def test_mask_impossible_settings_are_refused_in_a_sentence(settings: MaeConfig, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        MAE(models.build("vit_ti4"), settings, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grid", "ratio", "wrong"),
    [
        ((8, 8), 0.6, "mae.mask_ratio must be 0.75 (not 0.6)"),
        ((7, 8), 0.75, "the grid must be even (not 7 x 8; try another model.image_size)"),
        ((7, 7), 0.6, "mae.mask_ratio must be 0.75 (not 0.6) and the grid must be even (not 7 x 7; "
         "try another model.image_size)"),
    ],
)  # fmt: skip
def test_mask_grid_error_names_only_what_is_wrong(grid: tuple[int, int], ratio: float, wrong: str) -> None:
    message = f"mae.masking=grid: shows one patch of every 2 x 2, so {wrong}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        num_visible("grid", grid, ratio)
