"""Stop signals: the handler sets a flag, and the loop reads it at a step boundary, where all ranks can save together.

A handler cannot save, since that needs the other ranks, which are at another place in the program. The second Ctrl-C
ends the process at once. Other signals may arrive twice, from a scheduler and from a launcher, and the second time
perhaps at a process that has saved and is about to return its exit status.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Signals that ask a run to stop: from a scheduler, a launcher or the keyboard."""


class Stopped(Exception):
    """A rank got a stop signal, and the run has saved."""


class StopFlag:
    """Context manager: in its block a stop signal only sets ``requested``. After a block that `Stopped` has ended, only
    Ctrl-C still acts, since the process is about to exit.
    """

    def __init__(self) -> None:
        self.requested = False
        self.before = {}

    def __enter__(self) -> StopFlag:
        self.before = {number: signal.signal(number, self.set) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            leaving = kind is Stopped and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaving else handler)

    def set(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler: set ``requested``, and let a second Ctrl-C act at once."""
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[signal.SIGINT])


def ignore_once() -> None:
    """Ignore the first signal of each kind, in loader workers for example, which share the terminal and the job of
    their rank. The second one ends the process, so that a rank that ends can end its workers.
    """
    signal.set_wakeup_fd(-1)  # of the rank's watchdog
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))
