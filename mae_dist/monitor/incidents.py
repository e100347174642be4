"""What came between a run and its end, a line each: that it stopped, was started again, or went back, and why.

From what a run's folder notes of itself: provenance.jsonl, rewinds.jsonl, ends.jsonl, and the events of its jobs. Pure
functions but for the last; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mae_dist.cli import duration
from mae_dist.run import jobs

Line = dict[str, Any]


class Incident(NamedTuple):
    """When, at which step, and what it was."""

    time: str
    step: str
    what: str


def of(
    starts: list[Line], rewinds: Iterable[Line] = (), ends: Iterable[Line] = (), notes: Iterable[Line] = ()
) -> list[Incident]:
    """All of a run, oldest first; ``notes`` are the events of its jobs' first task."""
    told = [_noted(note) for note in notes if note.get("event") in ("stop_requested", "requeue")]
    return sorted([*map(_started_again, starts[1:]), *map(_went_back, rewinds), *map(_ended, ends), *told])


def notes(run: Path) -> list[Line]:
    """The events of the first task of all jobs of a run."""
    return [event for one in jobs.submissions(run) for event in jobs.events(Path(one.logs), one.job).get(0, [])]


def _started_again(start: Line) -> Incident:
    text = f"started again on {start.get('hostname')}, {start.get('world')} ranks"
    if "reached" in start:
        text += f"; {start['reached'] - start['step']} steps done again, {duration(start['away'])} after the last one"
    return Incident(str(start.get("time")), str(start.get("step")), text)


def _went_back(rewind: Line) -> Incident:
    skipped, out = len(rewind["nonfinite"]), len(rewind["left_out"])
    text = f"went back to step {rewind['to']}: {skipped} steps were not finite; {out} samples left out"
    return Incident(str(rewind["time"]), str(rewind["step"]), text)


def _ended(end: Line) -> Incident:
    return Incident(str(end["time"]), "", f"{end['state']}: {end['why']}")


def _noted(note: Line) -> Incident:
    stop = note["event"] == "stop_requested"
    what = f"stop requested by {note['by']}" if stop else f"to be started again: {note['message']}"
    return Incident(str(note["time"]), "", what)
