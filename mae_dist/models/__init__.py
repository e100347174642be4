"""The table of backbones and `build`, which makes any of them by name. A new model is one file and one line here."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import initialise
from mae_dist.models.mixer import Mixer
from mae_dist.models.vit import ViT

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
MIXERS = ("ti4", "s4", "s16", "s32", "b16", "b32", "l16")


def image_size(patch: int) -> int:
    """Pixels a side that a patch size is for, unless told otherwise: CIFAR's or ImageNet's."""
    return 32 if patch <= 4 else 224


def _vit(size: str, patch: int) -> partial[Backbone]:
    return partial(ViT, patch=patch, image_size=image_size(patch), **VIT_SIZES[size])


def _mixer(size: str, patch: int) -> partial[Backbone]:
    return partial(Mixer, patch=patch, image_size=image_size(patch), **MIXER_SIZES[size])


BACKBONES: dict[str, partial[Backbone]] = {
    **{f"vit_{size}{patch}": _vit(size, patch) for size in VIT_SIZES for patch in VIT_PATCHES},
    **{f"mixer_{name}": _mixer(name.rstrip("0123456789"), int(name.lstrip("tisbl"))) for name in MIXERS},
    "vit_demo4": partial(ViT, patch=4, dim=128, depth=4, num_heads=4, image_size=32),
    "mixer_demo4": partial(Mixer, patch=4, dim=128, depth=4, token_hidden=64, channel_hidden=512, image_size=32),
}
"""Name -> constructor, whose `keywords` are its sizes."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> Backbone:
    """A backbone by name, initialised from `seed` as MAE does; overrides are its constructor's arguments.

    On the meta device it stays empty. Raises ValueError for an unknown name (with the nearest one), impossible sizes,
    or an argument that the model does not have.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {near[0]}?" if near else "`mae-dist models` lists them"
        raise ValueError(f"model.name={name}: no such model; {hint}")
    try:
        backbone = BACKBONES[name](**overrides)
    except TypeError as error:
        unknown = str(error).split("'")[1]  # of "... got an unexpected keyword argument 'position'"
        raise ValueError(f"model.{unknown}={overrides[unknown]}: {name} has none; leave it out") from error
    initialise(backbone, seed)
    return backbone
