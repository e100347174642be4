"""Worker processes: each runs one function for the tasks that it is sent, and answers with the result.

Pixels need not pass through a pipe: the function can write them into memory that it shares with its parent since before
the workers were forked (`shared_array`). Nothing lies in /dev/shm, which is small in many containers. A killed parent
leaves nothing behind: its workers see that they have another one, and the kernel frees the memory.

Not concurrent.futures: its process pool may wait for ever when a worker is killed while it writes a large result.
Knows no images. Imports no torch.
"""

import logging
import math
import mmap
import multiprocessing
import os
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from mae_dist import signals, watchdog
from mae_dist.errors import MachineFault, RankError, WorkerLost, from_os_error, is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 60.0
"""Seconds without an answer after which a waiting parent says so."""
ORPHAN_CHECK = 5.0
"""Seconds between a waiting worker's checks that its parent still lives."""
AHEAD = 3
"""Tasks a process that `ordered_map` sends before the results of the first are taken."""
LOST = (
    "a loader process of this rank was killed (out of memory? try machine.workers=1, or 0); "
    "the same command resumes from the last checkpoint"
)


def shared_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros that is shared with processes forked after this call."""
    count, dtype = math.prod(shape), np.dtype(dtype)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


class Workers(Generic[T, R]):
    """`number` processes that run `work(task)`; 0: this process does, when it waits for the result.

    The processes take turns at the tasks, and results are waited for in the order of the tasks. Each first calls
    `begin`. ``lost`` is the message where one was killed. `stop()`, or the end of this object or of its process, kills
    the workers, which have nothing to save.
    """

    def __init__(
        self, work: Callable[[T], R], number: int, begin: Callable[[], object] = lambda: None, lost: str = LOST
    ):
        context = multiprocessing.get_context("fork")  # `work` need not be one that can be pickled
        self.work, self.lost, self.waiting, self.sent, self.done = work, lost, deque[T](), 0, 0
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.stop = weakref.finalize(self, _kill, self.processes, self.pipes)
        for _ in range(number):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            arguments = work, begin, lost, theirs, self.pipes, os.getpid()
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so the worker's death is the end of the pipe for this process
            self.processes.append(process)

    def send(self, task: T) -> None:
        """Queue a task. Raises WorkerLost when its process was killed."""
        if not self.pipes:
            self.waiting.append(task)
            return
        try:
            self.pipes[self.sent % len(self.pipes)].send(task)
        except OSError as error:
            raise WorkerLost(self.lost) from error
        self.sent += 1

    def wait(self) -> R:
        """Wait for the result of the oldest task that was not waited for.

        Raises what its function raised, a ValueError as RankError, since only this rank has met it; MachineFault where
        memory ran out or the storage failed, and WorkerLost when a process was killed.
        """
        result, error = self._answer() if self.pipes else _attempt(self.work, self.waiting.popleft(), self.lost)
        watchdog.progress()
        if error is not None:
            raise error
        return result

    def _answer(self) -> tuple[Any, Exception | None]:
        turn, waited = self.done % len(self.pipes), 0.0
        pipe, process = self.pipes[turn], self.processes[turn].pid or 0
        with watchdog.waiting_for(lambda: f"loader process {process} ({watchdog.state_of(process)})"):
            while not (ready := wait([pipe, *(process.sentinel for process in self.processes)], PATIENCE)):
                waited += PATIENCE
                log.warning("no image was read in %.0f s; is the storage slow?", waited)
        try:
            if pipe not in ready:
                raise EOFError
            answer = pipe.recv()
        except (EOFError, OSError) as lost:
            raise WorkerLost(self.lost) from lost
        self.done += 1
        return answer


def ordered_map(
    work: Callable[[T], Iterable[R]], tasks: Sequence[T], number: int, lost: str = LOST
) -> Generator[R, None, None]:
    """Yield all results of work(task) for each of the tasks, in their order, computed by `number` worker processes; 1:
    by this one. Few results wait in memory. Raises as `Workers.wait`.
    """

    def collect(task: T) -> list[R]:
        return [*work(task)]

    workers = Workers(collect, number if number > 1 else 0, lost=lost)
    ahead = AHEAD * number
    try:
        for step in range(len(tasks) + ahead):
            if step < len(tasks):
                workers.send(tasks[step])
            if step >= ahead:
                yield from workers.wait()
    finally:
        workers.stop()


def _attempt(work: Callable[[T], R], task: T, lost: str) -> tuple[Any, Exception | None]:
    """Do a task; give its result, or the error that the parent is to raise. Errors of the program are raised here."""
    try:
        return work(task), None
    except MachineFault as error:
        return None, error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None, MachineFault(lost)
    except (ValueError, OSError) as error:
        known = from_os_error(error, str(error)) if isinstance(error, OSError) else error
        return None, known if isinstance(known, MachineFault) else RankError(str(known))


def _serve(
    work: Callable[[T], R], begin: Callable[[], object], lost: str, pipe: Connection, of_parent: list[Connection],
    parent: int,
) -> None:  # fmt: skip
    """What a worker process does. Its parent handles signals: a worker ignores the first of each kind."""
    signals.ignore_once()
    for end in of_parent:
        end.close()  # so the parent's death is the end of the pipe for this process, also while it sends
    begin()
    with suppress(EOFError, OSError):  # the parent is gone
        while os.getppid() == parent:
            if not pipe.poll(ORPHAN_CHECK):
                continue
            task = pipe.recv()
            try:
                answer = _attempt(work, task, lost)
            except Exception:
                answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            pipe.send(answer)


def _kill(processes: list[BaseProcess], pipes: list[Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(PATIENCE)  # the kernel may not let it go
    for pipe in pipes:
        pipe.close()
