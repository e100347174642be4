"""Workers: shared memory, answers in order, errors by type, and no process that outlives its rank."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import is_running

from mae_dist.data.workers import Workers, shared_array
from mae_dist.errors import MachineFault, RankError, WorkerLost


@pytest.mark.parametrize("number", [0, 1, 3])
def test_workers_fill_shared_memory_and_answer_in_order(number: int) -> None:
    places = shared_array((20,), np.int64)

    def work(place: int) -> None:
        time.sleep(0.01 * (place % 3))
        places[place] = place + 1

    workers = Workers(work, number)
    for place in range(20):
        workers.send(place)
    for place in range(20):
        workers.wait()
        assert places[place] == place + 1
    workers.stop()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("bad tar"), RankError),
        (MachineFault("bad disk"), MachineFault),
        (KeyError("bad code"), Exception),
        (OSError(errno.EIO, "bad disk"), MachineFault),
        (OSError(errno.EACCES, "bad rights"), RankError),
        (MemoryError("bad size"), MachineFault),
        (RuntimeError("DefaultCPUAllocator: bad size"), MachineFault),
    ],
)
def test_workers_raise_the_error_of_a_task_in_its_turn(number: int, error: Exception, raised: type[Exception]) -> None:
    def work(task: int) -> None:
        if task == 1:
            raise error

    workers = Workers(work, number)
    for task in range(3):
        workers.send(task)
    workers.wait()
    with pytest.raises(raised, match=r"bad|out of memory\?") as caught:
        workers.wait()
    assert raised is Exception or type(caught.value) is raised
    assert not isinstance(caught.value, WorkerLost | ValueError) or raised is RankError
    workers.wait()
    workers.stop()


def test_worker_killed_by_sigkill_is_worker_lost() -> None:
    workers = Workers(lambda _: time.sleep(60), 2)
    workers.send(0)
    os.kill(workers.processes[1].pid or 0, signal.SIGKILL)  # not the one that is waited for
    with pytest.raises(WorkerLost, match="a loader process of this rank was killed"):
        workers.wait()
    with pytest.raises(WorkerLost):
        workers.wait()
    workers.stop()


def test_workers_ignore_the_first_stop_signal_of_their_rank() -> None:
    workers = Workers(lambda _: time.sleep(0.2), 1)
    workers.send(0)
    time.sleep(0.1)
    os.kill(workers.processes[0].pid or 0, signal.SIGTERM)
    workers.wait()
    workers.stop()
    assert not workers.processes[0].is_alive()


def test_workers_end_with_the_object_that_started_them() -> None:
    workers = Workers(time.sleep, 2)
    processes = workers.processes
    del workers
    gc.collect()
    assert not any(process.is_alive() for process in processes)


def test_workers_end_after_their_rank_was_killed(tmp_path: Path) -> None:
    """One that waits for a task, and one that sends a result larger than its pipe."""
    script = (
        "import os, time\nfrom pathlib import Path\nfrom mae_dist.data import workers\nworkers.ORPHAN_CHECK = 0.2\n"
        f"pool = workers.Workers(bytes, 2)\npool.send(2**22)\ntime.sleep(0.5)\n"
        f"Path({str(tmp_path / 'pids')!r}).write_text(' '.join(str(p.pid) for p in pool.processes))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2], timeout=60)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
