"""Nothing waits for ever: real hangs in the places in which a run can wait, ended by machine.timeout or a signal."""

from __future__ import annotations

import fcntl
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MAE, SETTINGS, environment, finish_ranks, losses, start_ranks

from mae_dist import train, watchdog
from mae_dist.__main__ import main
from mae_dist.data.workers import Workers
from mae_dist.environment import MEETING_FILE
from mae_dist.run import events
from mae_dist.stages import setup


@pytest.fixture(scope="module")
def tar_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data, but images of no known size, so that loader processes read them."""
    folder = shutil.copytree(tiny_data, tmp_path_factory.mktemp("of-any-size") / "data")
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(re.sub(r'"image_size": (\[.*?\]|\d+)', '"image_size": null', text, flags=re.S))
    return folder


def hurry_at(module: str, name: str) -> None:
    """Make a process impatient as soon as it calls a function, behind which a hang waits for it."""
    owner = pkgutil.resolve_name(f"mae_dist.{module}")
    real = getattr(owner, name)

    def impatient(*arguments: object, **named: object) -> object:
        watchdog.STARTING = watchdog.ANSWER = watchdog.LAST_WORDS = 0.5
        if watchdog._watchdog is not None:
            watchdog._watchdog.shared[watchdog.LIMIT] = 0.5
            watchdog.progress()
        return real(*arguments, **named)

    setattr(owner, name, impatient)


def hang_at(module: str, name: str) -> None:
    """Be impatient at a function's call, which never returns."""
    setattr(pkgutil.resolve_name(f"mae_dist.{module}"), name, lambda *_, **__: threading.Event().wait())
    hurry_at(module, name)


def stop_loader_processes() -> None:
    """Stop each loader process when it begins, as SIGSTOP does; be impatient for its first answer."""
    torch.set_num_threads = lambda _: os.kill(os.getpid(), signal.SIGSTOP)
    hurry_at("data.workers:Workers", "_answer")


def stop_at_step_two(rank: str) -> None:
    """Stop one rank in its second step; the other answers signals soon."""
    watchdog.ANSWER = 0.5
    real = train.train_step

    def step(module: object, state: train.TrainState, *arguments: object) -> object:
        if os.environ["RANK"] == rank and state.step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(module, state, *arguments)  # pyright: ignore

    train.train_step = step  # pyright: ignore


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", f"data.path={data}", f"out={out}", *SETTINGS, *MAE, "train.steps=4", *more]


def test_stopped_loader_process_ends_its_rank_and_is_named(tar_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(1, *words(tar_data, run, "machine.workers=1"), log=log, before=stop_loader_processes)
    finish_ranks(ranks, log, check=1)
    expected = (
        r"mae-dist: rank 0: no progress in \d+ s \(machine.timeout\): it waits for loader process \d+ \(stopped\)"
    )
    assert re.search(expected, log.read_text()), log.read_text()
    (event,) = events.of(run, "fail")
    assert event["reason"] == "hung"
    assert "loader process" in event["message"]


def test_storage_that_hangs_ends_the_rank_and_the_file_is_named(tar_data: Path, tmp_path: Path) -> None:
    data, log = shutil.copytree(tar_data, tmp_path / "data"), tmp_path / "log"
    stuck = sorted(data.glob("train*.tar"))[0]
    ranks = start_ranks(1, *words(data, tmp_path / "run"), log=log, before=partial(read_from_fifo, stuck))
    finish_ranks(ranks, log, check=1)
    assert f"waits for the start of pretrain with data.path={data} (on {stuck}, data/" in log.read_text()


def read_from_fifo(tar: Path) -> None:
    """Let a tar be a FIFO, from which nothing comes, when its first sample is read."""
    hurry_at("stages.setup", "check_first_images")
    impatient = setup.check_first_images

    def check(*arguments: Any) -> None:
        tar.unlink()
        os.mkfifo(tar)
        impatient(*arguments)

    setup.check_first_images = check


def test_lock_of_another_process_ends_the_rank(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    with (run / ".lock").open("w") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        ranks = start_ranks(1, *words(tiny_data, run), log=log, before=partial(hurry_at, "run.lock", "try_lock"))
        finish_ranks(ranks, log, check=1)
    assert f"waits for the lock of {run}" in log.read_text()


def test_save_that_hangs_ends_the_rank(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(1, *words(tiny_data, run), log=log, before=partial(hang_at, "run.checkpoint", "sync_folder"))
    finish_ranks(ranks, log, check=1)
    assert f"waits for the checkpoint that is being written to {run}" in log.read_text()
    assert len(losses(run)) == 4


def test_library_that_waits_with_pythons_lock_held_ends_the_rank(tiny_data: Path, tmp_path: Path) -> None:
    file, log = tmp_path / "ranks", tmp_path / "log"
    with file.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = partial(meet_in, str(file))
        ranks = start_ranks(2, *words(tiny_data, tmp_path / "run"), log=log, before=before)
        finish_ranks(ranks, log, check=-signal.SIGKILL)
    assert f"mae-dist: rank 1: waits on {file} in a library for " in log.read_text()


def meet_in(file: str) -> None:
    """Let ranks meet in a file, impatiently."""
    os.environ[MEETING_FILE] = file
    hurry_at("rendezvous", "meet")


def test_signal_is_answered_while_a_collective_waits_for_a_stopped_rank(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    first, second = start_ranks(2, *words(tiny_data, run), log=log, before=partial(stop_at_step_two, "1"))
    while not re.search(r"State:\s+T", Path(f"/proc/{second.pid}/status").read_text()):
        assert first.is_alive(), log.read_text()
        time.sleep(0.05)
    os.kill(first.pid or 0, signal.SIGTERM)
    first.join(60)
    second.kill()
    second.join()
    assert first.exitcode == 128 + signal.SIGTERM, log.read_text()
    said = log.read_text()
    assert "mae-dist: rank 0: got SIGTERM and waits for step 2 (" in said
    assert [event["reason"] for event in events.of(run, "fail")] == ["hung"]


def test_machine_timeout_is_the_limit_and_several_ranks_let_collectives_fail_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = []
    monkeypatch.setattr(watchdog.Watchdog, "__enter__", lambda self: limits.append(self.shared[watchdog.LIMIT]))
    monkeypatch.setattr(watchdog.Watchdog, "__exit__", lambda *_: None)
    for variables in ({}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(words(tmp_path / "none", tmp_path / "run", "machine.timeout=7")) == 2
    assert limits == [7, 7 + 15]


def test_time_in_which_a_process_was_stopped_is_no_time_without_progress() -> None:
    code = (
        "import os, time; from mae_dist import watchdog\n"
        "with watchdog.watching(3):\n watchdog.progress(); print('x', flush=True); time.sleep(2.2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0


def test_progress_of_a_forked_process_counts_and_its_signals_do_not() -> None:
    with watchdog.watching(1e6):
        dog = watchdog._watchdog
        assert dog is not None

        def work(_: int) -> None:
            watchdog.progress()
            os.kill(os.getpid(), signal.SIGTERM)  # which a loader process ignores once
            time.sleep(0.01)

        workers, before = Workers(work, 1), dog.shared[watchdog.PROGRESS]
        workers.send(0)
        while dog.shared[watchdog.PROGRESS] == before:
            time.sleep(0.01)
        workers.wait()
        workers.stop()
        time.sleep(0.05)
        assert dog.signal is None


def test_process_whose_work_is_over_ends_though_a_library_waits_at_the_exit() -> None:
    code = "import atexit, threading; from mae_dist import watchdog\nwatchdog.LEAVING = 0.2\n"
    code += "atexit.register(threading.Event().wait)\nwatchdog.leave(75)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False).returncode == 75
