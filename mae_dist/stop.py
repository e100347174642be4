"""Being told to stop. A signal sets a flag; the loop asks for it at a step boundary, where all ranks can save together.

Nothing happens inside a handler but the noting: saving there would need the other ranks, which are somewhere else. A
second signal of the same kind ends the process at once, as it would have without us.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Asked to stop: by a scheduler, a launcher or a keyboard."""
REQUEUE = 75
"""Exit status of a run that was stopped, has saved, and wants to go on (sysexits' EX_TEMPFAIL)."""


class Stopped(Exception):
    """The run has saved, because a rank was told to stop."""


class Flag:
    """A context manager: while it is open, the first signal of each kind is noted instead of obeyed."""

    def __init__(self) -> None:
        self.requested = False
        self.before = {}

    def __enter__(self) -> Flag:
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        self.requested = True
        signal.signal(number, self.before[signal.Signals(number)])


def ignore() -> None:
    """For helpers such as loader workers, which share the terminal and the job of their rank: the rank decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
