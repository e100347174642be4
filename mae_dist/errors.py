"""Exit statuses and error types. A decision rests on one of these, never on the text of a message. Imports no torch.

A ValueError is what a user can mend: a setting, a path, a file. A MachineFault is not: the same command continues from
the last checkpoint, so launcher and SLURM start it again.
"""

import errno
import sys

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

MACHINE_FAULTS = {
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOMEM,
    errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EFBIG,
}  # fmt: skip
"""Errors of a disk, a network file system, a connection, or of a machine that has run out of something: no setting of a
run mends them.
"""


CPU_ALLOCATOR = "DefaultCPUAllocator"
"""A word in the plain RuntimeError with which torch reports that memory of the machine ran out. It decides only whether
a sentence is printed or a traceback: the exit status is FAILED either way.
"""


class RankError(ValueError):
    """A user error that only this rank has met, so this rank prints it; other ValueErrors are printed by rank 0."""


class MachineFault(Exception):
    """The machine failed (storage, memory, network), not the settings. Every rank prints its own; one whose message is
    empty is printed by another rank.
    """

    reason = "machine_fault"
    """The field `reason` of the event `fail`."""


class RankLost(MachineFault):
    """A rank hangs or is gone."""

    reason = "rank_lost"


class Hung(MachineFault):
    """This rank waited too long for something, so its `watchdog` ended it."""

    reason = "hung"


class WorkerLost(MachineFault):
    """A loader process of this rank was killed."""

    reason = "worker_lost"


def from_os_error(error: OSError, message: str) -> ValueError | MachineFault:
    """An error with this message: a MachineFault where the machine failed, else a ValueError, a path being wrong."""
    return MachineFault(message) if reason(error) == MachineFault.reason else ValueError(message)


def reason(error: BaseException) -> str:
    """The field `reason` of the event `fail`: what kind of error ended a run."""
    if isinstance(error, MachineFault):
        return error.reason
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        return MachineFault.reason
    return "user_error" if isinstance(error, ValueError | OSError) else "crash"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of a GPU ran out."""
    if isinstance(error, MemoryError) or is_out_of_gpu_memory(error):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether memory of a GPU ran out."""
    torch = sys.modules.get("torch")  # an error of torch comes after its import
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def exit_status(error: BaseException) -> int:
    """The exit status of a process that ends with this error."""
    return USER_ERROR if reason(error) == "user_error" else FAILED


def is_reported_by(rank: int, error: BaseException) -> bool:
    """Whether this rank prints and records its error. A ValueError, which all ranks meet alike, only rank 0."""
    if isinstance(error, MachineFault):
        return str(error) != ""
    return rank == 0 or isinstance(error, RankError | OSError) or reason(error) != "user_error"
