"""Classes of several data sets: by name, apart or by number, and never by number without a word."""

from __future__ import annotations

import pytest

from mae_dist.data.classes import Classes, Merging, merge

PETS = Classes("pets", 2, ["cat", "dog"], True)
FARM = Classes("farm", 3, ["dog", "pig", "cat"], True)
NAMELESS = Classes("tars", 2, None, True)
UNLABELLED = Classes("web", None, None, False)


@pytest.mark.parametrize(
    ("sets", "how", "number", "names", "maps"),
    [
        ([PETS, FARM], "names", 3, ["cat", "dog", "pig"], [[0, 1], [1, 2, 0]]),
        ([PETS, UNLABELLED, FARM], "names", 3, ["cat", "dog", "pig"], [[0, 1], [], [1, 2, 0]]),
        ([PETS, NAMELESS], "apart", 4, ["pets: cat", "pets: dog", "tars: 0", "tars: 1"], [[0, 1], [2, 3]]),
        ([NAMELESS, NAMELESS], "numbers", 2, None, [None, None]),
        ([NAMELESS, PETS], "numbers", 2, ["cat", "dog"], [None, None]),
        ([PETS, PETS._replace(data="b")], "names", 2, ["cat", "dog"], [None, None]),
        ([NAMELESS], "names", 2, None, [None]),
        ([UNLABELLED, NAMELESS], "names", 2, None, [None, None]),
        ([UNLABELLED, UNLABELLED], "names", None, None, [None, None]),
    ],
)
def test_classes_of_several_data_sets(
    sets: list[Classes], how: Merging, number: int | None, names: list[str] | None, maps: list[list[int] | None]
) -> None:
    merged = merge(sets, how)
    assert merged[:2] == (number, names)
    assert [None if part is None else part.tolist() for part in merged.maps] == maps
    assert not merged.problem


@pytest.mark.parametrize(
    ("sets", "how", "problem"),
    [
        ([PETS, NAMELESS], "names", "tars: the names of its classes are not known"),
        ([NAMELESS, NAMELESS], "names", "tars: the names of its classes are not known"),
        ([PETS, Classes("birds", 2, ["crane", "crane"], True)], "names", "birds: has two classes named crane"),
        ([PETS, Classes("tars", None, None, True)], "apart", "tars: the number of its classes is not known"),
        ([PETS, FARM], "numbers", "pets: class 0 is cat, and dog in another data set"),
    ],
)
def test_classes_that_cannot_be_merged_are_refused_with_the_ways(
    sets: list[Classes], how: Merging, problem: str
) -> None:
    merged = merge(sets, how)
    assert merged.problem.startswith(problem)
    assert "data.merge_labels=names merges classes by their names" in merged.problem
    assert merged.number is merged.names is None
