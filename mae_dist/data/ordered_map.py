"""A map over processes whose results come in order, and of which only a few wait in memory. Imports no torch.

Not concurrent.futures: its process pool may wait for ever when a worker is killed while it writes a large result.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from mae_dist.errors import MachineFault

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 3
"""Tasks a process that may be begun before the results of the first are taken."""
LOST = "a worker process was killed, or memory ran out; with fewer --workers the same command continues"


def ordered_map(work: Callable[[T], Iterable[R]], tasks: Sequence[T], workers: int) -> Generator[R, None, None]:
    """Yield all results of work(task) for each of the tasks, in their order, computed by `workers` forked processes.

    With one worker everything runs in this process. Errors of `work` are raised here. Raises MachineFault when a worker
    is killed or memory runs out. However this generator or this process ends, also by SIGKILL, its workers end too.
    """
    try:
        if workers > 1:
            yield from _parallel(work, tasks, workers)
        else:
            for task in tasks:
                yield from work(task)
    except MemoryError as error:
        raise MachineFault(LOST) from error


def _parallel(work: Callable[[T], Iterable[R]], tasks: Sequence[T], workers: int) -> Generator[R, None, None]:
    crew: list[_Worker] = []
    results: dict[int, list[R]] = {}
    begun = taken = 0
    try:
        for _ in range(workers):
            crew.append(_Worker(work))
        while taken < len(tasks):
            for worker in crew:
                if worker.number is None and begun < min(len(tasks), taken + AHEAD * workers):
                    worker.begin(begun, tasks[begun])
                    begun += 1
            busy = {worker.connection: worker for worker in crew if worker.number is not None}
            for connection in wait(list(busy), timeout=0 if taken in results else None):
                number, answer = busy[connection].answer()  # pyright: ignore[reportArgumentType]
                results[number] = answer
            if taken in results:
                yield from results.pop(taken)
                taken += 1
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that does one task at a time; ``number`` is that of its task, None while it has none."""

    def __init__(self, work: Callable[[Any], Iterable[Any]]):
        context = multiprocessing.get_context("fork")  # `work` need not be one that can be pickled
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()  # so the worker's death is the end of the pipe for this process
        self.number: int | None = None

    def begin(self, number: int, task: Any) -> None:
        self.number = number
        try:
            self.connection.send(task)
        except OSError as error:
            raise MachineFault(LOST) from error

    def answer(self) -> tuple[int, list[Any]]:
        """Number and results of the task. Raises what the task raised, and MachineFault when the process is gone."""
        try:
            results, error = self.connection.recv()
        except (EOFError, OSError) as lost:
            raise MachineFault(LOST) from lost
        if error is not None:
            raise error
        assert self.number is not None
        number, self.number = self.number, None
        return number, results


def _serve(work: Callable[[Any], Iterable[Any]], connection: Connection, parents: Connection) -> None:
    """Answer tasks until the parent is gone, which is the end of the pipe.

    Workers that were forked later have copies of the parent's end, so the last one ends first.
    """
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends its workers
    with suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                answer = list(work(task)), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = [], error
            connection.send(answer)
