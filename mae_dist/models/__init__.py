"""All backbones by name, and `build`, which makes one; their sizes are in `mae_dist.model_sizes`."""

from functools import partial
from inspect import signature
from typing import Any

from mae_dist.model_sizes import SIZES, default_image_size, size_of
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import initialise
from mae_dist.models.mixer import Mixer
from mae_dist.models.vit import ViT

KINDS: dict[str, type[Backbone]] = {
    "vit": ViT,
    "mixer": Mixer,
}
"""What a model's name begins with, up to the underscore -> its class."""


def _constructor(name: str) -> partial[Backbone]:
    kind = KINDS[name.partition("_")[0]]
    return partial(kind, image_size=default_image_size(SIZES[name]["patch"]), **SIZES[name])


BACKBONES: dict[str, partial[Backbone]] = {name: _constructor(name) for name in SIZES}
"""Model name -> constructor with the sizes of that model as `keywords`."""


def build(name: str, *, seed: int = 0, **overrides: Any) -> Backbone:
    """Make a backbone by name and initialise it from `seed` as MAE does; `overrides` are constructor arguments.

    On the meta device its parameters stay without values. Raises ValueError for an unknown name (with the nearest
    ones), for impossible sizes, and for an argument that the model does not have.
    """
    size_of(name)
    known = signature(BACKBONES[name]).parameters
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(
                f"model.{key}={value}: {name} has no such setting; leave it out (it has {', '.join(known)})"
            )
        pair = key == "image_size" and isinstance(value, tuple) and len(value) == 2
        numbers = value if pair else (value,)
        if key in (*SIZES[name], "image_size", "channels") and not all(isinstance(n, int) and n > 0 for n in numbers):
            what = "pixels a side, or (height, width)" if key == "image_size" else "a whole number, 1 or more"
            raise ValueError(f"model.{key}={value!r}: must be {what}")
    backbone = BACKBONES[name](**overrides)
    initialise(backbone, seed)
    return backbone
