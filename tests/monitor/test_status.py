"""The status of a run: from SLURM's job states, the events of its tasks, and the run's own events."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import JOB, age, create_run, fail, record, submit

from mae_dist.monitor.status import failures, find_runs, root_failure, run_status
from mae_dist.run import events, jobs, slurm_cli
from mae_dist.run.directory import RunDir
from mae_dist.signals import Stopped


def test_slurm_states_of_jobs_and_array_tasks(slurm: Callable[..., None]) -> None:
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


def test_status_says_why_a_job_waits_or_was_cancelled(slurm: Callable[..., None], tmp_path: Path) -> None:
    never = "SLURM: a job that it waits for has failed (DependencyNeverSatisfied)"
    for state, wanted in {
        "PENDING|Priority": "queued", "PENDING|DependencyNeverSatisfied": f"queued: {never}",
        "PENDING|ReqNodeNotAvail, UnavailableNodes:n1": "queued: SLURM: ReqNodeNotAvail, UnavailableNodes:n1",
        "PENDING|JobHeldUser": "queued: SLURM: JobHeldUser; `scontrol release` lets it start",
        "CANCELLED|DependencyNeverSatisfied": f"stopped: cancelled; {never}", "CANCELLED|None": "stopped: cancelled",
        "RUNNING|None": "running",
    }.items():  # fmt: skip
        slurm(squeue=f"echo '{JOB}|{state}'")
        run = tmp_path / state[:20]
        submit(run)
        assert str(run_status(run, slurm_cli.states([JOB]))) == wanted


def test_status_of_a_job_whose_script_failed_is_what_it_printed(tmp_path: Path) -> None:
    submit(tmp_path)
    log = jobs.log_file(Path(jobs.submissions(tmp_path)[-1].logs), JOB, 0)
    log.parent.mkdir(exist_ok=True)
    log.write_text("module: command not found\nmae-dist: the line of setup `module load x` failed with status 127\n")
    found = run_status(tmp_path, {JOB: "FAILED"})
    assert str(found) == "failed: the line of setup `module load x` failed with status 127"


def test_slurm_states_are_empty_without_slurm_or_an_answer(
    slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm_cli.states(["1"]) == {}
    monkeypatch.setattr(slurm_cli, "TIMEOUT", 0.2)
    late = "import time; time.sleep(3); print('1|RUNNING')"
    slurm(squeue=f'exec {sys.executable} -c "{late}"', sacct="echo slurmdbd is down >&2; exit 1")
    assert slurm_cli.states(["1", "2_3"]) == {}


def test_find_runs_skips_the_subfolders_of_runs(tmp_path: Path) -> None:
    create_run(tmp_path / "sweep" / "lr-1")
    create_run(tmp_path / "sweep" / "lr-1" / "probe")
    submit(tmp_path / "sweep" / "lr-2")
    create_run(tmp_path / "features" / "a")  # a folder of that name that is no part of a run
    for part in ("sweep/code/configs", "sweep/lr-1/checkpoints/old", "sweep/jobs/x", ".hidden/x"):
        create_run(tmp_path / part)
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["features/a", "sweep/lr-1", "sweep/lr-1/probe", "sweep/lr-2"]


# SLURM's state, statuses with which tasks 0 and 1 ended the newest start (None: no end), its number -> status
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
    ("FAILED", (), 0, "failed: SLURM's state is FAILED"),
    ("OUT_OF_MEMORY", (-9, 1), 0, "failed: OUT_OF_MEMORY"),
    ("TIMEOUT", (None, None), 0, "failed: TIMEOUT"),
    ("TIMEOUT", (75, 75), 0, "stopped"),
    ("NODE_FAIL", (1, None), 3, "failed, requeued 3 times: NODE_FAIL"),
    ("", (75, 75), 0, "stopped"),
    ("", (1, 1), 0, "failed: exit status 1"),
    ("", (), 0, "unknown: SLURM does not know the job, or does not answer"),
]


@pytest.mark.parametrize(("slurm_state", "ends", "start", "status"), ENDS)
def test_status_of_a_submitted_run(
    tmp_path: Path, slurm_state: str, ends: tuple[int | None, ...], start: int, status: str
) -> None:
    submit(tmp_path, "6")  # an earlier submission, which failed
    jobs.record(tmp_path / jobs.FOLDER, "6", 0, "end", 9, status=2)
    submit(tmp_path)
    for task, exit_status in enumerate(ends):
        for earlier in range(start):
            record(tmp_path, task, "end", earlier, status=1)
        record(tmp_path, task, "start", start, host="node1")
        if exit_status is not None:
            record(tmp_path, task, "end", start, status=exit_status)
    states = {"6": "FAILED"} | ({JOB: slurm_state} if slurm_state else {})
    assert str(run_status(tmp_path, states)) == status
    (tmp_path / "result.json").write_text("{}")
    times = f", requeued {start} time{'s' * (start > 1)}" if start else ""
    assert str(run_status(tmp_path, states)) == f"finished{times}"


def test_status_has_the_reason_of_a_stop_and_of_a_requeue(tmp_path: Path) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start", host="node1")
    record(tmp_path, 0, "stop_requested", by="time limit")
    record(tmp_path, 0, "end", status=75)
    assert str(run_status(tmp_path, {JOB: "COMPLETED"})) == "stopped: time limit"
    record(tmp_path, 0, "requeue", reason="saved", by="task", message="stopped and saved")
    for states in ({JOB: "PENDING"}, {JOB: "COMPLETING"}, {}):  # the last: SLURM does not answer
        assert str(run_status(tmp_path, states)) == "requeued (1): stopped and saved"


def test_status_of_a_job_that_slurm_did_not_requeue_is_stopped(tmp_path: Path) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start", host="node1")
    record(tmp_path, 0, "stop_requested", by="SIGTERM")
    record(tmp_path, 0, "end", status=75)
    record(tmp_path, 0, "requeue", reason="saved", by="slurm", message="stopped and saved")
    assert str(run_status(tmp_path, {JOB: "PENDING"})) == "requeued (1): stopped and saved"
    assert str(run_status(tmp_path, {JOB: "COMPLETING"})) == "requeued (1): stopped and saved"
    assert str(run_status(tmp_path, {})) == "stopped: SIGTERM"


def test_status_has_the_message_of_the_rank_that_failed_in_the_newest_start(tmp_path: Path) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start", time="2020-01-01T10:00:00+0000")
    events.append(tmp_path, "fail", time="2020-01-01T10:05:00+0000", reason="crash", rank=1, message="of start 0")
    record(tmp_path, 0, "start", 1, time="2020-01-01T11:10:00+0100")
    record(tmp_path, 0, "end", 1, status=1)
    assert str(run_status(tmp_path, {JOB: "FAILED"})) == "failed, requeued 1 time: exit status 1"
    fail(tmp_path, 0, "rank_lost", "rank 1 is gone")
    fail(tmp_path, 1, "worker_lost", "a loader process was killed")
    assert str(run_status(tmp_path, {JOB: "FAILED"})) == "failed, requeued 1 time: a loader process was killed"
    assert str(run_status(tmp_path, {JOB: "NODE_FAIL"})).endswith("a loader process was killed")
    first = failures(events.read(tmp_path), jobs.events(tmp_path / jobs.FOLDER, JOB), 0)
    assert [event["message"] for event in first] == ["of start 0"]
    assert root_failure([]) is None


def test_status_of_a_killed_job_is_not_explained_by_the_loss_of_a_rank(tmp_path: Path) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start")
    fail(tmp_path, 0, "rank_lost", "rank 1 is gone")
    record(tmp_path, 0, "end", status=1)
    assert str(run_status(tmp_path, {JOB: "FAILED"})) == "failed: rank 1 is gone"
    assert str(run_status(tmp_path, {JOB: "OUT_OF_MEMORY"})) == "failed: OUT_OF_MEMORY"


def test_status_without_slurm_is_the_last_event_of_the_run(tmp_path: Path) -> None:
    events.append(tmp_path, "start", step=0)
    os.utime(tmp_path / events.FILE, (time.time() - 60, time.time() - 60))
    assert str(run_status(tmp_path, {})) == "running"
    run = RunDir(tmp_path)
    with pytest.raises(ValueError, match="out of luck"), run.record_end():
        raise ValueError("out of luck,\nand of time")
    assert str(run_status(tmp_path, {})) == "failed: out of luck, and of time"
    with pytest.raises(Stopped), run.record_end():
        raise Stopped("pretrain stopped and saved at step 3 of 9")
    assert str(run_status(tmp_path, {})) == "stopped: pretrain stopped and saved at step 3 of 9"
    events.append(tmp_path, "start", step=0)
    assert str(run_status(tmp_path, {})) == "running"
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "fail", "stop", "start"]


def test_status_without_slurm_is_running_while_files_change(tmp_path: Path) -> None:
    run = create_run(tmp_path, steps=3)
    assert str(run_status(tmp_path, {})) == "running"
    age(tmp_path, 400)
    assert str(run_status(tmp_path, {})) == "stopped"
    assert str(run_status(tmp_path, {}, quiet=500)) == "running"
    events.append(tmp_path, "start", step=0)
    assert str(run_status(tmp_path, {})) == "running"
    run.finish({"loss": 1.0})
    assert str(run_status(tmp_path, {})) == "finished"


def test_events_survive_torn_lines(tmp_path: Path) -> None:
    submit(tmp_path)
    record(tmp_path, 0, "start", host="node1")
    for file, torn in ((f"jobs/{JOB}_0.jsonl", b'{"event": "to\xc3'), (events.FILE, b'{"event": "submit", "lo')):
        with (tmp_path / file).open("ab") as stream:  # a full disk, or kill -9
            stream.write(torn)
    record(tmp_path, 0, "end", status=2)
    submit(tmp_path, "8")
    with (tmp_path / events.FILE).open("ab") as stream:
        stream.write(b'{"event": "submit", "job": "9", "lo{"event": "submit", "job": "10"}\n')
    assert [event["event"] for event in jobs.events(tmp_path / jobs.FOLDER, JOB)[0]] == ["start", "end"]
    assert [submission.job for submission in jobs.submissions(tmp_path)] == [JOB, "8"]
    assert run_status(tmp_path, {}).job == "8"
