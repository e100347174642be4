"""One process at a time writes in a run's folder: an exclusive lock on RUN/.lock. Imports no torch."""

import logging
import time
from pathlib import Path
from typing import IO

from mae_dist.atomic import holder_of, open_lock, sign, try_lock
from mae_dist.errors import from_os_error
from mae_dist.run.layout import LOCK
from mae_dist.watchdog import waiting_for

log = logging.getLogger(__name__)

WAIT_FOR_LOCK = 100.0
"""Seconds to wait for another process to exit; NFS keeps the locks of a dead machine for 90 s."""
_locks: dict[Path, IO[bytes]] = {}
"""Locked files by run. They stay open, since closing one releases its lock."""


def acquire(run: Path) -> None:
    """Lock the folder `run` until this process exits. Makes the folder where there is none.

    Waits up to WAIT_FOR_LOCK s, with a warning: a killed process may still be exiting. Raises ValueError with the name
    of the process that keeps the lock, or where the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        if run.absolute() in _locks:
            return
        lock = open_lock(run / LOCK)
    except OSError as error:
        raise from_os_error(error, f"out={run}: cannot be written ({error.strerror}); choose another folder") from error
    deadline, warned = time.monotonic() + WAIT_FOR_LOCK, False
    with waiting_for(lambda: f"the lock of {run}"):
        while not try_lock(lock):
            holder = holder_of(lock)
            if time.monotonic() > deadline:
                raise ValueError(f"out={run}: {holder} is writing to this run; stop it, or choose another folder")
            if not warned:
                log.warning("%s: %s is writing to this run; waiting %g s for it to exit", run, holder, WAIT_FOR_LOCK)
                warned = True
            time.sleep(0.2)
    sign(lock)
    _locks[run.absolute()] = lock
