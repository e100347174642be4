"""What happened between the first start of a run and its end, a line each: stops, failures, restarts, rewinds and
warnings.

Read from the run's events.jsonl and from the events of its jobs' first tasks.
"""

from pathlib import Path
from typing import NamedTuple

from mae_dist.cli import duration
from mae_dist.run import jobs
from mae_dist.run.events import Event


class Incident(NamedTuple):
    """When something happened, at which step if that is known, what it was, and whether it is a warning of the run."""

    time: str
    step: str
    what: str
    is_warning: bool = False


def of(recorded: list[Event], run: Path) -> list[Incident]:
    """All incidents of the run in the folder `run`, oldest first, from its events and those of its jobs."""
    found = []
    for job in jobs.submissions_in(recorded, run):
        of_task_0 = jobs.events(Path(job.logs), job.job).get(0, [])
        found += [event for event in of_task_0 if event["event"] == "stop_requested"]
    first = next((event for event in recorded if event["event"] == "start"), None)
    last = {(event["job"], event["start"]): event for event in recorded if event["event"] == "requeue"}
    repeated = [event for event in recorded if event["event"] == "requeue" and event not in last.values()]
    found += [event for event in recorded if event is not first and event not in repeated]
    incidents = (
        Incident(event["time"], str(event.get("step", "")), text, event["event"] == "warn")
        for event in found
        if (text := _text(event))
    )
    return sorted(incidents, key=lambda incident: incident.time)


def _text(event: Event) -> str:
    """What happened, in one sentence; empty for events that are no incident."""
    match event["event"]:
        case "start":
            text = f"started again on {event.get('hostname', '?')}, {event.get('ranks', '?')} ranks"
            if not event.keys() >= {"reached", "away"}:
                return text
            repeated = event["reached"] - event["step"]
            return f"{text}; {repeated} steps repeated, {duration(event['away'])} after the last step"
        case "stop_requested":
            return f"stop requested by {event['by']}"
        case "stop":
            return f"stopped: {event['message']}"
        case "fail":
            return f"failed ({event['reason']}, rank {event['rank']}): {event['message']}"
        case "requeue":
            return f"requeued by {event['by']}: {event['message']}"
        case "warn":
            return f"warning: {event['message']}"
        case "rewind":
            skipped, left_out = len(event["nonfinite"]), len(event["left_out"])
            return f"rewound to step {event['to']}: {skipped} steps were not finite; {left_out} samples left out"
    return ""
