"""Checks of metadata: what checkpoint files, and the command line, record of a model beside its tensors."""

from collections.abc import Callable
from textwrap import shorten
from typing import Any

from mae_dist.printed import escaped

Channels = tuple[float, ...]
MAX_NUMBER = 1e30
"""Limit of accepted numbers, so that float32 can compute with them."""
LISTED = 3
"""Names that a message lists."""


def is_number(value: Any, above: float = -MAX_NUMBER, below: float = MAX_NUMBER) -> bool:
    """Whether `value` is a finite number strictly between two others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1 on."""
    return isinstance(value, int) and is_number(value, 0)


def are_channels(value: Any) -> bool:
    """Whether `value` is a list or tuple of numbers from 0 to 1, one or more."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(is_number(n) and 0 <= n <= 1 for n in value)


def is_size(value: Any) -> bool:
    """Whether `value` is a size of images: the side of a square, or a list or tuple of height and width."""
    return is_count(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value)))


def class_names(value: Any) -> tuple[str, ...]:
    """The names of classes that a file records as a list, or by number as texts; () where it records none."""
    if isinstance(value, dict):
        value = [value.get(str(number)) for number in range(len(value))]
    plain = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not plain or all(name == f"LABEL_{number}" for number, name in enumerate(value)):
        return ()
    return tuple(value)


FROM_BYTES = " (if they are for pixels from 0 to 255, divide by 255)"
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "mean": (f"a number from 0 to 1 for each channel{FROM_BYTES}", are_channels),
    "std": (
        f"a number greater than 0 and up to 1 for each channel{FROM_BYTES}",
        lambda value: are_channels(value) and all(value),
    ),
    "image_size": ("the side of a square, or height and width", is_size),
    "test_crop": ("a number above 0, up to 1", lambda value: is_number(value, 0) and value <= 1),
    "norm_pix": ("true or false", lambda value: isinstance(value, bool)),
    "decoder_heads": ("a whole number from 1 on", is_count),
    "num_heads": ("a whole number from 1 on", is_count),
    "mask_ratio": ("a number between 0 and 1", lambda value: is_number(value, 0, 1)),
    "eps": ("a number greater than 0", lambda value: is_number(value, 0)),
}
"""Name of a value -> what it must be, as text for error messages and as a test."""


def checked(name: str, value: Any, field: str, hint: str = "") -> Any:
    """Return `value` (a list as a tuple) if it passes the rule of `name`; else raise ValueError naming `field`."""
    requirement, passes = RULES[name]
    if not passes(value):
        raise ValueError(f"{field}={brief(value)}: must be {requirement}{hint}")
    return tuple(value) if isinstance(value, list) else value


def brief(value: Any) -> str:
    """Format any value as one short line."""
    return shorten(repr(value), 60, placeholder=" ...")


def listed(names: list[str]) -> str:
    """The first names of a list, escaped and cut, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED + 1 else ""
    return ", ".join(escaped(name[:80]) for name in names[: LISTED if more else None]) + more


def format_channels(values: Channels) -> str:
    """Format numbers as on a command line."""
    return " ".join(f"{value:g}" for value in values)
