"""The launcher of ranks on one machine: how it starts them, what it does when one ends or a signal comes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import running
import torch
from running import (
    MAE,
    SETTINGS,
    is_running,
    losses,
    ranks_of,
    start_launcher,
    wait_until,
)  # fmt: skip

from mae_dist import environment, launcher, rendezvous
from mae_dist.run import events


def spawn(monkeypatch: pytest.MonkeyPatch, code: str, ranks: int = 2, restarts: int = 0) -> int:
    """The exit status of a launcher in this process, whose ranks are new processes that execute `code`."""
    first = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
    monkeypatch.setattr(environment, "python", lambda: [sys.executable, "-S", "-c", first + code])
    return launcher.spawn(["pretrain"], ranks, restarts)


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("sys.exit(0)", 0, ""),
        ("time.sleep(0 if rank else 60); sys.exit(3)", 3, ""),
        ("time.sleep(0 if rank else 60); os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was ended by SIGKILL, mo"),
        ("time.sleep(0 if rank else 60); os.abort()", 134, "rank 1 was ended by SIGABRT; the same command resumes"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: sys.exit(5)\ntime.sleep(60)", 5, ""),
    ],
)
def test_exit_status_is_that_of_the_first_rank_that_failed_and_the_others_are_stopped(
    code: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "PATIENCE", 0.3)
    assert spawn(monkeypatch, code) == status
    assert (message in caplog.text) if message else not caplog.text


def test_ranks_that_are_lost_are_started_again_and_those_with_a_final_status_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "open(str(rank), 'a').write('x'); "
    assert spawn(monkeypatch, f"{note} sys.exit(os.stat('0').st_size < 3 if not rank else 0)", restarts=3) == 0
    assert Path("0").read_text() == "xxx"
    assert spawn(monkeypatch, f"{note} sys.exit(0 if rank else 2)", restarts=3) == 2
    assert Path("0").read_text() == "xxxx"


def test_variables_of_a_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    code = f"open(f'{{rank}}', 'w').write(' '.join(os.environ[n] for n in '{names}'.split())); "
    assert spawn(monkeypatch, code + "sys.exit(os.getsid(0) != os.getpid())") == 0
    assert [Path(str(rank)).read_text() for rank in range(2)] == ["0 2 0 2 127.0.0.1 0", "1 2 1 2 127.0.0.1 0"]
    assert launcher.run(["pretrain"], range(6, 8), 8, {"MASTER_ADDR": "node1", "MASTER_PORT": "7"}, []) == 0
    assert [Path(str(rank)).read_text() for rank in (6, 7)] == ["6 8 0 2 node1 7", "7 8 1 2 node1 7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_to_the_launcher_reaches_all_ranks_and_it_asks_to_be_started_again(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(number)

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = (
        f"signal.signal({int(number)}, lambda *_: (open(f'got-{{rank}}', 'w'), sys.exit(75)))\n"
        "open(f'ready-{rank}', 'w')\ntime.sleep(60)"
    )
    assert spawn(monkeypatch, code, restarts=3) == 75
    thread.join()
    assert {path.name for path in tmp_path.glob("got-*")} == {"got-0", "got-1"}
    assert f"stopped by {number.name}; the same command resumes" in caplog.text
    assert signal.getsignal(number) == before


def test_signals_reach_the_rank_alone_once_and_a_closed_terminal_asks_it_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its loader workers, which a second signal would end, are needed until it has saved. A rank that has not saved is
    not reported as one that has, and is not started again after a signal.
    """
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored

    def hang_up() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=hang_up)
    thread.start()
    code = (
        "import subprocess\nworker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "def stop(number, _):\n    time.sleep(0.3)\n"
        "    open(f'got-{rank}', 'a').write(f'{number} {worker.poll()}')\n    worker.kill()\n    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, stop)\nif rank == 0:\n    open('ready', 'w')\ntime.sleep(60)\n"
    )
    assert spawn(monkeypatch, code, restarts=3) == 7
    thread.join()
    signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "got-0").read_text() == f"{int(signal.SIGTERM)} None"


def test_rank_that_a_signal_finds_finished_leaves_a_finished_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nopen(f'ready-{rank}', 'w')\nif rank: time.sleep(60)\n"
        f"while not os.path.exists('ready-1'): time.sleep(0.01)\nos.kill({os.getpid()}, signal.SIGTERM)"
    )
    assert spawn(monkeypatch, code) == 0
    assert not caplog.text


def test_program_that_calls_main_is_not_forked_and_the_command_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert not launcher.is_forked()
    for own in ("/venv/bin/mae-dist", "/site-packages/mae_dist/__main__.py", "/checkout/launch/agent.py"):
        monkeypatch.setattr(sys, "argv", [own, "pretrain"])
        assert launcher.is_forked()
    monkeypatch.setattr(launcher, "DRIVERS", ("/dev/null",))  # as if it were one of a GPU, which has been called
    with Path("/dev/null").open():
        assert not launcher.is_forked()
    monkeypatch.setattr(launcher, "DRIVERS", ())
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not launcher.is_forked()


def test_launcher_that_has_imported_torch_begins_again_with_the_threads_of_its_ranks() -> None:
    """As the same process, and then knows how many GPUs it has counted."""
    code = (
        "import os, sys, types\nfrom mae_dist import launcher\nsys.argv = ['/mae-dist', 'pretrain']\n"
        "if launcher.COUNTED in os.environ:\n"
        "    print(launcher.processes_here(None), os.environ['OMP_NUM_THREADS'], os.environ['P'] == str(os.getpid()))\n"
        "else:\n    os.environ['P'], sys.modules['torch'] = str(os.getpid()), types.ModuleType('torch')\n"
        "    print('first')\n    launcher.spawn(['pretrain'], 3000, 0)"
    )
    variables = {name: value for name, value in running.environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("first\n3000 1 True\n", "")


def report_facts() -> None:
    """Have each rank print what a new process has of its own, before it meets the others."""
    meet = rendezvous.meet

    def reported(device: torch.device, timeout: timedelta) -> tuple[torch.distributed.Store, int, int]:
        default = {signal.getsignal(number) for number in launcher.SIGNALS} - {signal.SIG_IGN}  # as nohup leaves it
        print(
            f"rank {os.environ['RANK']}: session {os.getsid(0) == os.getpid()} blocked "
            f"{signal.pthread_sigmask(signal.SIG_BLOCK, [])} threads {torch.get_num_threads()} log "
            f"{logging.getLogger().level} default signals {default <= {signal.SIG_DFL, signal.default_int_handler}} "
            f"{sys.argv[1]}", file=sys.stderr, flush=True,
        )  # fmt: skip
        return meet(device, timeout)

    rendezvous.meet = reported


def test_forked_ranks_are_as_new_processes_and_start_again_after_one_was_killed(
    tiny_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = [word for word in SETTINGS if not word.startswith("machine.")]
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *settings, *MAE, "train.steps=20"]
    words += ["checkpoint.every=5", "machine.workers=0", "machine.processes=2", "machine.restarts=1"]
    launched = start_launcher(*words, log=log, before=report_facts)
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= 6, [launched], log)
    os.kill(ranks_of(launched.pid or 0)[1], signal.SIGKILL)
    launched.join(60)
    text = log.read_text()
    assert launched.exitcode == 0, text
    assert "rank 1 was ended by SIGKILL" in text
    assert text.count("starting the ranks again (0 restarts left)") == 1
    assert len(losses(run)) == 20
    assert [event["step"] > 0 for event in events.of(run, "start")] == [False, True]
    facts = sorted(re.findall(r"^rank \d: .*", text, re.M))
    expected = "session True blocked set() threads 1 log {} default signals True pretrain"
    assert facts == [f"rank {rank}: {expected.format(level)}" for rank, level in ((0, 20), (0, 20), (1, 40), (1, 40))]


def test_forked_ranks_save_and_end_when_their_launcher_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS[:-2], *MAE, "train.steps=4000"]
    launched = start_launcher(*words, "machine.processes=2", log=log)
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= 3, [launched], log)
    ranks = ranks_of(launched.pid or 0)
    assert len(ranks) == 2
    launched.kill()
    launched.join()
    deadline = time.monotonic() + 60
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{len(losses(run)):09d}"


def test_run_of_one_process_imports_no_compiler_and_no_algebra(tiny_data: Path, tmp_path: Path) -> None:
    """Two seconds of a core, at every start."""
    words = ["pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "train.steps=1"]
    large = {"sympy", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "triton", "wandb"}
    code = (
        f"import sys\nfrom mae_dist.__main__ import main\nassert not main({words})\nprint({large} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=running.environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
