"""RUN/unreadable.jsonl: samples that a run could not read, a line each: {"sample": name, "reason": why}. No torch."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mae_dist.run import jsonl

FILE = "unreadable.jsonl"
DIGITS = re.compile(r"\d+")


class Recorder(logging.Handler):
    """Appends what a rank logs of unreadable samples (`data.crop.log_unreadable`). A disk that takes nothing is no
    reason to stop.
    """

    def __init__(self, run: Path):
        super().__init__()
        self.file = run / FILE

    def emit(self, record: logging.LogRecord) -> None:
        """Append the sample of a record that has one."""
        if found := getattr(record, "unreadable", None):
            with suppress(OSError):
                jsonl.append(self.file, found)


@contextmanager
def recorded(run: Path) -> Iterator[None]:
    """Context manager: samples that are found to be unreadable in its block are recorded in the folder `run`."""
    handler = Recorder(run)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def by_reason(run: Path) -> list[tuple[str, list[str]]]:
    """(Reason, names of its samples, sorted) of what the run in the folder `run` could not read, the most first.
    Reasons that differ in numbers alone are one.
    """
    reasons = {str(line.get("sample")): str(line.get("reason")) for line in jsonl.read(run / FILE)}
    found: dict[str, list[str]] = {}
    for name in sorted(reasons):
        found.setdefault(DIGITS.sub("0", reasons[name]), []).append(name)
    return sorted(((reasons[names[0]], names) for names in found.values()), key=lambda row: -len(row[1]))
