"""What came between a run and its end, a line each: that it was started again, and that it went back.

From what a run's folder notes of itself: provenance.jsonl and rewinds.jsonl. Pure functions; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from mae_dist.stages.standing import duration


class Incident(NamedTuple):
    """When, at which step, and what it was."""

    time: str
    step: str
    what: str


def of(starts: list[dict[str, Any]], rewinds: Iterable[dict[str, Any]]) -> list[Incident]:
    """All of a run, oldest first."""
    return sorted([*map(_started_again, starts[1:]), *map(_went_back, rewinds)])


def _started_again(start: dict[str, Any]) -> Incident:
    text = f"started again on {start.get('hostname')}, {start.get('world')} ranks"
    if "reached" in start:
        text += f"; {start['reached'] - start['step']} steps done again, {duration(start['away'])} after the last one"
    return Incident(str(start.get("time")), str(start.get("step")), text)


def _went_back(rewind: dict[str, Any]) -> Incident:
    skipped, out = len(rewind["nonfinite"]), len(rewind["left_out"])
    text = f"went back to step {rewind['to']}: {skipped} steps were not finite; {out} samples left out"
    return Incident(str(rewind["time"]), str(rewind["step"]), text)
