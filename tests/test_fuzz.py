"""A few mutations of the fuzz command: damaged inputs end with a sentence. `python tests/fuzz.py` runs thousands."""

from __future__ import annotations

from fuzz import WRONG, fuzz

FEW = ("data show data", "data index tars/x.tar --labels labels.csv", "runs .", "ckpt verify", "submit pipeline")


def test_damaged_inputs_end_with_a_sentence() -> None:
    cases = [*fuzz(0, range(15), FEW)]
    assert len(cases) == 15
    assert [(case.number, case.command.argv, case.file, case.ended) for case in cases if case.ending in WRONG] == []
