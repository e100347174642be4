"""errors: the exit status and the reason of an event follow from the type of an error, never from its text."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from mae_dist import __main__ as program
from mae_dist import errors
from mae_dist.errors import MachineFault, RankError, RankLost, WorkerLost
from mae_dist.signals import Stopped

STATUSES = [
    (ValueError("train.steps=0"), "user_error", 2),
    (RankError("x.tar: no sample of this tar can be read"), "user_error", 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.yaml"), "user_error", 2),
    (PermissionError(errno.EACCES, "Permission denied", "/root"), "user_error", 2),
    (OSError(errno.EIO, "Input/output error"), "machine_fault", 1),
    (OSError(errno.ENOSPC, "No space left on device"), "machine_fault", 1),
    (OSError(errno.ESTALE, "Stale file handle"), "machine_fault", 1),
    (OSError(errno.EMFILE, "Too many open files"), "machine_fault", 1),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "machine_fault", 1),
    (MachineFault("metrics.jsonl: cannot be written"), "machine_fault", 1),
    (RankLost("rank 1 did not answer"), "rank_lost", 1),
    (WorkerLost("a loader process was killed"), "worker_lost", 1),
    (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", 1),
    (MemoryError(), "out_of_memory", 1),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"), "out_of_memory", 1),
]


@pytest.mark.parametrize(("error", "reason", "status"), STATUSES, ids=lambda part: type(part).__name__)
def test_exit_status_and_reason_follow_from_the_type(
    error: Exception, reason: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(program, "dispatch", fail)
    assert errors.reason(error) == reason
    assert program.main(["pretrain"]) == errors.exit_status(error) == status
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("mae-dist: ")


def test_memory_that_torch_does_not_get_is_one_sentence_with_the_settings_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "dispatch", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert program.main(["pretrain"]) == errors.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    for setting in ("machine.micro_batch", "machine.workers", "machine.activation_checkpointing"):
        assert setting in line


def test_crash_is_raised_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("DataLoader worker? connection timed out?")

    monkeypatch.setattr(program, "dispatch", fail)
    with pytest.raises(RuntimeError) as caught:
        program.main(["pretrain"])
    assert errors.reason(caught.value) == "crash"
    assert errors.exit_status(caught.value) == errors.FAILED


@pytest.mark.parametrize(("error", "status"), [(Stopped("saved at step 3"), 75), (KeyboardInterrupt(), 130)])
def test_exit_status_of_a_stop(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(program, "dispatch", fail)
    assert program.main(["pretrain"]) == status


def test_error_of_all_ranks_is_printed_by_rank_0_and_a_rank_error_by_its_rank() -> None:
    assert [errors.is_reported_by(rank, ValueError("data.path=x")) for rank in (0, 1)] == [True, False]
    for own in (
        RankError("x.tar"),
        FileNotFoundError("x"),
        WorkerLost("killed"),
        OSError(errno.EIO, "I/O"),
        RuntimeError("shape"),
    ):
        assert [errors.is_reported_by(rank, own) for rank in (0, 1)] == [True, True]
    assert not errors.is_reported_by(0, RankLost(""))


def test_os_error_is_a_machine_fault_only_where_the_storage_failed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        os.stat(tmp_path / "nowhere")
    assert type(errors.from_os_error(caught.value, "x")) is ValueError
    assert type(errors.from_os_error(OSError(errno.EDQUOT, "quota"), "x")) is MachineFault
