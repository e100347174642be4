"""What files, and the command line, say of a model beside its tensors: taken only where it is what it must be."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any

Channels = tuple[float, float, float]
LARGEST = 1e30
"""Of numbers that float32 can reckon with."""


def is_number(value: Any, above: float = -LARGEST, below: float = LARGEST) -> bool:
    """Whether this is a number between two others; what is not finite lies between none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below


def is_count(value: Any) -> bool:
    """Whether this is a whole number from 1 on."""
    return isinstance(value, int) and is_number(value, 0)


def are_channels(value: Any) -> bool:
    """Whether these are three numbers from 0 to 1."""
    return isinstance(value, list | tuple) and len(value) == 3 and all(is_number(n) and 0 <= n <= 1 for n in value)


OF_BYTES = " (those of pixels from 0 to 255: divide by 255)"
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "mean": (f"three numbers from 0 to 1{OF_BYTES}", are_channels),
    "std": (f"three numbers greater than 0 and up to 1{OF_BYTES}", lambda value: are_channels(value) and all(value)),
    "norm_pix": ("true or false", lambda value: isinstance(value, bool)),
    "decoder_heads": ("a whole number from 1 on", is_count),
    "num_heads": ("a whole number from 1 on", is_count),
    "mask_ratio": ("a number between 0 and 1", lambda value: is_number(value, 0, 1)),
    "eps": ("a number greater than 0", lambda value: is_number(value, 0)),
}
"""What is said -> what it must be, in words and as a test."""


def checked(name: str, value: Any, field: str, hint: str = "") -> Any:
    """What is said of `name`, in our types. ValueError, naming the `field`, where it is not what it must be."""
    needed, holds = RULES[name]
    if not holds(value):
        raise ValueError(f"{field}={brief(value)}: must be {needed}{hint}")
    return tuple(value) if isinstance(value, list) else value


def brief(value: Any) -> str:
    """Any value in one short line."""
    return shorten(repr(value), 60, placeholder=" ...")
