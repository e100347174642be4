"""Classes of several data sets in one run: merged by name, kept apart, or the same by number. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

Merging = Literal["names", "apart", "numbers"]
WAYS = (
    "data.merge_labels=names merges classes by their names in each dataset.json, apart keeps them apart, and numbers "
    "takes equal numbers for one class"
)


class Classes(NamedTuple):
    """What is known of a data set's labels: its name, the number of its classes, their names, and whether it has any
    labels.
    """

    data: str
    number: int | None
    names: list[str] | None
    labelled: bool


class Merged(NamedTuple):
    """The classes of several data sets together, and for each set the new numbers of its classes (None: they stay).

    ``problem`` is why their labels cannot be used together; empty where they can.
    """

    number: int | None
    names: list[str] | None
    maps: list[Int[np.ndarray, " classes"] | None]
    problem: str = ""


def merge(sets: Sequence[Classes], how: Merging) -> Merged:
    """Merge the classes of data sets, of which those without labels have none."""
    sets = [known if known.labelled else Classes(known.data, 0, [], False) for known in sets]
    labelled = [known for known in sets if known.labelled]
    first = labelled[0] if labelled else Classes("", None, None, False)
    alike = all(known[1:] == first[1:] for known in labelled) and (first.names is not None or len(labelled) < 2)
    if alike:
        return Merged(first.number, first.names, [None] * len(sets))
    ways = {"names": _by_name, "apart": _apart, "numbers": _by_number}
    merged = ways[how](sets)
    return merged if isinstance(merged, Merged) else Merged(None, None, [None] * len(sets), f"{merged}; {WAYS}")


def _by_name(sets: Sequence[Classes]) -> Merged | str:
    """The numbers of the first data set stay, and new names are appended."""
    numbers: dict[str, int] = {}
    for known in sets:
        if known.names is None:
            return f"{known.data}: the names of its classes are not known"
        if twice := [name for name, count in Counter(known.names).items() if count > 1]:
            return f"{known.data}: has two classes named {twice[0]}"
        for name in known.names:
            numbers.setdefault(name, len(numbers))
    maps = [np.array([numbers[name] for name in known.names or ()], dtype=np.int64) for known in sets]
    return Merged(len(numbers), list(numbers), [*maps])


def _apart(sets: Sequence[Classes]) -> Merged | str:
    """The classes of each data set follow those of the sets before it."""
    for known in sets:
        if known.number is None:
            return f"{known.data}: the number of its classes is not known"
    counts = [known.number or 0 for known in sets]
    names = [f"{known.data}: {name}" for known in sets for name in known.names or map(str, range(known.number or 0))]
    ends = accumulate(counts)
    return Merged(sum(counts), names, [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)])


def _by_number(sets: Sequence[Classes]) -> Merged | str:
    """Equal numbers are one class, whose names must not differ where they are known."""
    names = max((known.names or [] for known in sets), key=len)
    for known in sets:
        for number, (name, other) in enumerate(zip(known.names or (), names, strict=False)):
            if name != other:
                return f"{known.data}: class {number} is {name}, and {other} in another data set"
    counts = [known.number for known in sets if known.labelled]
    number = None if None in counts else max(count or 0 for count in counts)
    return Merged(number, names if len(names) == number else None, [None] * len(sets))
