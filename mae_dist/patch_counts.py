"""How many patches of an image masked autoencoding encodes and predicts, and which settings make that impossible.

Imports no torch.
"""

from typing import NamedTuple

from mae_dist.schema import MaeConfig


class PatchCounts(NamedTuple):
    """Patches of an image that the encoder sees, and of the others those that the decoder predicts."""

    visible: int
    predicted: int


def patch_counts(mae: MaeConfig, grid: tuple[int, int]) -> PatchCounts:
    """The counts on a grid of (rows, columns) patches. Raises ValueError for settings that are impossible together or
    on this grid.
    """
    num = grid[0] * grid[1]
    visible = num_visible(mae.masking, grid, mae.mask_ratio)
    predicted = round((num - visible) * mae.predict)
    whole, cross = mae.hidden == "token", mae.decoder == "cross"
    if not predicted:
        raise ValueError(f"mae.predict={mae.predict}: leaves no patch to predict")
    if mae.decoder_depth == 0 and (cross or not whole):
        raise ValueError("mae.decoder_depth=0: only mae.hidden=token with mae.decoder=full needs no block")
    if whole and not cross and mae.predict < 1:
        raise ValueError(f"mae.predict={mae.predict}: mae.hidden=token has all patches in its decoder already")
    return PatchCounts(visible, predicted)


def num_visible(masking: str, grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of visible patches of every image, for a mask of the kind `masking` on a grid of (rows, columns) patches.

    Raises ValueError when it would be none or all, or when a grid mask does not fit the grid or the ratio.
    """
    num = grid[0] * grid[1]
    visible = int(num * (1 - mask_ratio))
    if not 0 < visible < num:
        raise ValueError(f"mae.mask_ratio={mask_ratio}: of {num} patches some must be hidden and some visible")
    if masking == "grid":
        needs = [f"mae.mask_ratio must be 0.75 (not {mask_ratio})"] if mask_ratio != 0.75 else []
        if grid[0] % 2 or grid[1] % 2:
            needs.append(f"the grid must be even (not {grid[0]} x {grid[1]}; try another model.image_size)")
        if needs:
            raise ValueError(f"mae.masking=grid: shows one patch of every 2 x 2, so {' and '.join(needs)}")
    return visible
