"""The table of backbones and `build`, which makes any of them by name; `mae_dist.sizes` has the numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import initialise
from mae_dist.models.mixer import Mixer
from mae_dist.models.vit import ViT
from mae_dist.sizes import SIZES, default_image_size, size_of


def _constructor(name: str) -> partial[Backbone]:
    kind = ViT if name.startswith("vit_") else Mixer
    return partial(kind, image_size=default_image_size(SIZES[name]["patch"]), **SIZES[name])


BACKBONES: dict[str, partial[Backbone]] = {name: _constructor(name) for name in SIZES}
"""Name -> constructor, whose `keywords` are its sizes."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> Backbone:
    """A backbone by name, initialised from `seed` as MAE does; overrides are its constructor's arguments.

    On the meta device it stays empty. Raises ValueError for an unknown name (with the nearest one), impossible sizes,
    or an argument that the model does not have.
    """
    size_of(name)
    try:
        backbone = BACKBONES[name](**overrides)
    except TypeError as error:
        unknown = str(error).split("'")[1]  # of "... got an unexpected keyword argument 'position'"
        raise ValueError(f"model.{unknown}={overrides[unknown]}: {name} has none; leave it out") from error
    initialise(backbone, seed)
    return backbone
