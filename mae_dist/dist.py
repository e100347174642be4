"""Processes: the group from the environment, rank and world, a few collectives by name, and starting several ranks.

A single process is a group of one, so nobody else asks whether there is a group. Apart from `parallel` and `checkpoint`
this is the only file that knows torch.distributed.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mae_dist import stop

log = logging.getLogger(__name__)
T = TypeVar("T")


class RankError(ValueError):
    """A user's error that this rank alone has met, so that this rank must tell it."""


TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a rank before it fails."""


def launched() -> bool:
    """Whether torchrun (or a launcher that sets its variables) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def setup() -> torch.device:
    """Join the process group that the environment describes; give this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if launched():
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(shutdown)
    return device


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 to world - 1."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is rank 0, the one that writes."""
    return rank() == 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether any rank says so. Travels between CPUs, so that no rank waits for its device."""
    return bool(sum_(torch.tensor(int(flag))))


def gather(tensor: Tensor) -> Tensor:
    """Concatenate over ranks along dim 0, in rank order; every rank may bring another length."""
    if world() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(count) for count in counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def on_main(action: Callable[[], T]) -> T:
    """Do something on rank 0 and give its result (a plain object), or its error as a ValueError, to every rank."""
    if world() == 1:
        return action()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = action()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


def processes_here(wanted: int | None) -> int:
    """How many ranks to start on this machine: as wanted, else one a GPU, else one."""
    return wanted or max(1, torch.cuda.device_count())


def spawn(argv: list[str], processes: int) -> int:
    """Run `python -m mae_dist ARGV` on several ranks of this machine through torchrun's agent; give the exit status.

    The status is that of the first rank that failed; a rank that was killed makes the others stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.2, run_id=uuid.uuid4().hex,
    )  # fmt: skip
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the agent passes on SIGTERM, but these would end it alone
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        elastic_launch(config, sys.executable)("-m", "mae_dist", *argv)
    except ChildFailedError as error:
        first_rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            log.error("rank %d was ended by %s; the same command goes on from the last checkpoint", first_rank, name)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:  # the ranks were told, and waited for
        log.error("stopped by %s; the same command goes on", signal.Signals(error.sigval).name)
        return stop.REQUEUE
    return 0
