"""Points in time of a device's work, taken without making the host wait for the device."""

import time

import torch

Mark = float | torch.cuda.Event
Spans = list[tuple[Mark, Mark]]
"""(begin, end) of several stretches of time."""


def mark(device: torch.device) -> Mark:
    """Now; on a GPU the moment at which it will have done all that it was given so far on the current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(spans: float | Spans) -> float:
    """Length of several stretches together; a number is seconds already. The device must have passed their ends."""
    return sum(map(_between, spans)) if isinstance(spans, list) else spans


def _between(span: tuple[Mark, Mark]) -> float:
    begin, end = span
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000
