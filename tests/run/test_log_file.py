"""The log file of a run: what was logged before it had a folder, errors, no command to a terminal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mae_dist import printed
from mae_dist.run import events, log_file
from mae_dist.signals import Stopped

log = logging.getLogger("mae_dist.test")


def content(run: Path) -> list[str]:
    """Lines of the log file, without the time."""
    return [line[20:] for line in (run / log_file.FILE).read_text().splitlines()]


def test_log_file_has_what_was_logged_from_the_start_of_the_command_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for number in (1, 2):
        printed.log_to_stderr(logging.INFO)
        log.info("before %d\x1b[2J", number)
        with log_file.kept(tmp_path, rank=0):
            log.info("in %d", number)
            log_file.unprinted.info("a bar")
        log.info("after")
    assert content(tmp_path) == ["before 1\\x1b[2J", "in 1", "a bar", "before 2\\x1b[2J", "in 2", "a bar"]


def test_log_file_has_the_error_of_a_rank_and_the_traceback_of_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), log_file.kept(tmp_path, rank=3):
        raise ValueError("data.path=x: wrong")
    with pytest.raises(KeyError), log_file.kept(tmp_path, rank=0):
        _ = {}["missing"]
    first, second, *_ = content(tmp_path)
    assert (first, second) == ("[rank 3] mae-dist: data.path=x: wrong", "Traceback (most recent call last):")
    assert (tmp_path / log_file.FILE).read_text().splitlines()[-1] == "KeyError: 'missing'"


def test_log_file_says_once_that_a_run_was_stopped_without_a_traceback(tmp_path: Path) -> None:
    for rank in (1, 0):
        with pytest.raises(Stopped), log_file.kept(tmp_path, rank):
            raise Stopped("pretrain stopped and saved at step 9 of 75")
    assert content(tmp_path)[-1] == "mae-dist: pretrain stopped and saved at step 9 of 75"
    assert "Traceback" not in (tmp_path / log_file.FILE).read_text()


def test_log_file_is_neither_made_in_a_job_nor_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / log_file.FILE).symlink_to(tmp_path / "elsewhere")
    with log_file.kept(tmp_path, rank=0):
        log.warning("lost")
    assert "log.txt: cannot be written" in caplog.text
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / log_file.FILE).unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    events.append(tmp_path, "submit", job="7", logs="jobs", nodes=1, tasks_per_node=1)
    with log_file.kept(tmp_path, rank=0):
        log.warning("in the log of the job")
    assert not (tmp_path / log_file.FILE).exists()
