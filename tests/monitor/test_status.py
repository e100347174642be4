"""How runs stand and what their jobs said: SLURM's words, the table, the results of a sweep, the first failing rank."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.monitor import logs
from mae_dist.monitor.status import find, run_status
from mae_dist.run import jobs, slurm_cli
from mae_dist.run.directory import RunDir
from mae_dist.signals import Stopped

JOB = "7"
TRACE = """\
Traceback (most recent call last):
  File "loader.py", line 3, in read
    tar.seek(offset)
OSError: [Errno 5] Input/output error

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "train.py", line 88, in fit
    batch = next(stream)
            ^^^^^^^^^^^^
RuntimeError: Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in fetch
    return self.data[i]
KeyError: 'jpg'""".splitlines()
LOST = "mae-dist: rank 1 did not answer at step 4: hung or gone; the same command goes on from the last checkpoint"


def begun(path: Path, *overrides: str, steps: int = 0, total: str = "train.steps=1000") -> RunDir:
    """A run's folder with a config.yaml and `steps` lines of metrics."""
    words = [f"out={path}", "data.path=/data", "model.name=vit_demo4", "train.global_batch=64", total, *overrides]
    run = RunDir(path)
    run.open("pretrain", config.load("pretrain", None, words), "0123456789abcdef")
    with (path / "metrics.jsonl").open("a") as stream:
        for step in range(1, steps + 1):
            record = {"step": step, "epoch": round(step * 64 / 6000, 4), "lr": 1e-3, "images_per_second": 320.0}
            stream.write(json.dumps(record | {"loss": 1.0 + (step > steps - 100)}) + "\n")
    return run


def submitted(path: Path, job: str = JOB) -> None:
    (path / jobs.FOLDER).mkdir(parents=True, exist_ok=True)
    jobs.record_submission(path, jobs.Submission(job, str(path / jobs.FOLDER), "1", 2))


def note(path: Path, task: int, event: str, start: int = 0, **facts: Any) -> None:
    jobs.record(path / jobs.FOLDER, JOB, task, event, start, **facts)


def log(path: Path, task: int, *lines: str, start: int = 0) -> None:
    head = f"== start {start} of job {JOB}, task {task} on node{task + 1}"
    with jobs.log_file(path / jobs.FOLDER, JOB, task).open("a") as stream:
        stream.write("\n".join([head, *lines, ""]))


def age(path: Path, seconds: float) -> None:
    """Make what lies in a folder so many seconds old."""
    for file in path.iterdir():
        os.utime(file, (time.time() - seconds, time.time() - seconds))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Commands squeue and sacct that say what a real SLURM 22.05 said, and no others."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))

    def install(**said: str) -> None:
        for name, text in said.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)

    return install


def test_slurm_is_asked_for_jobs_and_those_of_arrays(slurm: Any) -> None:
    slurm(
        squeue="printf '%s\\n' '1|PENDING' '2_2|RUNNING' '9|RUNNING'",
        # sacct finds those of an array that never started by the array's number alone, and in one line
        sacct="""[ "${@: -1}" = 2,3,4,5,6,73 ] || exit 1
            printf '%s\\n' '73|CANCELLED' '2_0|FAILED'
            printf '%s\\n' '2_[1,3-7%2]|CANCELLED by 1000' '3|COMPLETED' '4|OUT_OF_MEMORY' '5|'""",
    )
    expected = {"1": "PENDING", "2_2": "RUNNING", "2_0": "FAILED", "2_3": "CANCELLED"}
    expected |= {"3": "COMPLETED", "4": "OUT_OF_MEMORY", "73_0": "CANCELLED"}
    assert slurm_cli.states(["1", "2_2", "2_0", "2_3", "3", "4", "5", "6", "73_0"]) == expected


def test_without_slurm_or_an_answer_nothing_is_known(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_cli.states(["1"]) == {}
    monkeypatch.setattr(slurm_cli, "TIMEOUT", 0.2)
    slurm(squeue="exec /bin/sleep 30", sacct="echo slurmdbd is down >&2; exit 1")
    began = time.monotonic()
    assert slurm_cli.states(["1", "2_3"]) == {}
    assert time.monotonic() - began < 5


def test_runs_are_found_where_runs_lie_and_not_in_their_parts(tmp_path: Path) -> None:
    begun(tmp_path / "sweep" / "lr-1")
    begun(tmp_path / "sweep" / "lr-1" / "probe")
    submitted(tmp_path / "sweep" / "lr-2")
    begun(tmp_path / "features" / "a")  # a folder of that name that is no part of a run
    for part in ("sweep/code/configs", "sweep/lr-1/checkpoints/old", "sweep/jobs/x", ".hidden/x"):
        begun(tmp_path / part)
    found = [str(path.relative_to(tmp_path)) for path in find(tmp_path)]
    assert found == ["features/a", "sweep/lr-1", "sweep/lr-1/probe", "sweep/lr-2"]


# SLURM's word, statuses with which tasks 0 and 1 ended the newest start (None: no end), its number -> what is said
ENDS = [
    ("PENDING", (), 0, "queued"),
    ("RUNNING", (None, None), 0, "running"),
    ("RUNNING", (None, None), 2, "running, requeued 2 times"),
    ("RUNNING", (2, None), 0, "running"),
    ("PENDING", (75, 75), 0, "requeued (1)"),
    ("PENDING", (None, None), 1, "requeued (2)"),
    ("COMPLETING", (None, 75), 0, "running"),
    ("COMPLETED", (75, 75), 1, "stopped, requeued 1 time"),
    ("COMPLETED", (0, 75), 0, "stopped"),
    ("COMPLETED", (0, 0), 1, "finished, requeued 1 time"),  # of a stage that makes no run
    ("CANCELLED", (0, None), 0, "stopped: cancelled"),
    ("", (0,), 0, "finished"),
    ("CANCELLED", (-15, -9), 0, "stopped: cancelled"),
    ("CANCELLED", (), 0, "stopped: cancelled"),
    ("CANCELLED", (2, -9), 0, "failed: exit status 2"),
    ("FAILED", (1, 2), 0, "failed: exit status 2"),
    ("FAILED", (-11, 1), 0, "failed: ended by SIGSEGV"),
    ("FAILED", (137, 1), 0, "failed: ended by SIGKILL"),
    ("FAILED", (), 0, "failed: SLURM says FAILED"),
    ("OUT_OF_MEMORY", (-9, 1), 0, "failed: OUT_OF_MEMORY"),
    ("TIMEOUT", (None, None), 0, "failed: TIMEOUT"),
    ("TIMEOUT", (75, 75), 0, "stopped"),
    ("NODE_FAIL", (1, None), 3, "failed, requeued 3 times: NODE_FAIL"),
    ("", (75, 75), 0, "stopped"),
    ("", (1, 1), 0, "failed: exit status 1"),
    ("", (), 0, "unknown: SLURM does not know the job, or does not answer"),
]


@pytest.mark.parametrize(("word", "ends", "start", "said"), ENDS)
def test_how_a_job_stands(tmp_path: Path, word: str, ends: tuple[int | None, ...], start: int, said: str) -> None:
    submitted(tmp_path, "6")  # an earlier submission, which failed
    jobs.record(tmp_path / jobs.FOLDER, "6", 0, "end", 9, status=2)
    submitted(tmp_path)
    for task, status in enumerate(ends):
        for earlier in range(start):
            note(tmp_path, task, "end", earlier, status=1)
        note(tmp_path, task, "start", start, host="node1")
        if status is not None:
            note(tmp_path, task, "end", start, status=status)
    states = {"6": "FAILED"} | ({JOB: word} if word else {})
    assert str(run_status(tmp_path, states)) == said
    (tmp_path / "result.json").write_text("{}")
    times = f", requeued {start} time{'s' * (start > 1)}" if start else ""
    assert str(run_status(tmp_path, states)) == f"finished{times}"


def test_the_reason_of_a_stop_and_of_a_requeue_is_told(tmp_path: Path) -> None:
    submitted(tmp_path)
    note(tmp_path, 0, "start", host="node1")
    note(tmp_path, 0, "stop_requested", by="time limit")
    note(tmp_path, 0, "end", status=75)
    assert str(run_status(tmp_path, {JOB: "COMPLETED"})) == "stopped: time limit"
    note(tmp_path, 0, "requeue", reason="time_limit", by="task", message="time limit")
    for states in ({JOB: "PENDING"}, {JOB: "COMPLETING"}, {}):  # the last: SLURM does not answer
        assert str(run_status(tmp_path, states)) == "requeued (1): time limit"


def test_a_run_without_slurm_says_itself_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "provenance.jsonl").write_text("{}\n")
    os.utime(tmp_path / "provenance.jsonl", (time.time() - 60, time.time() - 60))
    assert str(run_status(tmp_path, {})) == "running"
    run = RunDir(tmp_path)
    with pytest.raises(ValueError, match="out of luck"), run.record_end():
        raise ValueError("out of luck,\nand of time")
    assert str(run_status(tmp_path, {})) == "failed: out of luck, and of time"
    with pytest.raises(Stopped), run.record_end():
        raise Stopped("pretrain was stopped and saved at step 3 of 9")
    assert str(run_status(tmp_path, {})) == "stopped: pretrain was stopped and saved at step 3 of 9"
    os.utime(tmp_path / "provenance.jsonl", (time.time() + 1, time.time() + 1))  # started again
    assert str(run_status(tmp_path, {})) == "running"
    lines = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["failed", "stopped"]


def test_what_slurm_did_not_start_again_has_stopped(tmp_path: Path) -> None:
    submitted(tmp_path)
    note(tmp_path, 0, "start", host="node1")
    note(tmp_path, 0, "stop_requested", by="SIGTERM")
    note(tmp_path, 0, "end", status=75)
    note(tmp_path, 0, "requeue", reason="saved", by="slurm", message="stopped and saved")
    assert str(run_status(tmp_path, {JOB: "PENDING"})) == "requeued (1): stopped and saved"
    assert str(run_status(tmp_path, {JOB: "COMPLETING"})) == "requeued (1): stopped and saved"
    assert str(run_status(tmp_path, {})) == "stopped: SIGTERM"


def test_lines_that_were_cut_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(tmp_path)
    note(tmp_path, 0, "start", host="node1")
    for file, torn in (
        (f"{JOB}_0.jsonl", b'{"event": "to\xc3'),
        ("../events.jsonl", b'{"event": "submit", "job": "8", "lo'),
    ):
        with (tmp_path / jobs.FOLDER / file).open("ab") as stream:  # a full disk, or kill -9
            stream.write(torn)
    note(tmp_path, 0, "end", status=2)
    submitted(tmp_path, "8")
    with (tmp_path / "events.jsonl").open("ab") as stream:  # of the time before lines began anew
        stream.write(b'{"event": "submit", "job": "9", "lo{"job": "10"}\n')
    assert [event["event"] for event in jobs.events(tmp_path / jobs.FOLDER, JOB)[0]] == ["start", "end"]
    assert [submission.job for submission in jobs.submissions(tmp_path)] == [JOB, "8"]
    assert table(capsys, tmp_path)[str(tmp_path)]


def test_without_slurm_a_run_is_running_while_its_files_change(tmp_path: Path) -> None:
    run = begun(tmp_path, steps=3)
    assert str(run_status(tmp_path, {})) == "running"
    age(tmp_path, 400)
    assert str(run_status(tmp_path, {})) == "stopped"
    assert str(run_status(tmp_path, {}, quiet=500)) == "running"
    (tmp_path / "provenance.jsonl").write_text("{}\n")  # started again just now
    assert str(run_status(tmp_path, {})) == "running"
    run.finish({"loss": 1.0})
    assert str(run_status(tmp_path, {})) == "finished"


def table(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, list[str]]:
    """What `mae-dist runs` prints: first word -> the others, of each line."""
    assert main(["runs", *map(str, words)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_the_table(tmp_path: Path, slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(squeue=f"echo '{JOB}|RUNNING'")
    runs = tmp_path / "runs"
    begun(runs / "here", steps=150)
    begun(runs / "epochs", steps=100, total="train.epochs=10.01")  # 938.4 steps
    (runs / "epochs" / "checkpoints" / "step-000000050").mkdir()
    age(runs / "epochs" / "checkpoints", 7200)
    submitted(runs / "epochs")
    begun(runs / "slow", "track.every=1000", steps=1)
    age(runs / "slow", 550)  # 1000 steps of 64 images at 320 images/s take 200 s
    begun(runs / "gone", steps=1)
    age(runs / "gone", 550)
    begun(runs / "done", steps=7).finish({"verb": "pretrain", "test_loss": 0.25, "loss": 0.5})
    submitted(runs / "waiting", "8")
    begun(runs / "hurt")
    (runs / "hurt" / "config.yaml").write_text("verb: [")
    rows = table(capsys, runs)
    assert rows["run"] == ["verb", "state", "step", "loss", "images/s", "ETA", "saved", "ago", "job", "result"]
    assert rows["here"] == ["pretrain", "running", "150/1,000", "2.0000", "320", "2.8", "min"]
    assert rows["epochs"] == ["pretrain", "running", "100/939", "2.0000", "320", "2.8", "min", "2.0", "h", JOB]
    assert (rows["slow"][1], rows["gone"][1]) == ("running", "stopped")
    assert rows["done"] == ["pretrain", "finished", "7/7", "2.0000", "320", "test_loss", "0.25"]
    assert " ".join(rows["waiting"]) == "unknown: SLURM does not know the job, or does not answer 8"
    assert rows["hurt"][0] == "damaged"
    assert "job" not in table(capsys, runs / "here")["run"]  # nor any other column that would be empty


def test_slurm_is_not_asked_of_finished_runs(tmp_path: Path, slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(squeue=f"echo \"$@\" >> {tmp_path / 'asked'}; echo '8|RUNNING'")
    begun(tmp_path / "runs" / "done", steps=1).finish({"loss": 1.0})
    submitted(tmp_path / "runs" / "done")
    assert table(capsys, tmp_path / "runs")["done"][:2] == ["pretrain", "finished"]
    assert not (tmp_path / "asked").exists()
    submitted(tmp_path / "runs" / "working", "8")
    assert table(capsys, tmp_path / "runs")["working"][0] == "running"
    assert (tmp_path / "asked").read_text().split()[-1] == "8"


def test_a_hundred_runs_take_less_than_a_second(tmp_path: Path) -> None:
    first = begun(tmp_path / "0", steps=300).path
    for number in range(1, 100):
        (tmp_path / str(number)).mkdir()
        for name in ("config.yaml", "metrics.jsonl"):
            (tmp_path / str(number) / name).write_bytes((first / name).read_bytes())
    command, before = [sys.executable, "-m", "mae_dist", "runs", tmp_path], os.times()
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    assert said.stdout.count("300/1,000") == 100
    used = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    assert used < 1, f"{used:.2f} s of a core"


def test_watching_ends_silently(tmp_path: Path) -> None:
    begun(tmp_path / "a", steps=3).finish({"loss": 1.0})
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


def test_the_results_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, loss in ((0, 0.5), (1, 0.25)):
        run = begun(tmp_path / f"seed{seed}", f"train.seed={seed}", "machine.workers=1", "data.mean=[0,0,0]")
        run.finish({"verb": "pretrain", "loss": 1.0, "test_loss": loss, "bad": 0})
    begun(tmp_path / "seed2", "train.seed=2")
    submitted(tmp_path / "seed3")
    for stage in ("results", "data"):  # of the launcher, and no runs
        submitted(tmp_path / "pipeline" / stage, "8")
    jobs.record(tmp_path / "pipeline" / "data" / jobs.FOLDER, "8", 0, "end", 0, status=0)
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
        "Not finished: seed2 (running), seed3 (unknown: SLURM does not know the job, or does not answer).",
    ]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 2
    out, said = capsys.readouterr()
    assert not out
    assert said.count("\n") == 1, said
    return said


def test_mistakes_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "runs", tmp_path / "nowhere")
    assert main(["runs", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    file = tmp_path / "sweep.md"
    assert "no runs in" in refused(capsys, "runs", tmp_path, "--results", file)
    assert "holds no run" in refused(capsys, "logs", tmp_path)
    begun(tmp_path / "a")
    assert "none of the 1 runs is finished" in refused(capsys, "runs", tmp_path, "--results", file)
    assert not file.exists()
    assert "not allowed with" in refused(capsys, "runs", tmp_path, "--results", file, "--watch")
    assert "no such folder" in refused(capsys, "logs", tmp_path / "nowhere")
    said = refused(capsys, "logs", tmp_path / "a")
    assert "was not launched through launch/submit.py" in said
    assert "metrics.jsonl" in said
    assert "--lines 0" in refused(capsys, "logs", tmp_path / "a", "--lines", 0)


def logged(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["logs", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_first_failing_rank_comes_first(tmp_path: Path, slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(squeue=f"echo '{JOB}|FAILED'")
    submitted(tmp_path)
    log(tmp_path, 1, "an earlier start", "mae-dist: of no interest")
    for task, status in ((0, 1), (1, 1), (2, -15)):  # task 0 was the first to end, but of what task 1 did
        note(tmp_path, task, "start", 1, host=f"node{task + 1}")
        note(tmp_path, task, "end", 1, status=status)
    log(tmp_path, 0, *(f"step {i}" for i in range(99)), LOST, start=1)
    log(tmp_path, 1, *(f"step {i}" for i in range(99)), *(f"[rank1]: {line}" for line in TRACE), "srun: done", start=1)
    log(tmp_path, 2, "step 0", start=1)
    lines = logged(capsys, tmp_path, "--lines", 3)
    assert lines[0] == f"{tmp_path}: failed, requeued 1 time: exit status 1"
    assert lines[1].startswith(f"task 1 on node2, start 1 of job {JOB}: exit status 1 at 2")
    assert lines[1].endswith("the first of 3 that failed")
    begin = lines.index(f"[rank1]: {TRACE[0]}")
    assert begin == 3
    assert lines[begin : begin + len(TRACE)] == [f"[rank1]: {line}" for line in TRACE]
    assert lines[begin + len(TRACE) + 2 :][:3] == ["  step 97", "  step 98", "  srun: done"]
    assert lines[-2].startswith("task 0 on node1: exit status 1 at")
    assert lines[-2].endswith(LOST)
    assert lines[-1].startswith("task 2 on node3: ended by SIGTERM at")
    assert not any("of no interest" in line for line in lines)


@pytest.mark.parametrize(
    ("ends", "said", "shown"),
    [
        (((2, ""), (2, ""), (2, "mae-dist: rank 2: no file")), "", 2),  # the two agreed in silence
        (((1, LOST), (-9, ""), (1, "")), "", 1),  # a rank that was killed has said nothing
        (((1, LOST), (1, ""), (137, "")), "", 2),
        (((75, "mae-dist: stopped and saved"), (2, "mae-dist: disk full"), (75, "")), "", 1),
        (((75, "mae-dist: stopped and saved"), (75, ""), (75, "")), "stopped", 0),
    ],
)
def test_who_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: Any, said: str, shown: int) -> None:
    submitted(tmp_path)
    for task, (status, text) in enumerate(ends):
        note(tmp_path, task, "start", host=f"node{task + 1}")
        log(tmp_path, task, "step 1", *([text] if text else []))
        note(tmp_path, task, "end", status=status)
    lines = logged(capsys, tmp_path)
    assert said in lines[0]
    assert lines[1].startswith(f"task {shown} on node{shown + 1}")
    assert len([line for line in lines if line.startswith("task ")]) == len(ends)


def test_what_slurm_says_where_no_end_was_noted(tmp_path: Path, slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(squeue="exit 1", sacct=f"echo '{JOB}|OUT_OF_MEMORY'")
    submitted(tmp_path)
    assert logged(capsys, tmp_path)[1].startswith(f"job {JOB} has said nothing yet: SLURM says OUT_OF_MEMORY")
    for start in (0, 1):
        for task in (0, 1):
            note(tmp_path, task, "start", start, host="node1")
            log(tmp_path, task, f"step {start}", start=start)
    lines = logged(capsys, tmp_path)
    assert lines[0].endswith("failed, requeued 1 time: OUT_OF_MEMORY")
    assert lines[1] == f"task 0 on node1, start 1 of job {JOB}: no end is noted; SLURM says OUT_OF_MEMORY"
    assert "  step 1" in lines
    assert "  step 0" not in lines
    lines = logged(capsys, tmp_path, "--all")
    assert lines.index("  step 0") < lines.index("  step 1")
    assert len([line for line in lines if "SLURM says" in line]) == 1  # of the newest start only


def test_of_many_runs_the_first_that_failed_is_shown(
    tmp_path: Path, slurm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue=f"echo '{JOB}|FAILED'")
    begun(tmp_path / "sweep" / "a", steps=1).finish({"loss": 1.0})
    for name in ("b", "c"):
        submitted(tmp_path / "sweep" / name, "6")
    lines = logged(capsys, tmp_path / "sweep")  # nothing has failed
    assert [line.split()[0] for line in lines if line.strip()][2:] == ["a", "b", "c"]
    submitted(tmp_path / "sweep" / "c")
    note(tmp_path / "sweep" / "c", 0, "start", host="node1")
    log(tmp_path / "sweep" / "c", 0, "mae-dist: rank 0: no room")
    note(tmp_path / "sweep" / "c", 0, "end", status=2)
    lines = logged(capsys, tmp_path / "sweep")
    assert lines[0] == f"{tmp_path / 'sweep' / 'c'}: failed: exit status 2"
    assert "mae-dist: rank 0: no room" in lines


def test_a_job_that_failed_before_its_tasks_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(tmp_path)
    (tmp_path / jobs.FOLDER / f"{JOB}_0_log.out").write_text("bash: line 1: /opt/env/bin/python: No such file\n")
    assert "  bash: line 1: /opt/env/bin/python: No such file" in logged(capsys, tmp_path)


def test_causes_are_found_in_what_was_said() -> None:
    report = ["Exception ignored in: <function f>", TRACE[0], '  File "x"', "OSError: late"]
    assert logs.cause_in(["step 1", LOST, *report]) == range(1, 2)
    assert logs.cause_in([LOST, *TRACE, "step 2"]) == range(1, 1 + len(TRACE))
    assert logs.cause_in(["a", *TRACE[:4], "b", *TRACE[:4]]) == range(6, 10)  # not chained: the last alone
    assert logs.cause_in(["step 1"]) == range(0)
    mistake = "mae-dist: rank 1: no room"
    assert logs.cause_in([mistake, "step 1", LOST]) == range(0, 1)
    assert logs.cause_in([*TRACE, LOST, "step 1"]) == range(0, len(TRACE))
    assert logs.cause_in([*TRACE, "step 1", mistake]) == range(len(TRACE) + 1, len(TRACE) + 2)
