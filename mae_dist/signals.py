"""Being told to stop. A signal sets a flag; the loop asks for it at a step boundary, where all ranks can save together.

Nothing happens inside a handler but the noting: saving there would need the other ranks, which are somewhere else. A
second Ctrl-C ends the process at once; other signals may come twice, from a scheduler and from a launcher, and the
second time perhaps to a process that has saved and is about to say so by its exit status.
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


class StopFlag:
    """A context manager: while it is open, signals are noted instead of obeyed. Once it is left by `Stopped`, only
    Ctrl-C is obeyed: the process is on its way out.
    """

    def __init__(self) -> None:
        self.requested = False
        self.before = {}

    def __enter__(self) -> StopFlag:
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            leaving = kind is Stopped and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaving else handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[signal.SIGINT])


def ignore_once() -> None:
    """For helpers such as loader workers, which share the terminal and the job of their rank: the rank decides.

    The second signal of a kind is obeyed, so that a rank that ends can end its helpers.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))
