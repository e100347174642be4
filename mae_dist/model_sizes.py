"""Sizes of all models by name, from the papers, and their number of parameters.

Imports no torch, so that a launcher can compute the size of a checkpoint.
"""

import difflib
import math
import re

VIT_SIZES = {
    "ti": {"dim": 192, "depth": 12, "num_heads": 3},
    "s": {"dim": 384, "depth": 12, "num_heads": 6},
    "b": {"dim": 768, "depth": 12, "num_heads": 12},
    "l": {"dim": 1024, "depth": 24, "num_heads": 16},
    "h": {"dim": 1280, "depth": 32, "num_heads": 16},
}
"""B, L, H: Dosovitskiy et al. 2021, table 1; Ti and S: Touvron et al. 2021, table 1."""
VIT_PATCHES = (2, 4, 8, 14, 16, 32)

MIXER_SIZES = {
    "ti": {"dim": 192, "depth": 12, "token_hidden": 96, "channel_hidden": 768},
    "s": {"dim": 512, "depth": 8, "token_hidden": 256, "channel_hidden": 2048},
    "b": {"dim": 768, "depth": 12, "token_hidden": 384, "channel_hidden": 3072},
    "l": {"dim": 1024, "depth": 24, "token_hidden": 512, "channel_hidden": 4096},
}
"""Tolstikhin et al. 2021, table 1; Ti has ViT-Ti's width and depth and the paper's proportions."""
MIXERS = ("ti4", "s2", "s4", "s16", "s32", "b16", "b32", "l16")

SIZES: dict[str, dict[str, int]] = {
    **{f"vit_{size}{patch}": {"patch": patch, **VIT_SIZES[size]} for size in VIT_SIZES for patch in VIT_PATCHES},
    **{
        f"mixer_{name}": {"patch": int(name.lstrip("tisbl")), **MIXER_SIZES[name.rstrip("0123456789")]}
        for name in MIXERS
    },
    "vit_demo4": {"patch": 4, "dim": 128, "depth": 4, "num_heads": 4},
    "vit_demo2": {"patch": 2, "dim": 128, "depth": 4, "num_heads": 4},
    "mixer_demo4": {"patch": 4, "dim": 128, "depth": 4, "token_hidden": 64, "channel_hidden": 512},
}
"""Model name -> arguments of its constructor."""


def size_of(name: str) -> dict[str, int]:
    """The sizes of a model. Raises ValueError, with the nearest names, for a model that does not exist."""
    if not isinstance(name, str):
        raise ValueError(f"model.name={name!r}: must be a name, vit_b16 for example; `mae-dist models` lists them")
    if name not in SIZES:
        near = _near(name)
        meant = f"did you mean {'one of ' if len(near) > 1 else ''}{', '.join(near)}?"
        raise ValueError(f"model.name={name}: no such model; {meant if near else '`mae-dist models` lists them'}")
    return SIZES[name]


def _near(name: str) -> list[str]:
    """Models that a wrong name, for example timm's, may mean: those of its size, and of its patch if it has one."""
    plain = re.sub(r"[\W_]", "", name.lower())
    families = {_family(known) for known in SIZES if plain.startswith(_family(known))}
    families |= set() if families else {_family(known) for known in difflib.get_close_matches(name, SIZES, n=1)}
    near = [known for known in SIZES if _family(known) in families]
    return [known for known in near if str(SIZES[known]["patch"]) in re.findall(r"\d+", name)] or near


def _family(name: str) -> str:
    return name.replace("_", "").rstrip("0123456789")


def default_image_size(patch: int) -> int:
    """Default image size of a patch size, in pixels a side: CIFAR's 32 up to patch 4, else ImageNet's 224."""
    return 32 if patch <= 4 else 224


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size, which is one side of a square or that pair."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def grid_of(image_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """(rows, columns) of patches. Raises ValueError when a side of the image is no multiple of the patch size."""
    for side in sides(image_size):
        if side % patch or side < patch:
            below, above = side // patch * patch, -(-side // patch) * patch
            near = f"{below} or {above}" if below > 0 else f"{max(above, patch)}"
            raise ValueError(f"model.image_size={side}: not divisible by the patch size {patch}; try {near}")
    rows, columns = (side // patch for side in sides(image_size))
    return rows, columns


def num_parameters(name: str, image_size: int | tuple[int, int], channels: int = 3) -> int:
    """Number of parameters of a backbone, with fixed ones (ViT: class token, one last norm)."""
    size = size_of(name)
    patch, dim = size["patch"], size["dim"]
    tokens = math.prod(grid_of(image_size, patch))
    embedding = channels * patch**2 * dim + dim
    if "token_hidden" in size:
        block = block_parameters(dim, tokens, size["token_hidden"], size["channel_hidden"])
        return embedding + size["depth"] * block + 2 * dim
    return embedding + dim + (tokens + 1) * dim + size["depth"] * block_parameters(dim) + 2 * dim


def block_parameters(dim: int, tokens: int = 0, token_hidden: int = 0, channel_hidden: int = 0) -> int:
    """Number of parameters of a Mixer's block, or, without `token_hidden`, of a ViT's: queries, keys, values and
    projection, an MLP of four times the width, two norms.
    """
    if not token_hidden:
        return 12 * dim**2 + 13 * dim
    mixing = 2 * tokens * token_hidden + token_hidden + tokens
    return mixing + 2 * dim * channel_hidden + channel_hidden + dim + 4 * dim
