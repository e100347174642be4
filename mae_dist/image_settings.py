"""Checks of the settings of images, in `data` and `view`, that contradict each other. Imports no torch."""

from typing import Any

from mae_dist import hints
from mae_dist.schema import RunConfig


def check(config: RunConfig) -> None:
    """Refuse reversed ranges, statistics of other channels, and augmentations of colours that are none (ValueError).
    data.channels may be unknown yet.
    """
    data, view = config.data, config.view
    for name, (low, high) in (("scale", view.scale), ("ratio", view.ratio)):
        if low > high:
            raise ValueError(f"view.{name}=[{low}, {high}]: the first number must not be greater than the second")
    for name, value in (("mean", data.mean), ("std", data.std)):
        if value is not None and len(value) != (data.channels or len(value)):
            raise ValueError(f"{hints.given(f'data.{name}', value)}: must have data.channels={data.channels} numbers")
    for name, value in (("color_jitter", view.color_jitter), ("randaugment", view.randaugment)):
        if value and data.channels not in (None, 3):
            raise ValueError(f"view.{name}={value}: is for 3 channels, not data.channels={data.channels}; leave it out")
    policy = view.randaugment
    if view.color_jitter and policy is not None and "3a" not in policy:
        raise ValueError(
            f"view.color_jitter={view.color_jitter:g}: is not applied beside view.randaugment={policy}, whose "
            f"operations change colours too; leave one of them out, or take a 3a policy (rand-m9-t3a)"
        )


def wrong_size(name: str, value: Any) -> str:
    """What is wrong with a value of model.image_size that is neither a number nor two; empty if nothing is."""
    sides = hints.parts(value)
    if name != "model.image_size" or (len(sides) == 1 + isinstance(value, list) and {*map(type, sides)} == {int}):
        return ""
    return f"{hints.given(name, value)}: must be the side of a square, or [height, width], for example [96, 160]"
