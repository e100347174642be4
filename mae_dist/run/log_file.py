"""RUN/log.txt: what a run prints, with the time, for runs whose output no launcher keeps. No torch.

The ranks append to it, rank 0 all that it logs and others what they fail of. `mae-dist logs` shows it.
"""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mae_dist import printed
from mae_dist.atomic import open_own
from mae_dist.errors import reason
from mae_dist.run import jobs
from mae_dist.signals import Stopped

log = logging.getLogger(__name__)

FILE = "log.txt"
unprinted = logging.getLogger("mae_dist.unprinted")
"""Logger of what stands in the log file alone, as a terminal shows it in another way."""
unprinted.propagate = False
unprinted.setLevel(logging.INFO)


class Appender(logging.Handler):
    """Appends records to a file, each in one write, with the time, and with the rank where it is not 0. A disk that
    takes none is no reason to stop: the run's metrics need it, too.
    """

    def __init__(self, stream: IO[bytes], rank: int):
        super().__init__()
        self.stream, self.rank = stream, f" [rank {rank}]" if rank else ""
        self.setFormatter(printed.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        assert self.formatter is not None
        text = f"{self.formatter.formatTime(record, '%Y-%m-%d %H:%M:%S')}{self.rank} {self.format(record)}\n"
        with suppress(OSError):
            os.write(self.stream.fileno(), text.encode(errors="backslashreplace"))


@contextmanager
def kept(run: Path, rank: int) -> Iterator[None]:
    """Context manager: appends what is logged, from the start of the command on, and the error that ends its block to
    the log file of the run in the folder `run`; nothing in a job of `mae-dist submit`, which has a log.
    """
    if jobs.submissions(run) and "SLURM_JOB_ID" in os.environ:
        yield
        return
    try:
        stream = open_own(run / FILE, append=True)
    except OSError as error:
        log.warning("%s: cannot be written (%s); going on without", run / FILE, error.strerror)
        yield
        return
    root, handler = logging.getLogger(), Appender(stream, rank)
    printed.hand_over(handler)
    with stream:
        for logger in (root, unprinted):
            logger.addHandler(handler)
        try:
            yield
        except Stopped as stopped:
            if rank == 0:
                unprinted.info("mae-dist: %s", stopped)
            raise
        except BaseException as error:
            crash = isinstance(error, Exception) and reason(error) == "crash"
            message = traceback.format_exc().rstrip() if crash else f"mae-dist: {str(error) or type(error).__name__}"
            unprinted.error("%s", message)
            raise
        finally:
            for logger in (root, unprinted):
                logger.removeHandler(handler)
