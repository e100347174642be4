"""`mae-dist runs`: the table of runs, --watch, and the results of a sweep."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import JOB, age, create_run, submit
from running import bytes_read, refused

from mae_dist.__main__ import main
from mae_dist.run import jobs


def table(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, list[str]]:
    """What `mae-dist runs` prints: first word -> the others, of each line."""
    assert main(["runs", *map(str, words)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_runs_table(tmp_path: Path, slurm: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    slurm(squeue=f"echo '{JOB}|RUNNING'")
    runs = tmp_path / "runs"
    create_run(runs / "here", steps=150)
    create_run(runs / "epochs", steps=100, total="train.epochs=10.01")  # 938.4 steps
    (runs / "epochs" / "checkpoints" / "step-000000050").mkdir()
    age(runs / "epochs" / "checkpoints", 7200)
    submit(runs / "epochs")
    create_run(runs / "slow", "track.every=1000", steps=1)
    age(runs / "slow", 550)  # 1000 steps of 64 images at 320 images/s take 200 s
    create_run(runs / "gone", steps=1)
    age(runs / "gone", 550)
    create_run(runs / "done", total="train.steps=7", steps=7).finish(
        {"verb": "pretrain", "test_loss": 0.25, "loss": 0.5}
    )
    submit(runs / "waiting", "8")
    create_run(runs / "hurt")
    (runs / "hurt" / "config.yaml").write_text("verb: [")
    create_run(runs / "list", "track.every=1234", steps=1)
    file = runs / "list" / "config.yaml"
    file.write_text(file.read_text().replace("every: 1234", "every: [1234]"))
    (runs / "old").mkdir()
    (runs / "old" / "config.yaml").write_text("verb: pretrain\n")  # of the layout before there was a `format`
    rows = table(capsys, runs)
    assert rows["run"] == ["verb", "state", "step", "loss", "images/s", "ETA", "saved", "ago", "job", "result"]
    assert rows["here"] == ["pretrain", "running", "150/1,000", "2.0000", "320", "2.8", "min"]
    assert rows["epochs"] == ["pretrain", "running", "100/939", "2.0000", "320", "2.8", "min", "2.0", "h", JOB]
    assert (rows["slow"][1], rows["gone"][1]) == ("running", "stopped")
    assert rows["done"] == ["pretrain", "finished", "7/7", "2.0000", "320", "test_loss", "0.25"]
    assert " ".join(rows["waiting"]) == "unknown: SLURM does not know the job, or does not answer 8"
    assert [rows[name][0] for name in ("hurt", "list", "old")] == ["unreadable"] * 3
    assert "job" not in table(capsys, runs / "here")["run"]  # nor any other column that would be empty


def test_runs_table_survives_torn_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(tmp_path)
    with (tmp_path / "events.jsonl").open("ab") as stream:  # a full disk, or kill -9
        stream.write(b'{"event": "submit", "lo')
    assert table(capsys, tmp_path)[str(tmp_path)]


def test_slurm_is_not_called_for_finished_runs(
    tmp_path: Path, slurm: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue=f"echo \"$@\" >> {tmp_path / 'called'}; echo '8|RUNNING'")
    create_run(tmp_path / "runs" / "done", steps=1).finish({"loss": 1.0})
    submit(tmp_path / "runs" / "done")
    assert table(capsys, tmp_path / "runs")["done"][:2] == ["pretrain", "finished"]
    assert not (tmp_path / "called").exists()
    submit(tmp_path / "runs" / "working", "8")
    assert table(capsys, tmp_path / "runs")["working"][0] == "running"
    assert (tmp_path / "called").read_text().split()[-1] == "8"


def test_runs_table_reads_only_the_ends_of_long_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        metrics = create_run(tmp_path / str(number), steps=300).path / "metrics.jsonl"
        metrics.write_bytes(b"\n" * 2**20 + metrics.read_bytes())
    before = bytes_read()
    rows = table(capsys, tmp_path)
    assert bytes_read() - before < 10 * 2**17
    assert sum(row[2:3] == ["300/1,000"] for row in rows.values()) == 10


def test_runs_watch_ends_on_sigint_without_a_message(tmp_path: Path) -> None:
    create_run(tmp_path / "a", steps=3).finish({"loss": 1.0})
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "mae_dist", "runs", str(tmp_path), "--watch"]
    process = subprocess.Popen(command, stdout=end, stderr=subprocess.PIPE)
    os.close(end)
    shown = b""
    while b"finished" not in shown:
        shown += os.read(terminal, 1000)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == b""
    assert process.returncode == 0
    os.close(terminal)


def test_runs_results_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, loss in ((0, 0.5), (1, 0.25)):
        run = create_run(tmp_path / f"seed{seed}", f"train.seed={seed}", "machine.workers=1", "data.mean=[0,0,0]")
        run.finish({"verb": "pretrain", "loss": 1.0, "test_loss": loss, "bad": 0})
    create_run(tmp_path / "seed2", "train.seed=2")
    submit(tmp_path / "seed3")
    old = create_run(tmp_path / "seed4", "train.seed=4")
    old.finish({"verb": "pretrain", "loss": 1.0, "bad": 0})
    (old.path / "config.yaml").write_text("verb: pretrain\ntrain: null\n")  # of an older layout
    for stage in ("results", "data"):  # stages of a pipeline that make no run
        submit(tmp_path / jobs.PIPELINE / stage, "8")
    jobs.record(tmp_path / jobs.PIPELINE / "data" / jobs.FOLDER, "8", 0, "end", 0, status=0)
    file = tmp_path / "new" / "sweep.md"
    assert main(["runs", str(tmp_path), "--results", str(file)]) == 0
    assert file.read_text() == capsys.readouterr().out
    assert file.read_text().splitlines() == [
        "## pretrain",
        "",
        "| run | train.seed | test_loss | loss |",
        "| --- | --- | ---: | ---: |",
        "| seed1 | 1 | 0.25 | 1 |",
        "| seed0 | 0 | 0.5 | 1 |",
        "",
        "Left out: seed2 (running), seed3 (unknown: SLURM does not know the job, or does not answer), "
        "seed4 (unreadable).",
    ]


def test_runs_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "runs", tmp_path / "nowhere")
    assert main(["runs", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    file = tmp_path / "sweep.md"
    assert "no runs in" in refused(capsys, "runs", tmp_path, "--results", file)
    create_run(tmp_path / "a")
    assert "none of the 1 runs is finished" in refused(capsys, "runs", tmp_path, "--results", file)
    assert not file.exists()
    assert "not allowed with" in refused(capsys, "runs", tmp_path, "--results", file, "--watch")
