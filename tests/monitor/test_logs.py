"""`mae-dist logs`: the first failing rank, the cause in its log, and what SLURM knows where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import JOB, LOST, create_run, fail, record, submit, write_log
from running import refused

from mae_dist.__main__ import main
from mae_dist.errors import FAILED, USER_ERROR
from mae_dist.monitor import logs
from mae_dist.run import events, jobs

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


def logged(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["logs", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_logs_show_the_first_failing_rank_first(
    tmp_path: Path, slurm: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue=f"echo '{JOB}|FAILED'")
    submit(tmp_path)
    write_log(tmp_path, 1, "an earlier start", "mae-dist: of no interest")
    for task, status in ((0, 1), (1, 1), (2, -15)):  # task 0 was the first to end, but because of task 1
        record(tmp_path, task, "start", 1, host=f"node{task + 1}")
        record(tmp_path, task, "end", 1, status=status)
    fail(tmp_path, 0, "rank_lost", LOST)
    fail(tmp_path, 1, "crash", TRACE[-1])
    write_log(tmp_path, 0, *(f"step {i}" for i in range(99)), LOST, start=1)
    torch_trace = [f"[rank1]: {line}" for line in TRACE]
    write_log(tmp_path, 1, *(f"step {i}" for i in range(99)), *torch_trace, "srun: done", start=1)
    write_log(tmp_path, 2, "step 0", start=1)
    lines = logged(capsys, tmp_path, "--lines", 3)
    assert lines[0] == f"{tmp_path}: failed, requeued 1 time: {TRACE[-1]}"
    assert lines[1].startswith(f"task 1 on node2, start 1 of job {JOB}: exit status 1 at 2")
    assert lines[1].endswith("the first of 3 that failed")
    begin = lines.index(f"[rank1]: {TRACE[0]}")
    assert begin == 3
    assert lines[begin : begin + len(TRACE)] == torch_trace
    assert lines[begin + len(TRACE) + 2 :][:3] == ["  step 97", "  step 98", "  srun: done"]
    assert lines[-2].startswith("task 0 on node1: exit status 1 at")
    assert lines[-2].endswith(LOST)
    assert lines[-1].startswith("task 2 on node3: ended by SIGTERM at")
    assert not any("of no interest" in line for line in lines)


@pytest.mark.parametrize(
    ("ends", "state", "shown"),
    [
        (((2, ""), (2, ""), (2, "mae-dist: rank 2: no file")), "", 2),  # the two agreed in silence
        (((1, LOST), (-9, ""), (1, "")), "", 1),  # a rank that was killed logs nothing
        (((1, LOST), (1, ""), (137, "")), "", 2),
        (((75, "mae-dist: stopped and saved"), (2, "mae-dist: disk full"), (75, "")), "", 1),
        (((75, "mae-dist: stopped and saved"), (75, ""), (75, "")), "stopped", 0),
    ],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "before_the_run_recorded"])
def test_logs_show_the_root_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: Any, state: str, shown: int, recorded: bool
) -> None:
    submit(tmp_path)
    for task, (status, text) in enumerate(ends):
        record(tmp_path, task, "start", host=f"node{task + 1}")
        write_log(tmp_path, task, "step 1", *([text] if text else []))
        if recorded and text and status != 75:
            fail(tmp_path, task, "rank_lost" if text == LOST else "user_error", text)
        record(tmp_path, task, "end", status=status)
    lines = logged(capsys, tmp_path)
    assert state in lines[0]
    assert lines[1].startswith(f"task {shown} on node{shown + 1}")
    assert len([line for line in lines if line.startswith("task ")]) == len(ends)


def test_logs_of_torchrun_show_the_rank_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tasks of four ranks each: the log of a task has the messages of all its ranks."""
    submit(tmp_path)
    events.append(tmp_path, "start", ranks=8, step=0)
    for task in range(2):
        record(tmp_path, task, "start", host=f"node{task + 1}")
        write_log(tmp_path, task, "mae-dist: rank 5: no room" if task == 1 else "step 1", LOST)
        record(tmp_path, task, "end", status=1)
    fail(tmp_path, 4, "rank_lost", LOST)
    fail(tmp_path, 5, "machine_fault", "rank 5: no room")
    fail(tmp_path, 0, "rank_lost", LOST)
    lines = logged(capsys, tmp_path)
    assert lines[1].startswith("task 1 on node2")
    assert lines[3] == "mae-dist: rank 5: no room"
    assert lines[-1].startswith("task 0 on node1: exit status 1")
    assert lines[-1].endswith(LOST)


def test_logs_show_a_recorded_failure_that_the_log_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start", host="node1")
    fail(tmp_path, 0, "machine_fault", "the disk is gone")
    record(tmp_path, 0, "end", status=1)
    assert logged(capsys, tmp_path)[3] == "the disk is gone"


def test_logs_show_the_slurm_state_where_no_end_is_recorded(
    tmp_path: Path, slurm: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue="exit 1", sacct=f"echo '{JOB}|OUT_OF_MEMORY'")
    submit(tmp_path)
    assert logged(capsys, tmp_path)[1].startswith(f"job {JOB} has no output yet: SLURM's state is OUT_OF_MEMORY")
    for start in (0, 1):
        for task in (0, 1):
            record(tmp_path, task, "start", start, host="node1")
            write_log(tmp_path, task, f"step {start}", start=start)
    lines = logged(capsys, tmp_path)
    assert lines[0].endswith("failed, requeued 1 time: OUT_OF_MEMORY")
    expected = f"task 0 on node1, start 1 of job {JOB}: no end is recorded; SLURM's state is OUT_OF_MEMORY"
    assert lines[1] == expected
    assert "  step 1" in lines
    assert "  step 0" not in lines
    lines = logged(capsys, tmp_path, "--all")
    assert lines.index("  step 0") < lines.index("  step 1")
    assert len([line for line in lines if "SLURM's state" in line]) == 1  # of the newest start only


def test_logs_of_a_sweep_show_the_first_failed_run(
    tmp_path: Path, slurm: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue=f"echo '{JOB}|FAILED'")
    create_run(tmp_path / "sweep" / "a", steps=1).finish({"loss": 1.0})
    for name in ("b", "c"):
        submit(tmp_path / "sweep" / name, "6")
    lines = logged(capsys, tmp_path / "sweep")  # nothing has failed
    assert [line.split()[0] for line in lines if line.strip()][2:] == ["a", "b", "c"]
    submit(tmp_path / "sweep" / "c")
    record(tmp_path / "sweep" / "c", 0, "start", host="node1")
    write_log(tmp_path / "sweep" / "c", 0, "mae-dist: rank 0: no room")
    record(tmp_path / "sweep" / "c", 0, "end", status=2)
    lines = logged(capsys, tmp_path / "sweep")
    assert lines[0] == f"{tmp_path / 'sweep' / 'c'}: failed: exit status 2"
    assert "mae-dist: rank 0: no room" in lines


def test_logs_of_a_job_that_failed_before_its_tasks_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(tmp_path)
    (tmp_path / jobs.FOLDER).mkdir(exist_ok=True)
    (tmp_path / jobs.FOLDER / f"{JOB}_0_log.out").write_text("bash: line 1: /opt/env/bin/python: No such file\n")
    assert "  bash: line 1: /opt/env/bin/python: No such file" in logged(capsys, tmp_path)


def test_cause_in_a_log() -> None:
    unraisable = ["Exception ignored in: <function f>", TRACE[0], '  File "x"', "OSError: late"]
    assert logs.find_cause(["step 1", LOST, *unraisable], FAILED) == range(1, 2)
    assert logs.find_cause([LOST, *TRACE, "step 2"], FAILED) == range(1, 1 + len(TRACE))
    assert logs.find_cause(["a", *TRACE[:4], "b", *TRACE[:4]], FAILED) == range(6, 10)  # not chained: the last alone
    assert logs.find_cause(["step 1"], FAILED) == range(0)
    assert logs.find_cause([*TRACE, LOST, "step 1"], FAILED) == range(0, len(TRACE))
    error = "mae-dist: rank 1: no room"
    assert logs.find_cause([*TRACE, "step 1", error], USER_ERROR) == range(len(TRACE) + 1, len(TRACE) + 2)


def test_cause_in_a_log_is_that_of_the_recorded_failure() -> None:
    error = "mae-dist: rank 1: no room"
    own = {"reason": "machine_fault", "message": error.removeprefix("mae-dist: ")}
    lost = {"reason": "rank_lost", "message": LOST.removeprefix("mae-dist: ")}
    assert logs.find_cause([error, "step 1", LOST], FAILED, own) == range(0, 1)
    assert logs.find_cause([error, "step 1", LOST], FAILED, lost) == range(2, 3)
    assert logs.find_cause([*TRACE, LOST, "step 1"], FAILED, lost) == range(0, len(TRACE))
    assert logs.find_cause([*TRACE, error, LOST], FAILED, own) == range(len(TRACE), len(TRACE) + 1)
    crash = {"reason": "crash", "message": "KeyError"}
    assert logs.find_cause([*TRACE, error], FAILED, crash) == range(0, len(TRACE))


def test_logs_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in refused(capsys, "logs", tmp_path)
    assert "no such folder" in refused(capsys, "logs", tmp_path / "nowhere")
    create_run(tmp_path / "a")
    message = refused(capsys, "logs", tmp_path / "a")
    assert "was not launched by `mae-dist submit`" in message
    assert "metrics.jsonl" in message
    assert "--lines 0" in refused(capsys, "logs", tmp_path / "a", "--lines", 0)


def test_logs_read_the_end_of_a_long_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MOST_LOG", 11)
    jobs.log_file(tmp_path, "7", 0).write_text("first line\nlast line\n")
    assert jobs.log_lines(tmp_path, "7", 0) == ["", "last line"]
    assert jobs.log_lines(tmp_path, "7", 1) == []
    monkeypatch.setattr(jobs, "MOST_LINES", 1)
    assert jobs.log_lines(tmp_path, "7", 0) == ["last line"]
    (tmp_path / "7_\N{SUPERSCRIPT TWO}.jsonl").touch()
    assert jobs.events(tmp_path, "7") == {}
