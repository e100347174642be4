"""The kinds of faults that `mae-dist chaos` injects: one function each, which injects it and waits for the recovery.

A run must go on after each fault, and meet what the function checks besides: how many steps were done again, which
events and which names are in its output. NotRecovered says what was missing. The fault's numbers decide which rank, tar
or byte is hit.
"""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mae_dist.data.index import open_split
from mae_dist.data.order import Order, share
from mae_dist.errors import RankLost, WorkerLost
from mae_dist.run import checkpoint, jsonl
from mae_dist.run.layout import step_of
from mae_dist.schema import PretrainConfig
from mae_dist.verify.torchrun import NotRecovered, Recovery, TorchrunRun

LEAD = 8
"""Steps between listing samples for inject_nan and the first step that has them; ranks read the list in every step."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: injected after `step`. `choice` selects a rank, tar or number of ranks, `where` (0 to 1) a
    position in a file or list."""

    number: int
    kind: str
    step: int
    choice: int
    where: float


@dataclass(frozen=True)
class Target:
    """The run that faults are injected into, its settings, its first number of ranks, its planned order of samples, and
    the files that inject_nan and inject_io read."""

    job: TorchrunRun
    config: PretrainConfig
    num_ranks: int
    order: Order
    nan_samples: Path
    io_faults: Path

    def rank(self, fault: Fault) -> int:
        """The rank that a fault hits."""
        return fault.choice % self.job.num_ranks


def kill_rank(target: Target, fault: Fault) -> Recovery:
    """SIGKILL to one rank: torchrun restarts all ranks."""
    target.job.signal(target.job.ranks()[target.rank(fault)], signal.SIGKILL)
    return target.job.wait_until_resumed()


def power_loss(target: Target, _: Fault) -> Recovery:
    """SIGKILL to the launcher, all ranks and all workers at once; the command is started again."""
    target.job.kill()
    target.job.start()
    return target.job.wait_until_resumed()


def stop_launcher(target: Target, _: Fault) -> Recovery:
    """SIGTERM to torchrun: all ranks save and end; the command is started again, no step is done twice."""
    target.job.stop()
    target.job.start()
    return target.job.wait_until_resumed(max_redone=0)


def stop_rank(target: Target, fault: Fault) -> Recovery:
    """SIGUSR1 or SIGUSR2 to one rank: all ranks save and end, torchrun restarts them, no step is done twice."""
    number = signal.SIGUSR1 if fault.where < 0.5 else signal.SIGUSR2
    target.job.signal(target.job.ranks()[target.rank(fault)], number)
    return target.job.wait_until_resumed(max_redone=0)


def hang(target: Target, fault: Fault) -> Recovery:
    """SIGSTOP to one rank: after machine.timeout the others name it and end, torchrun restarts all ranks."""
    target.job.signal(target.job.ranks()[target.rank(fault)], signal.SIGSTOP)
    recovery = target.job.wait_until_resumed()
    lost = [event for event in target.job.new_events("fail") if event["reason"] == RankLost.reason]
    failures = [event["message"] for event in lost if event["rank"] != target.rank(fault)]
    if not any(f"rank {target.rank(fault)} " in message for message in failures):
        raise NotRecovered(f"it went on, but no event names rank {target.rank(fault)} as lost: {failures}")
    return recovery


def kill_worker(target: Target, fault: Fault) -> Recovery:
    """SIGKILL to a loader worker of one rank: the rank reports it and ends, torchrun restarts all ranks."""
    workers = target.job.workers(target.rank(fault))
    if not workers:
        raise NotRecovered(f"rank {target.rank(fault)} has no loader worker to kill: is machine.workers 0?")
    target.job.signal(workers[int(fault.where * len(workers))], signal.SIGKILL)
    recovery = target.job.wait_until_resumed()
    failed = [event["rank"] for event in target.job.new_events("fail") if event["reason"] == WorkerLost.reason]
    if target.rank(fault) not in failed:
        raise NotRecovered(f"it went on, but its events name ranks {failed} for lost workers")
    return recovery


def truncated_tar(target: Target, fault: Fault) -> Recovery:
    """A tar that is being read is truncated: the run must end and name it, and go on once the tar is restored."""
    tars = open_split(target.config.data.path, target.config.data.split).tars
    tar = tars[fault.choice % len(tars)]
    content = tar.read_bytes()
    os.truncate(tar, int(fault.where * 0.5 * len(content)))
    try:
        target.job.wait(lambda: str(tar) in target.job.output(), f"its output names {tar.name}")
    finally:
        with tar.open("r+b") as stream:  # in place: processes that have it open must see it too
            stream.write(content)
    return target.job.wait_until_resumed()


def nan(target: Target, fault: Fault) -> Recovery:
    """NaN losses on one rank in enough steps in a row for a rewind; done again, the steps are finite."""
    job, train = target.job, target.config.train
    first = job.step() + LEAD
    offset = share(train.global_batch, target.rank(fault), job.num_ranks)[0]
    positions = [(first + i) * train.global_batch + offset for i in range(target.config.checkpoint.rewind_after)]
    drawn = [target.order.at(position, position + 1) for position in positions]
    pairs = [(int(epochs[0]), int(ids[0])) for epochs, ids in drawn]
    jsonl.write_atomic(target.nan_samples, json.dumps(pairs))
    job.wait(lambda: job.new_events("rewind"), "it rewinds to its last checkpoint")
    rewind = job.new_events("rewind")[-1]
    job.wait(lambda: job.step() > rewind["step"], f"step {rewind['step'] + 1} is done")
    if rewind["left_out"]:
        raise NotRecovered(f"after a passing fault it left out the samples {rewind['left_out']}")
    return Recovery(rewind["step"], rewind["to"])


def disk_full(target: Target, _: Fault) -> Recovery:
    """A full disk during a save: the run reports it and goes on, older checkpoints stay, a later save succeeds."""
    job, good = target.job, newest(target)
    with file_size_limit(job.ranks(), size_limit(target)):
        job.wait(lambda: str(good.parent) in job.output(), f"its output names {good.parent}, where a save failed")
        check_newest(target, "the last good checkpoint")
    job.wait(lambda: newest(target) > good, "a later checkpoint is saved")
    check_newest(target, "the first after the disk was full")
    return went_on(target, "write")


@contextmanager
def file_size_limit(pids: list[int], limit: int) -> Iterator[None]:
    """Context manager: these processes write no file beyond `limit` bytes, as on a full disk (EFBIG for ENOSPC)."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            if Path(f"/proc/{pid}").exists():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def size_limit(target: Target) -> int:
    """Bytes that the largest file of a checkpoint exceeds and no other file that the ranks write."""
    run = target.job.run
    needed = max(file.stat().st_size for file in newest(target).iterdir())
    others = [file.stat().st_size for file in run.path.iterdir() if file.is_file()]
    limit = (max(*others, target.job.log.stat().st_size) + needed) // 2
    if limit > 0.8 * needed:
        raise NotRecovered(f"checkpoint files of {needed} bytes are hardly larger than the logs: use a larger model")
    return limit


def no_rmtree(target: Target, _: Fault) -> Recovery:
    """Old checkpoints that cannot be removed: the run warns and goes on, and the new ones count."""
    return save_without(target, "rmtree", "could not be removed")


def no_fsync(target: Target, _: Fault) -> Recovery:
    """A file system without fsync: the run warns once and goes on, and its checkpoints count."""
    return save_without(target, "fsync", "")  # another start of the run may have warned already


def save_without(target: Target, call: str, warning: str) -> Recovery:
    """Let a call of the file system fail until a checkpoint more is saved and the run has warned of it."""
    job, good = target.job, newest(target)
    with io_fault(target, call):
        job.wait(lambda: warning in job.output() and newest(target) > good, f"a checkpoint is saved without {call}")
        check_newest(target, f"saved without {call}")
    return went_on(target, call)


def eio(target: Target, _: Fault) -> Recovery:
    """Reads that fail with EIO: every rank names the tar and reads again until the disk answers; none ends."""
    job = target.job
    with io_fault(target, "pread"):
        job.wait(lambda: "EIO" in job.output(), "its output names EIO")
    return went_on(target, "pread")


def went_on(target: Target, call: str) -> Recovery:
    """The recovery of a run that a fault must not have ended: a step more, in the same start."""
    job, failed = target.job, target.job.step()
    job.wait(lambda: job.step() > failed, f"step {failed + 1} is done")
    if job.new_events("start"):
        raise NotRecovered(f"a failed {call} ended the ranks, which must go on")
    return Recovery(failed, failed)


@contextmanager
def io_fault(target: Target, call: str) -> Iterator[None]:
    """Context manager: this function of `inject_io` fails in all ranks."""
    jsonl.write_atomic(target.io_faults, call)
    try:
        yield
    finally:
        target.io_faults.unlink()


def kill_in_save(target: Target, _: Fault) -> Recovery:
    """SIGKILL to all processes while a checkpoint is written; the command is started again."""
    job = target.job

    def frozen_in_save() -> bool:
        """Stop all processes if a save is unfinished; whether it still was when they had stopped."""
        if not saving(target):
            return False
        pids = [process.pid for process in job.processes()]
        for pid in pids:
            job.signal(pid, signal.SIGSTOP)
        if saving(target):
            return True
        for pid in pids:
            job.signal(pid, signal.SIGCONT)
        return False

    job.wait(frozen_in_save, "a checkpoint is being written", poll=0.0005)
    job.kill()
    if not saving(target):
        raise NotRecovered("chaos did not kill the run during a save")
    job.start()
    return job.wait_until_resumed()


def saving(target: Target) -> list[Path]:
    """The folders of unfinished saves."""
    return list((target.job.run.path / "checkpoints").glob(".saving-*"))


def damaged_checkpoint(target: Target, fault: Fault) -> Recovery:
    """A flipped bit in the newest checkpoint of the stopped run: it must name it and go on from the one before."""
    target.job.stop()
    before, damaged = target.job.run.checkpoints()[-2:]
    file = max(damaged.iterdir(), key=lambda file: file.stat().st_size)
    with file.open("r+b") as stream:
        offset = int(fault.where * file.stat().st_size)
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))
    target.job.start()
    recovery = target.job.wait_until_resumed()
    if damaged.name not in target.job.output():
        raise NotRecovered(f"it went on, but its output does not name {damaged.name}")
    if recovery.resumed != step_of(before):
        raise NotRecovered(f"resumed at step {recovery.resumed}, not from {before.name}, the last undamaged checkpoint")
    return recovery


def resize(target: Target, fault: Fault) -> Recovery:
    """SIGTERM to torchrun, then the command with another number of ranks; no step is done twice."""
    job, first = target.job, target.num_ranks
    others = [count for count in (first - 1, first, first + 1) if count >= 2 and count != job.num_ranks]
    job.stop()
    job.num_ranks = others[fault.choice % len(others)]
    job.start()
    return job.wait_until_resumed(max_redone=0)


def check_newest(target: Target, what: str) -> None:
    """Raise NotRecovered where the newest checkpoint is damaged; ``what`` it is."""
    path = newest(target)
    if (damage := checkpoint.verify(path)) is not None:
        raise NotRecovered(f"{path.name}, {what}, is damaged: {damage}")


def newest(target: Target) -> Path:
    """The newest complete checkpoint; NotRecovered if there is none."""
    paths = target.job.run.checkpoints()
    if not paths:
        raise NotRecovered("there is no checkpoint yet")
    return paths[-1]


KINDS: dict[str, Callable[[Target, Fault], Recovery]] = {
    "kill-rank": kill_rank,
    "power-loss": power_loss,
    "stop-launcher": stop_launcher,
    "stop-rank": stop_rank,
    "hang": hang,
    "kill-worker": kill_worker,
    "truncated-tar": truncated_tar,
    "nan": nan,
    "disk-full": disk_full,
    "no-rmtree": no_rmtree,
    "no-fsync": no_fsync,
    "eio": eio,
    "kill-in-save": kill_in_save,
    "damaged-checkpoint": damaged_checkpoint,
    "resize": resize,
}
"""Kind -> the function that injects it; its docstring is the help text of the kind."""
ELASTIC = "resize"
"""The kind that changes the number of ranks, and so the order of float sums."""
