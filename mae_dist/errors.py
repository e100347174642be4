"""Exit statuses and error types. A decision rests on one of these, never on the text of a message. Imports no torch.

A ValueError is what a user can mend: a setting, a path, a file. A MachineFault is not: the same command starts again
from the last checkpoint, so launcher and SLURM do that by themselves.
"""

from __future__ import annotations

import errno

DONE = 0
FAILED = 1
"""A rank hung, was lost or crashed, or the machine failed: starting again may help."""
USER_ERROR = 2
"""A setting, path or file that the user must change: starting again would only repeat the error."""
STOPPED = 75
"""The run was stopped by a signal and has saved; it wants to be started again (EX_TEMPFAIL of sysexits)."""
INTERRUPTED = 130
"""Ctrl-C before there was anything to save, as shells report SIGINT."""
SIGNAL_BASE = 128
"""A process that signal n ended has the exit status 128 + n, as in a shell."""

FAULTY_STORAGE = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO}
"""Errors of a disk or of a network file system, which no setting mends."""


class RankError(ValueError):
    """A user error that only this rank has met, so this rank prints it; other ValueErrors are printed by rank 0."""


class MachineFault(Exception):
    """The machine failed (storage, memory, network), not the settings. The rank that met it prints it."""

    reason = "machine_fault"
    """The field `reason` of the event `fail`."""


class RankLost(MachineFault):
    """A rank hangs or is gone. An empty message: another survivor prints who."""

    reason = "rank_lost"


class WorkerLost(MachineFault):
    """A loader process of this rank was killed."""

    reason = "worker_lost"


def is_storage_fault(error: BaseException) -> bool:
    """Whether an OSError comes from the machine's storage rather than from a path that a user can mend."""
    return isinstance(error, OSError) and error.errno in FAULTY_STORAGE
