"""The process group from the environment, rank and world size, a few collectives, and naming ranks that are lost.

A single process is a group of one, so no other module checks whether there is a group. Apart from this one only
`rendezvous`, `parallel`, `launcher` and the checkpoints in run/ import torch.distributed.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mae_dist import devices, environment, rendezvous
from mae_dist.errors import FAILED, MachineFault, RankLost, from_os_error
from mae_dist.watchdog import waiting_for

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)
T = TypeVar("T")

ROLL_CALL = 3.0
"""Seconds in which the survivors of a failed collective must report to each other."""
GLOO_MESSAGES = ("gloo", "pair closure", "connection", "timed out", "timeout", "broken pipe")
"""Words in a plain RuntimeError of a failed gloo collective, for which torch has no type (it has one for NCCL and the
store). They decide only whether the rank prints who is lost or a traceback: its exit status is FAILED either way.
"""
RING = 32
"""Up to so many ranks a ring is the faster way: a round takes several messages and Python's time."""
_store: dist.Store | None = None
_timeout = timedelta(minutes=10)


def launched() -> bool:
    """Whether torchrun (or a launcher that sets its variables) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def setup(timeout: float = 600.0, use_gpu: bool = True) -> torch.device:
    """Join the process group that the environment describes, and return this rank's device.

    ``timeout``: seconds that a collective waits for a rank before it fails. ``use_gpu``: false for a process that
    computes nothing, which would take memory on a GPU, and a whole one where only one process may use it. Raises
    ValueError where the ranks' devices do not go together.
    """
    global _store, _timeout
    device = devices.of_rank(int(os.environ.get("LOCAL_RANK", 0))) if use_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _timeout = timedelta(seconds=timeout)
        if launched():
            with waiting_for(lambda: "the other ranks, to meet them"):
                store, number, count = rendezvous.meet(device, _timeout)
            _store = dist.PrefixStore("mae_dist", store)
        else:
            store, number, count = dist.HashStore(), 0, 1
            if use_gpu:
                rendezvous.agree_on_devices(store, number, count, device)
        _connect(store, number, count, device)
        atexit.register(shutdown)
    return device


def _connect(store: dist.Store, number: int, count: int, device: torch.device) -> None:
    """Make the process group, with its connections on CPUs and GPUs. Raises RankLost where the ranks cannot connect."""
    cuda = device.type == "cuda"
    bound = device if cuda and count > 1 else None  # NCCL connects now, and not in the first step
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=number, world_size=count, timeout=_timeout,
            device_id=bound,
        )  # fmt: skip
    except RuntimeError as error:
        if count == 1:
            raise
        name, text = os.environ.get(rendezvous.INTERFACE, "the address of its host name"), " ".join(str(error).split())
        raise RankLost(
            f"rank {number} on {socket.gethostname()} could not connect with the others over {name} ({text:.300}); set "
            f"{rendezvous.INTERFACE} (with GPUs also NCCL_SOCKET_IFNAME) to the network interface that all machines "
            f"share"
        ) from error
    assert dist.group.WORLD is not None
    limit_wait(dist.group.WORLD)


def limit_wait(group: dist.ProcessGroup) -> None:
    """Have the collectives of a group wait for a rank as long as all others do (torch gives those of a device mesh 30
    minutes); between GPUs twice as long: NCCL's watchdog ends the process, which before that names the lost ranks.
    """
    group.set_timeout(_timeout)
    if has_nccl(group):
        group._get_backend(torch.device("cuda"))._set_default_timeout(2 * _timeout)


def has_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group, or that of all ranks, sends between GPUs."""
    return "nccl" in dist.get_backend_config(group)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 to world - 1."""
    return dist.get_rank() if dist.is_initialized() else environment.rank(os.environ)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def is_main() -> bool:
    """Whether this is rank 0, the one that writes."""
    return rank() == 0


def is_first_of_machine() -> bool:
    """Whether this is the rank that asks for all of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which ranks hold shards or copies. Where there is none, its module, which
    imports all of sympy, is not imported.
    """
    return hasattr(tensor, "placements")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The largest value of all ranks. Sent between CPUs, so that no rank waits for its device.

    gloo's own way is a ring of 2 (n - 1) messages one after another: 2,046 between 1,024 ranks. Where there are many,
    a rank hears in each round from the one twice as far before it, and a value has reached all after log2(n) rounds
    (dissemination: Hensgen, Finkel and Manber 1988).
    """
    here, everyone = rank(), world()
    if everyone <= RING:
        box = torch.tensor(value)
        if everyone > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)
    reach = 1
    while reach < everyone:
        heard = torch.empty((), dtype=torch.int64)
        sent = dist.isend(torch.tensor(value), (here + reach) % everyone)
        dist.recv(heard, (here - reach) % everyone)
        assert sent is not None
        sent.wait()
        value, reach = max(value, int(heard)), 2 * reach
    return value


def broadcast(tensor: Tensor) -> None:
    """Overwrite a tensor, in place, with that of rank 0."""
    if world() > 1:
        dist.broadcast(tensor, src=0)


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor over ranks along dim 0, in rank order; its length may differ between ranks."""
    if world() == 1:
        return tensor
    return torch.cat(_gather_parts(tensor))


def _gather_parts(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors of all ranks, in rank order; their lengths along dim 0 may differ."""
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device), group)
    longest = max(int(count) for count in counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded, group)
    return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Values of JSON of all ranks (of `group`, if given), in rank order, on every rank. Sent between CPUs as text:
    torch's own collectives of objects unpickle what comes.
    """
    if world() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _gather_parts(content, group)]


def run_on_rank0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on rank 0 and return its result, a value of JSON, on every rank.

    A ValueError or OSError of it is raised on every rank as a ValueError; a MachineFault, or an OSError of the storage,
    as a MachineFault, whose message is empty on other ranks than 0.
    """
    if world() == 1:
        return action()
    result, error = _attempt(action) if is_main() else (None, None)
    result, failure = _of_rank0([result, _described(error)], group)
    _raise_failure(0, failure, error)
    return result


def run_together(action: Callable[[], T]) -> T:
    """Call `action` on every rank, and return this rank's result once all have one. The first error is raised on every
    rank as by `run_on_rank0`, so that none waits for a rank whose machine lacks a file, say.
    """
    if world() == 1:
        return action()
    result, error = _attempt(action)
    failures = gather_objects(_described(error))
    first = next((number for number, failure in enumerate(failures) if failure), 0)
    _raise_failure(first, failures[first], error)
    return cast("T", result)


def _attempt(action: Callable[[], T]) -> tuple[T | None, ValueError | MachineFault | None]:
    """(result, error) of a call."""
    try:
        return action(), None
    except OSError as error:
        return None, from_os_error(error, str(error))
    except (ValueError, MachineFault) as error:
        return None, error


def _described(error: ValueError | MachineFault | None) -> list[Any] | None:
    """An error of this rank as a value of JSON, with the rank's machine where it is not rank 0."""
    where = "" if is_main() else f" (rank {rank()} on {socket.gethostname()})"
    return None if error is None else [isinstance(error, MachineFault), f"{error}{where}"]


def _raise_failure(number: int, failure: list[Any] | None, error: Exception | None) -> None:
    """Raise the described error of a rank, if there is one; `error` is this rank's own."""
    if failure is not None:
        is_fault, message = failure
        raise (MachineFault(message if number == rank() else "") if is_fault else ValueError(message)) from error


def _of_rank0(value: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """The `value` of rank 0 on every rank, sent as text."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor(len(content))
    dist.broadcast(size, 0, group)
    content = content if is_main() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, 0, group)
    return json.loads(content.numpy().tobytes())


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


def background_group() -> dist.ProcessGroup | None:
    """A process group of all ranks' CPUs for a background thread, whose messages never mix with the loop's."""
    if world() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=_timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def name_lost_ranks(what: Callable[[], str]) -> Iterator[None]:
    """Context manager: raises RankLost instead of the error of a failed collective. Its message names the ranks that
    did not answer and ``what()`` the others were doing.
    """
    try:
        with waiting_for(what):
            yield
    except RuntimeError as error:
        if world() == 1 or not _is_collective_failure(error):
            raise
        log.debug("a collective failed", exc_info=error)
        raise RankLost(_find_missing_ranks(what())) from error


def _is_collective_failure(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in GLOO_MESSAGES)


def _disconnect() -> None:
    """Close this rank's connections, so that a rank that waits for it notices now.

    In a thread that may hang: NCCL waits for collectives that never end. Then this process leaves without it.
    """

    def close() -> None:
        with suppress(RuntimeError):
            if dist.is_initialized() and has_nccl():
                dist.distributed_c10d._abort_process_group()
        with suppress(RuntimeError):
            shutdown()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(ROLL_CALL)
    if closing.is_alive():
        atexit.unregister(shutdown)
        atexit.register(os._exit, FAILED)


def _find_missing_ranks(what: str) -> str:
    """A sentence that names the ranks that do not report within ROLL_CALL; empty on all survivors but the first."""
    here, everyone = rank(), world()
    try:
        assert _store is not None
        _store.set(f"here/{here}", what)
        answered = _store.add("here", 1)
        _disconnect()
        deadline = time.monotonic() + ROLL_CALL
        while time.monotonic() < deadline and answered < everyone:
            time.sleep(0.05)
            answered = _store.add("here", 0)
        silent = []  # the first survivor alone asks for all ranks: a thousand that did would take a minute
        for number in range(everyone):
            if number != here and not _store.check([f"here/{number}"]):
                silent.append(number)
            elif number < here:
                return ""
    except RuntimeError:
        return f"rank {here} lost touch with the others at {what}; the same command resumes from the last checkpoint"
    names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
    blame = f"{names} did not answer" if silent else "the ranks lost touch with each other"
    return f"{blame} at {what}: hung or gone; the same command resumes from the last checkpoint"
