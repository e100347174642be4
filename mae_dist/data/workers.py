"""Worker processes of a rank: each runs one function for the tasks that it is sent, and answers when one is done.

The function writes its result into memory that it shares with the rank since before the workers were forked
(`shared_array`), so no pixels pass through a pipe, and nothing lies in /dev/shm, which is small in many containers. A
killed rank leaves nothing behind: its workers see that they have another parent, and the kernel frees the memory.

Knows no images.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike

from mae_dist import signals
from mae_dist.errors import MachineFault, RankError, WorkerLost

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 60.0
"""Seconds without an answer after which a waiting rank says so."""
ORPHAN_CHECK = 5.0
"""Seconds between a waiting worker's checks that its rank still lives."""
LOST = (
    "a loader process of this rank was killed (out of memory? try machine.workers=1, or 0); "
    "the same command resumes from the last checkpoint"
)


def shared_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros that is shared with processes forked after this call."""
    count, dtype = math.prod(shape), np.dtype(dtype)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


class Workers(Generic[T]):
    """`number` processes that run `work(task)`; 0: this process does, when it waits for the result.

    The processes take turns at the tasks, and answers are waited for in the order of the tasks. `stop()`, or the end of
    this object or of the rank, kills the processes, which have nothing to save.
    """

    def __init__(self, work: Callable[[T], None], number: int):
        context = multiprocessing.get_context("fork")
        self.work, self.waiting, self.sent, self.done = work, deque[T](), 0, 0
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.stop = weakref.finalize(self, _kill, self.processes, self.pipes)
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def send(self, task: T) -> None:
        """Queue a task. Raises WorkerLost when its process was killed."""
        if not self.pipes:
            self.waiting.append(task)
            return
        try:
            self.pipes[self.sent % len(self.pipes)].send(task)
        except OSError as error:
            raise WorkerLost(LOST) from error
        self.sent += 1

    def wait(self) -> None:
        """Wait until the oldest task that was not waited for is done.

        Raises what its function raised, a ValueError as RankError, since only this rank has met it, and WorkerLost when
        a process was killed.
        """
        error = self._answer() if self.pipes else _attempt(self.work, self.waiting.popleft())
        if error is not None:
            raise error

    def _answer(self) -> Exception | None:
        pipe, waited = self.pipes[self.done % len(self.pipes)], 0.0
        while not (ready := wait([pipe, *(process.sentinel for process in self.processes)], PATIENCE)):
            waited += PATIENCE
            log.warning("no image was read in %.0f s; is the storage slow?", waited)
        try:
            if pipe not in ready:
                raise EOFError
            answer = pipe.recv()
        except (EOFError, OSError) as lost:
            raise WorkerLost(LOST) from lost
        self.done += 1
        return answer


def _attempt(work: Callable[[T], None], task: T) -> Exception | None:
    """Do a task; give the error that its rank is to raise. Errors of the program are raised here."""
    try:
        work(task)
    except MachineFault as error:
        return error
    except ValueError as error:
        return RankError(str(error))
    return None


def _serve(work: Callable[[T], None], pipe: Connection, rank: int) -> None:
    """What a worker process does. Its rank handles signals: a worker ignores the first of each kind."""
    signals.ignore_once()
    torch.set_num_threads(1)
    while os.getppid() == rank:
        if not pipe.poll(ORPHAN_CHECK):
            continue
        task = pipe.recv()
        try:
            answer = _attempt(work, task)
        except Exception:
            answer = RuntimeError(f"in a loader process:\n{traceback.format_exc()}")
        pipe.send(answer)


def _kill(processes: list[BaseProcess], pipes: list[Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    for pipe in pipes:
        pipe.close()
