"""Intervals: shares of the time, and one sentence on what limited the run, on which rank and host."""

from __future__ import annotations

import pytest

from mae_dist.run import interval
from mae_dist.run.interval import RankTime


def times(*ranks: tuple[float, float, float]) -> list[RankTime]:
    """Of 10 s: seconds of each rank that went into data, communication and checkpoints."""
    return [RankTime(10.0, *rank, memory=2e9) for rank in ranks]


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([(0.1, 0, 0)], "limited by computing: 99% of the time, MFU 40%"),
        ([(4, 0, 0)], "limited by data: the run waited 40% of the time for images"),
        ([(0, 0, 3)], "limited by checkpoints: the run waited 30% of the time for a save"),
        ([(0.1, 4, 0), (4, 0.1, 0)], "limited by data: rank 1 on b waited 40% of the time for images"),
        ([(0, 5, 0), (0, 1.5, 0), (0, 3, 0)],
         "limited by communication: even rank 1 on b, the slowest, waited 15% of the time for the others' gradients"),
        ([(0, 5, 0), (0, 0.5, 0), (0, 5, 0)],
         "limited by one rank: the others waited 30% of the time for rank 1 on b to compute"),
        ([(0, 0.5, 0), (0, 0.4, 0)], "limited by computing: 96% of the time, MFU 40%"),
    ],
)  # fmt: skip
def test_interval_limit_is_that_of_the_rank_that_waits_least_for_others(
    ranks: list[tuple[float, float, float]], sentence: str
) -> None:
    record = interval.record(7, times(*ranks), ["a", "b", "c"], mfu=0.4)
    assert interval.describe(record, len(ranks)) == sentence
    assert sum(record[part] for part in interval.PARTS) == pytest.approx(1)
    assert (record["step"], record["memory"]) == (7, 2.0)


def test_intervals_add_up_rank_by_rank() -> None:
    first, second = times((1, 2, 3), (4, 5, 6)), times((1, 1, 1), (0, 0, 0))
    assert interval.added(first, []) == first
    assert interval.added(first, second) == [RankTime(20, 2, 3, 4, 2e9), RankTime(20, 4, 5, 6, 2e9)]


def test_interval_without_any_time_has_a_record() -> None:
    assert interval.record(1, [RankTime(0, 0, 0, 0, 0)], ["a"], None)["limit"] == "compute"
