"""What a setting is: a field of a dataclass with its default, its meaning, its range and the verbs that read it.

The settings themselves are in `schema`. Imports no torch.
"""

import operator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

BOUNDS = {
    "above": (operator.gt, ">", "greater than"), "at_least": (operator.ge, ">=", "at least"),
    "at_most": (operator.le, "<=", "at most"), "below": (operator.lt, "<", "less than"),
}  # fmt: skip
"""The bounds that a range can have: comparison, symbol, English."""

LARGEST = 2**53
"""The largest number of a setting, NaN and infinity not being numbers: floats hold all whole ones up to it."""


@dataclass(frozen=True)
class Range:
    """The finite numbers that a setting allows: a bound is the pair (key of BOUNDS, number)."""

    bounds: tuple[tuple[str, float], ...] = ()

    def __contains__(self, number: float) -> bool:
        return abs(number) <= LARGEST and all(BOUNDS[key][0](number, bound) for key, bound in self.bounds)

    def __str__(self) -> str:
        return (
            " and ".join(f"{BOUNDS[key][2]} {bound}" for key, bound in self.bounds)
            or f"at most {LARGEST:.0e} and finite"
        )

    @property
    def symbols(self) -> str:
        """The range as `> 0, <= 1`; empty when it has no bounds."""
        return ", ".join(f"{BOUNDS[key][1]} {bound}" for key, bound in self.bounds)


def setting(default: T, text: str, verbs: tuple[str, ...] = (), unless: tuple[str, ...] = (), **bounds: float) -> T:
    """A field with its default, its meaning for `--help`, and the `bounds` (keys of BOUNDS) of its numbers.

    It is read by the verbs whose schema has its section: by `verbs` only, if given, and not by those in `unless`.
    """
    assert bounds.keys() <= BOUNDS.keys()
    limits = Range(tuple(bounds.items()))
    return field(default=default, metadata={"help": text, "range": limits, "verbs": verbs, "unless": unless})


def section(kind: type[T], **changes: Any) -> T:
    """A section whose defaults differ for one verb."""
    return field(default_factory=lambda: kind(**changes))
