"""The table of backbones and `build`, which makes any of them by name. A new model is one file and one line here."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from mae_dist.models.layers import initialise
from mae_dist.models.vit import ViT

BACKBONES = {
    "vit_ti4": partial(ViT, patch=4, dim=192, depth=12, num_heads=3, image_size=32),
    "vit_s4": partial(ViT, patch=4, dim=384, depth=12, num_heads=6, image_size=32),
    "vit_ti16": partial(ViT, patch=16, dim=192, depth=12, num_heads=3, image_size=224),
    "vit_s16": partial(ViT, patch=16, dim=384, depth=12, num_heads=6, image_size=224),
    "vit_b16": partial(ViT, patch=16, dim=768, depth=12, num_heads=12, image_size=224),
    "vit_l16": partial(ViT, patch=16, dim=1024, depth=24, num_heads=16, image_size=224),
    "vit_h14": partial(ViT, patch=14, dim=1280, depth=32, num_heads=16, image_size=224),
    "vit_demo4": partial(ViT, patch=4, dim=128, depth=4, num_heads=4, image_size=32),
}
"""Name -> constructor. Sizes: Dosovitskiy et al. 2021, table 1; Ti and S: Touvron et al. 2021, table 1."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> ViT:
    """A backbone by name, initialised from `seed` as MAE does; overrides are its constructor's arguments.

    On the meta device it stays empty. Raises ValueError for an unknown name (with the nearest one) or impossible sizes.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(BACKBONES)}"
        raise ValueError(f"model.name={name}: no such model; {hint}")
    backbone = BACKBONES[name](**overrides)
    initialise(backbone, seed)
    return backbone
