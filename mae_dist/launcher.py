"""Starts several ranks on this machine, and starts them again when one was lost.

A rank is a fork of this process, which imports once, before it has threads, groups or a GPU, what every rank needs: a
start, and each start again, then costs no import. Only the command `mae-dist` itself, on Linux, is forked so. Where a
program calls it, whose threads and open files a fork would double, and on other systems, whose libraries do not outlive
a fork, a rank is a new `python -m mae_dist`.

The ranks meet in files of a private folder and talk over the loopback interface, whatever the machine's name resolves
to. Decides by exit statuses alone and prints nothing where a rank has printed why it ended. Imports no torch at first.
"""

import importlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeAlias

from mae_dist import cli, environment, interfaces, signals, watchdog
from mae_dist.errors import DONE, INTERRUPTED, SIGNAL_BASE, STOPPED, USER_ERROR

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ", most likely because memory ran out (lower machine.micro_batch, machine.workers or machine.processes)"
FINAL = (DONE, USER_ERROR, STOPPED, INTERRUPTED)
"""Exit statuses after which the ranks are not started again."""
COMMANDS = ("/mae-dist", "/mae_dist/__main__.py", "/launch/agent.py")
"""Ends of sys.argv[0] where this process is the command itself, not a program that calls it."""
DRIVERS = ("/dev/nvidia", "/dev/kfd")
"""Files that drivers of GPUs keep open in a process, which can then no longer be forked."""
COUNTED = "MAE_DIST_PROCESSES"
"""Environment variable: the number of this machine's GPUs, as counted by the process that this one was."""
SIGNALS = (*signals.SIGNALS, signal.SIGHUP, signal.SIGQUIT)
"""Signals that are passed on to the ranks, which are no part of this process's group."""
PATIENCE = 30.0
"""Seconds that ranks have to end after one of them has failed, before they are killed."""
IMPORTS = 600.0
"""Seconds that imports may take, from a storage that is slow, on a machine that does much else."""
POLL = 0.1
"""Seconds between looks at the ranks."""
Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
"""What signal.getsignal returns."""


def processes_here(wanted: int | None) -> int:
    """How many ranks to start on this machine: `wanted`, else one for each GPU, else one."""
    if wanted:
        return wanted
    if counted := os.environ.get(COUNTED):
        return int(counted)
    return max(1, cli.import_module("torch").cuda.device_count())


def limit_threads(ranks: int) -> None:
    """Give this process, one of `ranks` of this machine, its share of the cores, unless OMP_NUM_THREADS is set. Where
    it is alone and has no quota, torch counts the cores right.
    """
    if "OMP_NUM_THREADS" not in os.environ and (ranks > 1 or environment.quota() is not None):
        import torch

        torch.set_num_threads(environment.threads(os.environ, ranks))


def is_command() -> bool:
    """Whether this process is the command itself, on a system whose processes may be forked, without other threads."""
    own = str(Path(sys.argv[0]).absolute()).endswith(COMMANDS)
    return own and sys.platform == "linux" and threading.active_count() == 1


def is_forked() -> bool:
    """Whether the ranks are forks of this process, and not new ones."""
    if not is_command():
        return False
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return not any(path.startswith(DRIVERS) for path in opened)


def spawn(argv: list[str], processes: int, restarts: int) -> int:
    """Run `mae-dist ARGV` on several ranks of this machine, and return the exit status.

    When a rank crashes, hangs or is killed, the others stop and all are started again, `restarts` times at most. The
    status is that of the first rank that failed, 128 + n for one that signal n ended.
    """
    import shutil
    import tempfile  # neither is needed for help

    os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads({}, processes)))
    if is_command() and "torch" in sys.modules and COUNTED not in os.environ:
        os.environ[COUNTED] = str(processes)  # begin again: torch took other threads, and may have called the driver
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    received: list[signal.Signals] = []
    while True:
        own, folder = os.getpid(), tempfile.mkdtemp(prefix="mae_dist-")
        meeting = {"MASTER_ADDR": interfaces.LOCALHOST, "MASTER_PORT": "0", environment.MEETING_FILE: f"{folder}/ranks"}
        try:
            status = run(argv, range(processes), processes, meeting, received)
        finally:
            if os.getpid() == own:  # a fork leaves this, too
                shutil.rmtree(folder, ignore_errors=True)
        if status in FINAL or received or not restarts:
            return status
        restarts -= 1
        log.error("starting the ranks again (%d restarts left)", restarts)


def run(
    argv: Sequence[str], ranks: range, world: int, meeting: Mapping[str, str], received: list[signal.Signals]
) -> int:  # fmt: skip
    """Run `mae-dist ARGV` once on these `ranks` of a `world`, which meet as the variables `meeting` say, and return
    their exit status. Signals of this process are put into `received`.
    """

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    if is_forked():
        with watchdog.watching(IMPORTS):
            cli.import_module(cli.VERBS[argv[0]].module)
            cli.import_module("torch._dynamo")  # as DDP and FSDP2 do
    pids = {}
    for local, rank in enumerate(ranks if not received else ()):  # nothing has begun that a signal could stop
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": len(ranks)}
        pids[rank] = start(argv, {**meeting, **{name: str(value) for name, value in place.items()}}, before)
    failures = wait(pids, received)
    for number, handler in before.items():
        signal.signal(number, handler)
    return exit_status(failures, received) if pids else SIGNAL_BASE + received[0]


def start(argv: Sequence[str], variables: Mapping[str, str], handlers: Mapping[signal.Signals, Handler]) -> int:
    """Start a rank with more environment variables, in a session of its own, and return its process id. Where it is a
    fork, it takes back the signal `handlers` that this process had.
    """
    if not is_forked():
        return os.posix_spawn(sys.executable, [*environment.python(), *argv], os.environ | variables, setsid=True)
    sys.stdout.flush()
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the fork must not note one that is its own
    if not (pid := os.fork()):
        os.setsid()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if not pid:
        become_rank(argv, variables)
    return pid


def become_rank(argv: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Go on as `python -m mae_dist ARGV` would begin. This process saves and ends with the launcher's, however that
    ends.
    """
    watchdog.end_with_parent(signal.SIGTERM)
    os.environ.update(variables)
    logging.getLogger().handlers.clear()
    sys.argv[1:] = argv
    sys.exit(importlib.import_module("mae_dist.__main__").main())


def wait(pids: Mapping[int, int], received: Sequence[signal.Signals]) -> list[tuple[int, int]]:
    """Wait until all ranks have ended, whose process ids these are: (rank, exit status, or -n after signal n) of those
    that failed, in the order in which they did. Signals that are `received` meanwhile are passed on, and the ranks have
    the time that a step and a save take; their own watchdogs end those that hang. Where a rank has failed, the others
    get SIGTERM, and are killed PATIENCE s later.
    """
    running, failures, passed, deadline = dict(pids), [], 0, math.inf
    while running and time.monotonic() < deadline + PATIENCE:  # a process may hang in the kernel even then
        for rank, pid in pids.items():
            if rank in running and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                del running[rank]
                failures += [(rank, os.waitstatus_to_exitcode(ended[1]))] if ended[1] else []
        due, passed = [*received[passed:]], len(received)
        if failures and deadline == math.inf:
            due, deadline = [*due, signal.SIGTERM], time.monotonic() + PATIENCE
        for pid in running.values():
            for number in due:  # to the rank alone: what it has started ends with it, or is needed until it has saved
                os.kill(pid, number if number in signals.SIGNALS else signal.SIGTERM)
            if time.monotonic() > deadline:
                kill(pid)
        time.sleep(POLL if running else 0)
    return [*failures, *((rank, -signal.SIGKILL) for rank in running)]


def kill(pid: int) -> None:
    """Kill a rank and the processes that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # no group of its own yet, or it has ended
        os.kill(pid, signal.SIGKILL)


def exit_status(failures: Sequence[tuple[int, int]], received: Sequence[signal.Signals]) -> int:
    """The exit status for these failures of ranks, and print what the ranks could not."""
    if not failures:
        return DONE
    if received:
        log.error("stopped by %s; the same command resumes", received[0].name)
    rank, status = next((failure for failure in failures if failure[1] != STOPPED), failures[0])
    if status < 0:
        what = signal.Signals(-status).name + (OUT_OF_MEMORY if -status == signal.SIGKILL else "")
        log.error("rank %d was ended by %s; the same command resumes from the last checkpoint", rank, what)
        return SIGNAL_BASE - status
    return status
