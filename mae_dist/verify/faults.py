"""The kinds of harm that `mae-dist chaos` does to a run: each a function that strikes and waits for the recovery.

What each expects of the run, beyond going on, is in its code: what must be in the log, how many steps may be done
again. NotRecovered says what was missing. Which rank, tar or byte it hits follows from the fault's numbers.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mae_dist.data.index import open_split
from mae_dist.data.order import Order, share
from mae_dist.run import checkpoint
from mae_dist.run.layout import step_of
from mae_dist.schema import PretrainConfig
from mae_dist.verify import inject_nan
from mae_dist.verify.torchrun import NotRecovered, Recovery, TorchrunRun

LEAD = 8
"""Steps from writing the poison to the first step that it spoils; ranks read it in every step."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: injected after `step`; `target_rank` picks a rank or a tar, `where` (0..1) a place."""

    number: int
    kind: str
    step: int
    target_rank: int
    where: float


@dataclass(frozen=True)
class Target:
    """The run that is harmed: its job and settings, the ranks it began with, and the planned order of its samples."""

    job: TorchrunRun
    config: PretrainConfig
    processes: int
    order: Order
    poison: Path

    def rank(self, fault: Fault) -> int:
        """The rank that a fault hits."""
        return fault.target_rank % self.job.processes


def kill_rank(patient: Target, fault: Fault) -> Recovery:
    """SIGKILL one rank: torchrun starts all again."""
    patient.job.signal(patient.job.ranks()[patient.rank(fault)], signal.SIGKILL)
    return patient.job.resumed()


def power_loss(patient: Target, _: Fault) -> Recovery:
    """SIGKILL the launcher, all ranks and all workers at once; the command is typed again."""
    patient.job.kill()
    patient.job.start()
    return patient.job.resumed()


def stop_launcher(patient: Target, _: Fault) -> Recovery:
    """SIGTERM to torchrun: all save and leave, no step is done again; the command is typed again."""
    patient.job.stop()
    patient.job.start()
    return patient.job.resumed(most=0)


def stop_rank(patient: Target, fault: Fault) -> Recovery:
    """SIGUSR1 or SIGUSR2 to one rank: all save and leave, torchrun starts them again, no step is done again."""
    number = signal.SIGUSR1 if fault.where < 0.5 else signal.SIGUSR2
    patient.job.signal(patient.job.ranks()[patient.rank(fault)], number)
    return patient.job.resumed(most=0)


def hang(patient: Target, fault: Fault) -> Recovery:
    """SIGSTOP one rank: after machine.timeout the others name it and leave, torchrun ends it and starts all again."""
    patient.job.signal(patient.job.ranks()[patient.rank(fault)], signal.SIGSTOP)
    return patient.job.resumed(f"rank {patient.rank(fault)} did not answer")


def kill_worker(patient: Target, fault: Fault) -> Recovery:
    """SIGKILL a loader worker of one rank: the rank leaves in words, torchrun starts all again."""
    workers = patient.job.workers(patient.rank(fault))
    if not workers:
        raise NotRecovered(f"rank {patient.rank(fault)} has no loader worker to kill: is machine.workers 0?")
    patient.job.signal(workers[int(fault.where * len(workers))], signal.SIGKILL)
    return patient.job.resumed("a loader process of this rank was killed")


def truncated_tar(patient: Target, fault: Fault) -> Recovery:
    """Cut a tar that is being read: the run must end naming it, and go on once the tar is back."""
    tars = open_split(patient.config.data.path, patient.config.data.split).tars
    tar = tars[fault.target_rank % len(tars)]
    content = tar.read_bytes()
    os.truncate(tar, int(fault.where * 0.5 * len(content)))
    try:
        patient.job.wait(lambda: str(tar) in patient.job.said(), f"it complains of {tar.name}")
    finally:
        with tar.open("r+b") as stream:  # in place, as whoever has it open must see it too
            stream.write(content)
    return patient.job.resumed(str(tar))


def nan(patient: Target, fault: Fault) -> Recovery:
    """NaN from one rank in as many steps as make the run go back to its last checkpoint; done again, they are clean."""
    job, train = patient.job, patient.config.train
    first = job.step() + LEAD
    place = share(train.global_batch, patient.rank(fault), job.processes)[0]
    positions = [(first + i) * train.global_batch + place for i in range(patient.config.checkpoint.rewind_after)]
    inject_nan.write(patient.poison, [pair for p in positions for pair in pairs_of(patient.order, p)])
    job.wait(lambda: len(job.lines("rewinds.jsonl")) > job.num_rewinds, "it goes back to its last checkpoint")
    rewind = job.lines("rewinds.jsonl")[-1]
    job.wait(lambda: job.step() > rewind["step"], f"step {rewind['step'] + 1} is done")
    if rewind["left_out"]:
        raise NotRecovered(f"a fault that passed made it leave out the samples {rewind['left_out']}")
    return Recovery(rewind["step"], rewind["to"])


def pairs_of(order: Order, position: int) -> list[inject_nan.Pair]:
    """The (epoch, sample id) at a position of the stream."""
    epochs, ids = order.at(position, position + 1)
    return list(zip(epochs.tolist(), ids.tolist(), strict=True))


def disk_full(patient: Target, _: Fault) -> Recovery:
    """No room for the next checkpoint: the run goes on, the last good one is whole, and a later one is saved."""
    job = patient.job
    good = newest(patient)
    with file_size_limit(job.ranks(), size_limit(patient)):
        job.wait(lambda: "could not be written" in job.said(), "it says that a checkpoint could not be written")
        if (damage := checkpoint.verify(newest(patient))) is not None:
            raise NotRecovered(f"{newest(patient).name}, the last good checkpoint, is damaged: {damage}")
    failed = job.step()
    job.wait(lambda: newest(patient) > good, "a later checkpoint is saved")
    if (damage := checkpoint.verify(newest(patient))) is not None:
        raise NotRecovered(f"{newest(patient).name}, the first after the disk was full, is damaged: {damage}")
    if len(job.starts()) > job.num_starts:
        raise NotRecovered("a full disk ended the ranks, which had to go on")
    job.wait(lambda: job.step() > failed, f"step {failed + 1} is done")
    return Recovery(failed, failed)


@contextmanager
def file_size_limit(pids: list[int], limit: int) -> Iterator[None]:
    """No file of these processes grows beyond `limit` bytes meanwhile, as on a full disk (EFBIG for ENOSPC)."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            if Path(f"/proc/{pid}").exists():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def size_limit(patient: Target) -> int:
    """A size that a checkpoint exceeds and every other file that the ranks write does not."""
    run = patient.job.run
    needed = max(file.stat().st_size for file in newest(patient).iterdir())
    others = [file.stat().st_size for file in run.path.iterdir() if file.is_file()]
    limit = (max(*others, patient.job.log.stat().st_size) + needed) // 2
    if limit > 0.8 * needed:
        raise NotRecovered(f"checkpoint files of {needed} bytes are hardly larger than the logs: take a larger model")
    return limit


def kill_in_save(patient: Target, _: Fault) -> Recovery:
    """SIGKILL everything while a checkpoint is being written; the command is typed again."""
    job = patient.job

    def caught() -> bool:
        """Whether everything stands still with a save unfinished."""
        if not saving(patient):
            return False
        pids = [process.pid for process in job.found()]
        for pid in pids:
            job.signal(pid, signal.SIGSTOP)
        if saving(patient):
            return True
        for pid in pids:
            job.signal(pid, signal.SIGCONT)
        return False

    job.wait(caught, "a checkpoint is being written", poll=0.0005)
    job.kill()
    if not saving(patient):
        raise NotRecovered("chaos missed the save that it wanted to kill")
    job.start()
    return job.resumed()


def saving(patient: Target) -> list[Path]:
    """Checkpoints that are being written."""
    return list((patient.job.run.path / "checkpoints").glob(".saving-*"))


def damaged_checkpoint(patient: Target, fault: Fault) -> Recovery:
    """Flip a byte of the newest checkpoint while the run is stopped: it must name it and go on from the one before."""
    patient.job.stop()
    before, damaged = patient.job.run.checkpoints()[-2:]
    file = max(damaged.iterdir(), key=lambda file: file.stat().st_size)
    with file.open("r+b") as stream:
        place = int(fault.where * file.stat().st_size)
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    patient.job.start()
    recovery = patient.job.resumed(damaged.name)
    if recovery.resumed != step_of(before):
        raise NotRecovered(f"resumed at step {recovery.resumed}, not from {before.name}, the one before the damaged")
    return recovery


def resize(patient: Target, fault: Fault) -> Recovery:
    """SIGTERM to torchrun, then the command with a rank more or less than at first; no step is done again."""
    job, first = patient.job, patient.processes
    others = [count for count in (first - 1, first, first + 1) if count >= 2 and count != job.processes]
    job.stop()
    job.processes = others[fault.target_rank % len(others)]
    job.start()
    return job.resumed(most=0)


def newest(patient: Target) -> Path:
    """The newest complete checkpoint."""
    paths = patient.job.run.checkpoints()
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
    "kill-in-save": kill_in_save,
    "damaged-checkpoint": damaged_checkpoint,
    "resize": resize,
}
"""Kind -> how it strikes and what counts as survived."""
ELASTIC = "resize"
"""The kind that changes the number of ranks, and hence the rounding."""
