"""A map over processes whose results come in order, and of which only a few wait in memory. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

from mae_dist.errors import MachineFault

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 3
"""Tasks a process that are given out before the results of the first are taken."""
LOST = "a worker process was killed, or ran out of memory; try --workers 1, or fewer; the same command continues"

_work: Callable[[Any], Iterable[Any]] | None = None
"""The function of a worker process, which it has from its parent's memory: it need not be one that can be pickled."""


def ordered_map(work: Callable[[T], Iterable[R]], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yield all results of work(task) for each of the tasks, in their order, computed by `workers` forked processes.

    With one worker everything runs in this process. Errors of `work` are raised here. Raises MachineFault when a worker
    is killed or memory runs out. However this generator or this process ends, also by SIGKILL, its workers end too.
    """
    try:
        if workers > 1:
            yield from _parallel(work, iter(tasks), workers)
        else:
            for task in tasks:
                yield from work(task)
    except (BrokenProcessPool, MemoryError) as error:
        raise MachineFault(LOST) from error


def _parallel(work: Callable[[T], Iterable[R]], tasks: Iterator[T], workers: int) -> Iterator[R]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (work,))
    try:
        waiting = deque(pool.submit(_results, task) for task in islice(tasks, AHEAD * workers))
        while waiting:
            results = waiting.popleft().result()
            waiting.extend(pool.submit(_results, task) for task in islice(tasks, 1))
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Iterable[Any]]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends its workers
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _results(task: Any) -> list[Any]:
    assert _work is not None
    return list(_work(task))
