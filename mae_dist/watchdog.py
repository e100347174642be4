"""Nothing waits for ever: a thread ends its process where that makes no progress, or does not answer a signal.

All waits are covered alike, whether for another rank, a lock, a loader process or a storage that hangs: what works
calls `progress`, also in processes that were forked meanwhile, and the thread ends the process after `limit` seconds
without a call. A signal reaches it through signal.set_wakeup_fd, even while the main thread waits in a library, where
Python's own handlers cannot run. A main thread that keeps Python's lock while it waits (for a page of a mapped file,
say) stops the thread, too: a forked process, the guard, then kills the process after as long. Imports no torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path
from typing import NoReturn

from mae_dist.errors import FAILED, SIGNAL_BASE, Hung
from mae_dist.signals import SIGNALS

ANSWER = 10.0
"""Seconds after a signal in which a process must make progress; a run whose steps take longer has twice its longest."""
STARTING = 60.0
"""Least limit before the first progress: importing libraries reads gigabytes."""
TICK = 0.5
LAST_WORDS = 2.0
"""Seconds to print and record why a process ends: what holds it up may hold that up, too."""
LEAVING = 30.0
"""Seconds in which a process whose work is over must have ended."""
PACKAGE = Path(__file__).parent
PROGRESS, TICKED, LIMIT = range(3)
"""Numbers in the memory that a process shares with its guard and its workers: times of the last progress and of the
thread's last tick, and the limit, in seconds.
"""
PR_SET_PDEATHSIG = 1
"""The request of prctl(2) that the kernel sends a signal when the parent ends."""
NAME = "watchdog"
"""Name of the guard's process."""

_watchdog: Watchdog | None = None
_waits: list[tuple[Callable[[], str]]] = []
_recorders: list[Callable[[BaseException], object]] = []


@contextmanager
def watching(limit: float) -> Iterator[None]:
    """Context of the main thread: its process is ended, with a sentence and status FAILED, after `limit` seconds
    without a call of `progress`; or with status 128 + n, ANSWER seconds without one after signal n, unless `answered`
    is called.
    """
    global _watchdog
    _watchdog = Watchdog(limit)
    try:
        with _watchdog:
            yield
    finally:
        _watchdog = None


def progress() -> None:
    """Note that this process, or the one that it was forked from, gets on with its work."""
    if _watchdog is not None:
        _watchdog.shared[PROGRESS] = time.monotonic()


def answered() -> None:
    """Note that a signal is being followed, which may take as long as any other work."""
    if _watchdog is not None:
        _watchdog.answered = True


@contextmanager
def waiting_for(what: Callable[[], str]) -> Iterator[None]:
    """Context that may wait for ``what()``, for the sentence with which the process is then ended."""
    entry = (what,)
    _waits.append(entry)
    try:
        yield
    finally:
        _waits.remove(entry)


@contextmanager
def recorded_by(record: Callable[[BaseException], object]) -> Iterator[None]:
    """Context in which `record` is called with the error when the process is ended."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.remove(record)


def leave(status: int) -> None:
    """End this process with a status if it has not ended by itself in LEAVING seconds, some library waiting, say."""

    def end() -> None:
        time.sleep(LEAVING)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


class Watchdog:
    """The thread of `watching`, and what it counts."""

    def __init__(self, limit: float):
        self.shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.shared[LIMIT], self.answered, self.guard = limit, False, 0
        self.idle = self.longest = self.since_signal = 0.0
        self.signal: signal.Signals | None = None
        self.reader, self.writer = socket.socketpair()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self.writer.setblocking(False)
        self.before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        parent = os.getpid()
        self.guard = os.fork()
        if not self.guard:
            try:
                guard(parent, self.shared)
            finally:
                os._exit(0)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.before)
        self.writer.send(b"\0")  # no signal: ends the thread
        self.thread.join()
        self.reader.close()
        self.writer.close()
        os.kill(self.guard, signal.SIGKILL)
        os.waitpid(self.guard, 0)

    def watch(self) -> None:
        """Count seconds without progress, in ticks, so that time in which the process was stopped or the machine
        asleep does not count.
        """
        seen = 0.0
        while True:
            self.shared[TICKED] = time.monotonic()
            began = time.monotonic()
            if select.select([self.reader], [], [], TICK)[0]:
                if not (number := self.reader.recv(1)[0]):
                    return
                self.signal = self.signal or signal.Signals(number)
            elapsed = min(time.monotonic() - began, 2 * TICK)
            self.since_signal += elapsed if self.signal else 0
            if (now := self.shared[PROGRESS]) != seen:
                self.longest = max(self.longest, self.idle) if seen else 0.0
                seen, self.idle = now, 0.0
            self.idle += elapsed
            self.judge(started=seen > 0)

    def judge(self, started: bool) -> None:
        """End the process if it must be."""
        waited, limit = min(self.idle, self.since_signal), self.shared[LIMIT]
        if self.signal and not self.answered and waited > max(ANSWER, 2 * self.longest):
            end(f"got {self.signal.name} and waits for {place()}, so it ends without saving", SIGNAL_BASE + self.signal)
        if self.idle > (limit if started else max(limit, STARTING)):
            end(f"no progress in {self.idle:.0f} s (machine.timeout): it waits for {place()}", FAILED)


def guard(process: int, shared: memoryview[float]) -> None:
    """What the guard does: kill a process whose watchdog has not ticked for too long, while it was not stopped."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)  # chaos looks for loader processes
    seen, idle = 0.0, 0.0
    while os.getppid() == process:
        time.sleep(TICK)
        seen, idle = (now, 0.0) if (now := shared[TICKED]) != seen else (seen, idle + TICK)
        state = state_of(process)
        if state.startswith("stopped"):
            idle = 0.0
        working = not shared[PROGRESS] or state.startswith("running")  # imports, or computes with Python's lock
        if idle > (max(shared[LIMIT], STARTING) if working else shared[LIMIT]):
            where = f" on {file}" if (file := file_of(process)) else ""
            with suppress(OSError):
                os.write(2, f"mae-dist: {sentence(f'waits{where} in a library for {idle:.0f} s')}\n".encode())
            os.kill(process, signal.SIGKILL)
            return


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent has ended, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def sentence(why: str) -> str:
    """What is printed about this rank."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    return f"{rank}{why}; the same command resumes from the last checkpoint"


def end(why: str, status: int) -> NoReturn:
    """Print and record why this process ends, if that is possible at once, and end it and its workers."""
    error = Hung(sentence(why))

    def report() -> None:
        sys.stderr.write(f"mae-dist: {error}\n")
        sys.stderr.flush()
        for record in list(_recorders):
            record(error)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    thread.join(LAST_WORDS)
    for child in active_children():
        child.kill()
    os._exit(status)


def place() -> str:
    """What the main thread waits for, as far as is known: the innermost `waiting_for`, its file, our line of code."""
    what = _waits[-1][0]() if _waits else "something"
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    line = [f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"] if frame else []
    file = file_of(os.getpid())
    details = [f"on {file}"] * (file != "" and file not in what) + line
    return f"{what} ({', '.join(details)})" if details else what


def file_of(process: int) -> str:
    """The file in a system call on which the first thread of a process waits; empty where it does not wait on one, or
    the kernel does not tell.
    """
    with suppress(OSError, ValueError, OverflowError):
        _, first, second, *_ = Path(f"/proc/{process}/syscall").read_text().split()
        descriptor = int(first, 16) & 0xFFFFFFFF
        if descriptor == 0xFFFFFF9C:  # AT_FDCWD: the path itself comes next
            with Path(f"/proc/{process}/mem").open("rb") as memory:
                memory.seek(int(second, 16))
                return os.fsdecode(memory.read(4096).partition(b"\0")[0])
        name = os.readlink(f"/proc/{process}/fd/{descriptor}") if int(first, 16) < 2**31 else ""
        return name if name.startswith("/") else ""
    return ""


def state_of(process: int) -> str:
    """What a process does, in the words of its kernel ("T (stopped)", say), and the file on which it waits."""
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{process}/status").read_text().partition("State:")[2].splitlines()[0].strip()
        file = file_of(process)
        return f"{text.partition('(')[2].rstrip(')') or text}{f' on {file}' if file else ''}"
    return "gone"
