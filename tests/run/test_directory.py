"""RunDir: one process writes to a folder, a folder of others is never touched, and what happened is in its events."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import DATA, opened, settings

from mae_dist import config
from mae_dist.errors import RankLost, WorkerLost
from mae_dist.run import directory, events, identity, layout, lock
from mae_dist.run.directory import RunDir
from mae_dist.signals import Stopped


def test_run_without_a_step_may_start_again_with_other_settings(tmp_path: Path) -> None:
    opened(tmp_path)
    other = settings(tmp_path, "train.seed=1")
    assert RunDir(tmp_path).open("pretrain", other, DATA)
    assert RunDir(tmp_path).settings()[2].train.seed == 1


LOCKS = """
import sys, time
from pathlib import Path
from mae_dist.run import lock
lock.acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_lock_lets_one_process_write_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits, then fails with the name of the first; a killed one holds no lock."""
    command = [sys.executable, "-c", LOCKS, str(tmp_path / "run")]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        monkeypatch.setattr(lock, "WAIT_FOR_LOCK", 0.3)
        holder = rf"out=\S+run: process {other.pid} on \S+ is writing to this run; stop it"
        with pytest.raises(ValueError, match=holder):
            opened(tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()
        monkeypatch.setattr(lock, "WAIT_FOR_LOCK", 30)
        threading.Timer(0.5, other.kill).start()
        opened(tmp_path / "run")
    impatient = f"from mae_dist.run import lock; lock.WAIT_FOR_LOCK = 0\n{LOCKS}"
    command = [sys.executable, "-c", impatient, str(tmp_path / "run"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"process {os.getpid()} on " in done.stderr


def test_lock_of_a_run_is_readable_only_for_those_who_may_write_it(tmp_path: Path) -> None:
    """Others could keep it locked: a lock to read needs no more than to read."""
    before = os.umask(0)
    try:
        for mask, mode in ((0o022, 0o600), (0o002, 0o660), (0o077, 0o600), (0, 0o666)):
            os.umask(mask)
            lock.acquire(tmp_path / f"{mask}")
            assert (tmp_path / f"{mask}" / layout.LOCK).stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_resume_with_other_settings_is_refused_by_field(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    other = settings(tmp_path, "train.seed=1", "mae.mask_ratio=0.5")
    with pytest.raises(ValueError, match=r"train\.seed: 0 -> 1; mae\.mask_ratio: 0\.75 -> 0\.5") as error:
        RunDir(tmp_path).open("pretrain", other, DATA)
    assert "machine" not in str(error.value)
    with pytest.raises(ValueError, match=f"content of data.path: {DATA} -> fedcba"):
        RunDir(tmp_path).open("pretrain", settings(tmp_path), "fedcba")
    accepting = settings(tmp_path, "data.accept_change=true")
    assert RunDir(tmp_path).open("pretrain", accepting, "fedcba")
    assert RunDir(tmp_path).settings()[1] == "fedcba"
    knn = config.load("knn", None, [f"out={tmp_path}", "data.path=/data", "model.name=vit_demo4", "init_from=random"])
    with pytest.raises(ValueError, match="verb: pretrain -> knn"):
        RunDir(tmp_path).open("knn", knn, DATA)


def test_resume_with_other_machine_settings_and_paths(tmp_path: Path) -> None:
    opened(tmp_path, "data.mean=[0.1,0.2,0.3]")
    overrides = [
        "machine.micro_batch=7",
        "machine.workers=0",
        "checkpoint.every=3",
        "track.every=1",
        "data.path=/moved",
    ]
    run = opened(tmp_path, "data.mean=[0.1,0.2,0.3]", *overrides)
    verb, data, found = run.settings()
    assert (verb, data) == ("pretrain", DATA)
    assert found == settings(tmp_path, "data.mean=[0.1,0.2,0.3]", *overrides)


def test_folders_and_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
            RunDir(path).open("pretrain", settings(path), DATA)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"init_from=\S+: holds no config\.yaml"):
        RunDir.existing(tmp_path, "init_from")
    with pytest.raises(ValueError, match=r"init_from=\S+: no such folder"):
        RunDir.existing(tmp_path / "nowhere", "init_from")
    assert RunDir.existing(tmp_path / "empty", "init_from").path == tmp_path / "empty"


def test_run_starts_in_a_folder_that_its_launcher_has_prepared(tmp_path: Path) -> None:
    events.append(tmp_path, "submit", job="7")
    for name in ("jobs", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "something").write_text("of the launcher")
    identity.refuse_others(tmp_path, "pretrain", settings(tmp_path), DATA)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
        identity.refuse_others(tmp_path, "pretrain", settings(tmp_path), DATA)
    (tmp_path / "thesis.tex").unlink()
    run = opened(tmp_path)
    assert run.settings() == layout.settings(tmp_path)
    assert (tmp_path / "code" / "something").read_text() == "of the launcher"


DAMAGED = [
    "", "[1]", "{", "\0", "format: 2\nverb: pretrain",
    "format: 2\nverb: bake\ndata_fingerprint: x\ntotal_steps: 1\n",
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_config_yaml_is_named(tmp_path: Path, text: str) -> None:
    run = opened(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        run.settings()


def test_finished_run_is_not_opened_again(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert run.result() is None
    run.finish({"top1": 12.5})
    assert run.result() == {"top1": 12.5}
    assert not RunDir(tmp_path).open("pretrain", settings(tmp_path), DATA)


def test_every_launch_is_an_event_with_its_provenance(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.open("pretrain", settings(tmp_path), DATA, total_steps=50)
    run.record_launch(0, torch.device("cpu"))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"kind": "step", "step": {step}}}\n' for step in range(1, 44)))
    before = time.time() - 90
    os.utime(metrics, (before, before))
    run.record_launch(40, torch.device("cpu"))
    first, second = events.of(tmp_path, "start")
    assert (first["step"], second["step"]) == (0, 40)
    assert "reached" not in first
    assert second["reached"] == 43
    assert 90 <= second["away"] < 100
    assert (first["ranks"], first["total_steps"], first["data_fingerprint"]) == (1, 50, DATA)
    assert first["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run.launch_before(1) == run.launch_before(40) == first
    assert run.launch_before(41) == second
    assert run.launch_before(0) == {}


ENDS = [
    (Stopped("stopped at step 2"), {"event": "stop", "reason": "signal", "step": 2, "message": "stopped at step 2"}),
    (KeyboardInterrupt(), {"event": "stop", "reason": "keyboard", "step": 2, "message": "KeyboardInterrupt"}),
    (ValueError("out of\n luck"), {"event": "fail", "reason": "user_error", "rank": 0, "message": "out of luck"}),
    (RankLost("rank 1 hung"), {"event": "fail", "reason": "rank_lost", "rank": 0, "message": "rank 1 hung"}),
    (WorkerLost("killed"), {"event": "fail", "reason": "worker_lost", "rank": 0, "message": "killed"}),
    (OSError(5, "I/O"), {"event": "fail", "reason": "machine_fault", "rank": 0, "message": "[Errno 5] I/O"}),
    (torch.OutOfMemoryError("of GPU"), {"event": "fail", "reason": "out_of_memory", "rank": 0, "message": "of GPU"}),
    (AssertionError(), {"event": "fail", "reason": "crash", "rank": 0, "message": "AssertionError"}),
]


@pytest.mark.parametrize(("error", "wanted"), ENDS, ids=lambda part: type(part).__name__)
def test_stop_and_fail_are_events_with_a_reason(tmp_path: Path, error: BaseException, wanted: dict[str, Any]) -> None:
    run = opened(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 2}\n')
    with pytest.raises(type(error)), run.record_end():
        raise error
    (event,) = events.read(tmp_path)
    assert event.items() >= wanted.items()


def test_rank_lost_that_another_rank_prints_is_no_event(tmp_path: Path) -> None:
    with pytest.raises(RankLost), opened(tmp_path).record_end():
        raise RankLost("")
    assert events.read(tmp_path) == []


def test_finish_is_an_event_and_the_result(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.open("pretrain", settings(tmp_path), DATA, total_steps=50)
    run.finish({"loss": 0.5})
    assert run.result() == {"loss": 0.5}
    assert [(event["event"], event["step"]) for event in events.read(tmp_path)] == [("finish", 50)]


def test_run_of_the_old_layout_is_refused_in_one_sentence(tmp_path: Path) -> None:
    run = opened(tmp_path)
    file = tmp_path / "config.yaml"
    plain = layout.read_config(tmp_path)
    assert (plain["format"], plain["verb"], plain["total_steps"]) == (2, "pretrain", 0)
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("format:")))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    for read in (run.settings, lambda: run.open("pretrain", settings(tmp_path), DATA)):
        with pytest.raises(ValueError, match=r"config\.yaml: was written by an older version of mae_dist; use that"):
            read()


def test_provenance_of_copied_code_is_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / layout.REVISION).write_text("0123456789ab+\n")
    monkeypatch.setattr(layout, "__file__", str(tmp_path / "mae_dist" / "run" / "layout.py"))
    assert directory.provenance(torch.device("cpu"))["git"] == "0123456789ab+"
