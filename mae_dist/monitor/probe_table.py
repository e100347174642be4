"""The table of a probe with many heads: each head's accuracy on held-out images with its interval, and the test of the
chosen one.
"""

import math
from typing import Any, NamedTuple

from mae_dist.monitor.records import Run, finite

NORMAL_95 = 1.959964
"""Quantile of the normal distribution for a two-sided interval of 95 %."""
MOST_ROWS = 15


class Row(NamedTuple):
    """One head; percent of the held-out images, with an interval of 95 %."""

    head: dict[str, Any]
    low: float
    high: float
    chosen: bool


class ProbeTable(NamedTuple):
    """The heads of a run, the best first, MOST_ROWS at most of `num_heads`; `test` is top-1 in percent with the ends of
    its 95 % interval, of the chosen head.
    """

    run: Run
    rows: list[Row]
    num_heads: int
    num_held_out: int
    test: tuple[float, float, float] | None

    @property
    def scale(self) -> tuple[float, float]:
        """The range that all intervals share."""
        ends = [end for row in self.rows if not row.head["diverged"] for end in (row.low, row.high)]
        ends += self.test or ()
        return (min(ends), max(ends)) if ends else (0.0, 100.0)


def wilson(percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images, in percent (Wilson 1927, eq. for the binomial proportion)."""
    share, z2 = percent / 100, NORMAL_95**2 / max(1, count)
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(max(0.0, share * (1 - share) * z2 + z2 * z2 / 4)) / (1 + z2)
    return 100 * (middle - half), 100 * (middle + half)


def of(run: Run) -> ProbeTable | None:
    """The table of a run, None where it is no probe with many heads, or not finished."""
    found = run.heads
    if not found:
        return None
    number, interval, top1 = (found.get(name) for name in ("num_held_out", "interval", "top1"))
    held_out = int(number) if finite(number) and number > 0 else 0
    rows = [
        Row(row, *wilson(row["held_out_top1"], held_out), row["name"] == found.get("chosen")) for row in found["rows"]
    ]
    ends = [end for end in interval if finite(end)] if isinstance(interval, list) else []
    test = (ends[0], top1, ends[1]) if len(ends) == 2 and finite(top1) else None
    return ProbeTable(run, rows[:MOST_ROWS], len(rows), held_out, test)
