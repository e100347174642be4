"""What happened to a run, as one JSON object a line in RUN/events.jsonl: {"time": ISO 8601, "event": KIND, ...}.

    start    step, total_steps, ranks, data_fingerprint, git, versions, hostname, device, command; after an earlier
             start also reached (last step recorded) and away (seconds since it was recorded)
    stop     reason ("signal", "keyboard"), step, message
    fail     reason ("user_error", "rank_lost", "worker_lost", "hung", "machine_fault", "out_of_memory", "crash"), rank,
             message
    rewind   step, to, nonfinite (steps), left_out (sample ids)
    warn     step, about (what, the same for the same warning), message
    submit   job, logs, nodes, tasks_per_node
    requeue  job, start, reason ("saved", "stopped", "time_limit", "rank_lost"), by ("task", "slurm", "script"),
             message, saved (step of the newest checkpoint)
    finish   step

The order of the lines is the order of the events. Imports no torch.
"""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mae_dist.run import jsonl

FILE = "events.jsonl"
Kind = Literal["start", "stop", "fail", "rewind", "warn", "submit", "requeue", "finish"]
Event = dict[str, Any]
FIELDS = {
    "start": ("step",), "stop": ("reason", "step", "message"),
    "fail": ("reason", "rank", "message"), "rewind": ("step", "to", "nonfinite", "left_out"),
    "warn": ("step", "about", "message"),
    "submit": ("job", "logs", "nodes", "tasks_per_node"), "requeue": ("job", "start", "reason", "by", "message"),
}  # fmt: skip
"""The fields that an event of a kind always has."""
TYPES: dict[str, Any] = {
    "step": int, "ranks": int, "start": int, "to": int, "reached": int, "away": int | float, "nonfinite": list,
    "left_out": list, "job": str, "logs": str, "rank": int, "status": int, "reason": str, "message": str,
    "by": str, "host": str, "about": str,
}  # fmt: skip
"""The types of fields that are computed with, or shown."""
WORDS, LONGEST = ("job", "reason", "by", "host", "about"), 255
"""Fields of a word or a name, and the characters of the longest one: that of a host."""
JOB = re.compile(r"[0-9]+(_[0-9]+)?")
"""A job's number, or an element of an array: a part of the names of files, and an argument of SLURM's commands."""
MOST = 2**24
"""Bytes of a file of events that are read, its last ones: a run writes far less."""


def now() -> str:
    """The time in ISO 8601, in whole seconds with the offset of the time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def append(run: Path, event: Kind, **fields: Any) -> None:
    """Append an event to the file of the run in the folder `run`. Raises OSError where it cannot be written."""
    jsonl.append(run / FILE, {"time": now(), "event": event} | fields)


def read(run: Path) -> list[Event]:
    """All events of the run in the folder `run`, oldest first; [] where there are none. Damaged ones are left out."""
    return sound(jsonl.read(run / FILE, MOST), FIELDS)


def sound(recorded: Iterable[Event], fields: Mapping[str, tuple[str, ...]]) -> list[Event]:
    """The events that have a kind, a time and all `fields` of their kind, of their types."""
    return [event for event in recorded if _is_sound(event, fields)]


def _is_sound(event: Event, fields: Mapping[str, tuple[str, ...]]) -> bool:
    kind, at = event.get("event"), event.get("time")
    if not (isinstance(kind, str) and isinstance(at, str)):
        return False
    with suppress(ValueError, OverflowError):
        datetime.fromisoformat(at).timestamp()
        typed = all(isinstance(event[name], expected) for name, expected in TYPES.items() if name in event)
        typed = typed and all(len(event.get(name, "")) <= LONGEST for name in WORDS)
        named = "job" not in event or (typed and JOB.fullmatch(event["job"]) is not None)
        return typed and named and event.keys() >= {*fields.get(kind, ())}
    return False


def of(run: Path, *kinds: Kind) -> list[Event]:
    """The events of these kinds of the run in the folder `run`, oldest first."""
    return [event for event in read(run) if event.get("event") in kinds]


def data_since(run: Path) -> int:
    """The step at which the run in the folder `run` began to read the data that it reads now."""
    since, before = 0, None
    for start in of(run, "start"):
        now_read = start.get("data_fingerprint")
        since, before = since if before in (None, now_read) else start["step"], now_read
    return since
