"""Runs that are interrupted, with real processes: kill -9, signals, hung ranks, a full disk."""

import os
import resource
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from running import (
    MAE,
    SETTINGS,
    finish_ranks,
    losses,
    ranks_of,
    records,
    start_launcher,
    start_ranks,
    unpickle_nothing,
    wait_until,
    weights,
)  # fmt: skip

from mae_dist import launcher
from mae_dist.__main__ import main
from mae_dist.data import loader
from mae_dist.errors import FAILED, MachineFault
from mae_dist.run import events


def test_machine_fault_before_the_first_step_is_recorded_with_its_reason(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MachineFault("x.tar: Input/output error")

    monkeypatch.setattr(loader, "open_source", fail)
    out = tmp_path / "run"
    assert main(["pretrain", f"data.path={tiny_data}", f"out={out}", *SETTINGS, *MAE, "train.steps=2"]) == FAILED
    (failure,) = events.of(out, "fail")
    assert (failure["reason"], failure["rank"], failure["message"]) == ("machine_fault", 0, "x.tar: Input/output error")
    assert "x.tar: Input/output error" in capsys.readouterr().err


def test_after_kill_nine_the_same_command_goes_on_to_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    """On three ranks, as a sum of two is the same in either order."""

    def words(out: str) -> list[str]:
        return ["pretrain", f"data.path={tiny_data}", f"out={tmp_path / out}", *SETTINGS, *MAE, "train.steps=12",
                "checkpoint.every=4", "machine.processes=3", "train.global_batch=6", "train.ema=0.9"]  # fmt: skip

    log = tmp_path / "log"
    finish_ranks(start_ranks(3, *words("undisturbed"), log=log), log)
    killed = tmp_path / "killed"
    process = start_launcher(*words("killed"), log=log)
    saved = killed / "checkpoints/step-000000004"  # written in the background, so it may be there later than step 5
    wait_until(lambda: saved.is_dir() and len(losses(killed)) >= 5, [process], log)
    os.kill(ranks_of(process.pid or 0)[-1], signal.SIGKILL)
    finish_ranks([process], log, check=128 + signal.SIGKILL)
    said = log.read_text()
    assert "SIGKILL" in said
    assert "the same command resumes" in said
    assert not (killed / "result.json").exists()
    with (killed / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 99, "lo')  # what a kill in the middle of a write leaves

    finish_ranks(start_ranks(3, *words("killed"), log=log, before=unpickle_nothing), log)
    assert "resumed at step" in log.read_text()
    assert [r["step"] for r in records(killed) if "loss" in r] == list(range(1, 13))
    assert losses(killed) == losses(tmp_path / "undisturbed")
    first, second = weights(tmp_path / "undisturbed"), weights(killed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "ema.backbone.cls_token" in first
    starts = [event["step"] for event in events.of(killed, "start")]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 4
    assert starts[1] % 4 == 0


def at_step(run: Path, step: int) -> bool:
    """Whether a run has recorded so many steps."""
    return (run / "metrics.jsonl").is_file() and len(losses(run)) >= step


def test_a_signal_to_one_rank_makes_all_save_together_and_ask_to_be_started_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=400"]
    ranks = start_ranks(2, *words, log=log)
    wait_until(lambda: at_step(run, 5), ranks, log)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGUSR1)
    while ranks[1].is_alive():  # again and again, also while it leaves
        with suppress(ProcessLookupError):
            os.kill(ranks[1].pid, signal.SIGTERM)
        time.sleep(0.002)
    finish_ranks(ranks, log, check=75)
    saved_together(run, log.read_text())


def test_sigterm_to_the_launcher_makes_all_ranks_save_together_and_ask_to_be_started_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=400"]
    process = start_launcher(*words, "machine.processes=2", log=log)
    wait_until(lambda: at_step(run, 5), [process], log)
    process.terminate()
    finish_ranks([process], log, check=75)
    saved_together(run, log.read_text())


def saved_together(run: Path, said: str) -> None:
    step = len(losses(run))
    assert f"stopped and saved at step {step}" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:09d}"]
    assert not (run / "result.json").exists()


def hurry_launcher() -> None:
    """Have the launcher kill soon what it cannot stop."""
    launcher.PATIENCE = 1


def test_a_hung_rank_is_named_with_its_step_and_ends_the_launcher(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=4000"]
    process = start_launcher(*words, "machine.timeout=3", "machine.processes=2", log=log, before=hurry_launcher)
    wait_until(lambda: at_step(run, 5), [process], log)
    os.kill(ranks_of(process.pid or 0)[1], signal.SIGSTOP)
    finish_ranks([process], log, check=1)
    step = len(losses(run)) + 1  # or the next, if it hung in the exchange after a step, before its line
    sentences = [f"rank 1 did not answer at step {number}: hung or gone" for number in (step, step + 1)]
    assert any(sentence in log.read_text() for sentence in sentences), log.read_text()


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "checkpoint.every=2",
             "train.steps=4"]  # fmt: skip
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    finish_ranks(start_ranks(2, *words, log=log, before=limit), log, check=1)
    lines = log.read_text().strip().splitlines()
    (first,) = [line for line in lines if "the checkpoint of step 2 could not be written" in line]
    assert "Training continues" in first
    assert lines[-1].startswith("mae-dist: the checkpoint of step 4 could not be written")
    found = losses(run)
    assert len(found) == 4
    assert not list((run / "checkpoints").iterdir())
    finish_ranks(start_ranks(2, *words, log=log), log)
    assert losses(run) == found
    assert len(list((run / "checkpoints").iterdir())) == 2
