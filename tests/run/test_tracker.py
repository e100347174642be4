"""Tracking: one line a step whatever happens, no line for a loss that is not finite, one wandb run over resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_dist import config, schema
from mae_dist.run import events, layout, tracker


def settings(path: Path, wandb: str = "off") -> schema.PretrainConfig:
    overrides = [
        f"out={path}",
        "data.path=/data",
        "model.name=vit_demo4",
        "train.global_batch=10",
        f"track.wandb={wandb}",
    ]
    return config.load("pretrain", None, overrides)


def new_tracker(path: Path, step: int = 0, wandb: str = "off") -> tracker.Tracker:
    return tracker.Tracker(path, settings(path, wandb), "pretrain", step, total=100, num_samples=50)


def test_wandb_off_is_off_though_yaml_reads_false(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("track: {wandb: off}\n")
    overrides = ["out=x", "data.path=x", "model.name=x"]
    assert config.load("pretrain", file, overrides).track.wandb == "off"
    assert settings(tmp_path, wandb="off").track.wandb == "off"


def record_step(
    tracked: tracker.Tracker, step: int, loss: float = 0.5, bad: int = 0, norm: float = 1.0, scale: float = 1.0
) -> None:
    tensors = {
        "loss": torch.tensor(loss), "bad": torch.tensor(bad), "grad_norm": torch.tensor(norm),
        "loss_scale": torch.tensor(scale), "ids": torch.tensor([step, 7]), "epochs": torch.tensor([0, 1]),
    }  # fmt: skip
    tracked.step(step, 1e-3, {"data_wait": 0.25}, saving=False, tensors=tensors)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_each_step_once_after_a_flush(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        record_step(tracked, 1, loss=0.75)
        record_step(tracked, 2, bad=3)
        assert lines(tmp_path) == []
        tracked.flush()
        tracked.flush()
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        tracked.numbers(2, {"test_top1": 12.5})
        record_step(tracked, 3)
        tracked.flush()
    first, second, evaluation, third = lines(tmp_path)
    speed = first.pop("images_per_second")
    assert speed > 0
    assert first == {
        "kind": "step",
        "step": 1,
        "epoch": 0.2,
        "loss": 0.75,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "data_wait": 0.25,
    }
    assert second["bad"] == 3
    assert evaluation == {"kind": "evaluation", "step": 2, "epoch": 0.4, "test_top1": 12.5}
    assert third["step"] == 3
    assert tracked.num_bad == 3


def test_resume_drops_later_metrics_and_a_torn_line(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        for step in range(1, 8):
            record_step(tracked, step, loss=step)
        tracked.flush()
        tracked.numbers(4, {"test_top1": 1.0})
        tracked.numbers(7, {"test_top1": 2.0})
    file = tmp_path / "metrics.jsonl"
    before = file.read_text().splitlines()
    file.write_text(file.read_text() + '{"step": 8, "lo')
    with new_tracker(tmp_path, step=4) as tracked:
        assert file.read_text().splitlines() == [*before[:4], before[7]]
        for step in range(5, 7):
            record_step(tracked, step, loss=-step)
        tracked.flush()
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, -5, -6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("broken", [{"loss": math.nan, "norm": math.nan}, {"norm": math.inf}])
def test_nonfinite_steps_are_counted_as_skipped_over_resumes(tmp_path: Path, broken: dict[str, Any]) -> None:
    with new_tracker(tmp_path) as tracked:
        record_step(tracked, 1)
        record_step(tracked, 2, **broken)
        record_step(tracked, 3)
        record_step(tracked, 4, **broken)
        tracked.flush()
        assert tracked.skipped == [2, 4]
    assert [line.get("skipped", False) for line in lines(tmp_path)] == [False, True, False, True]
    assert "grad_norm" not in lines(tmp_path)[1]
    with new_tracker(tmp_path, 3) as tracked:
        assert tracked.skipped == [2]
    assert tracker.summary(tmp_path / "metrics.jsonl")["skipped"] == 1


def test_fp16_overflow_above_loss_scale_1_is_no_fault(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        tracked.scaled = True
        record_step(tracked, 1, norm=math.inf, scale=2.0)
        record_step(tracked, 2, norm=math.inf, scale=1.0)
        tracked.flush()
        assert tracked.skipped == [2]
    assert [line["loss_scale"] for line in lines(tmp_path)] == [2.0, 1.0]
    assert all(line["skipped"] for line in lines(tmp_path))


def test_ids_are_written_and_cut_on_resume(tmp_path: Path) -> None:
    config_ = config.load(
        "pretrain", None, [f"out={tmp_path}", "data.path=x", "model.name=vit_demo4", "track.ids=true"]
    )
    for start in (0, 2):
        with tracker.Tracker(tmp_path, config_, "pretrain", start, total=100, num_samples=50) as tracked:
            for step in range(start + 1, 5):
                record_step(tracked, step)
            tracked.flush()
    written = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert written == [{"step": step, "epochs": [0, 1], "ids": [step, 7]} for step in range(1, 5)]


def test_bad_samples_are_counted_over_resumes(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        for step in range(1, 5):
            record_step(tracked, step, bad=2)
        tracked.flush()
        assert tracked.num_bad == 8
    with new_tracker(tmp_path, 3) as tracked:
        assert tracked.num_bad == 6


def test_summary_is_of_the_last_100_steps_and_the_last_evaluation(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        for step in range(1, 251):
            record_step(tracked, step, loss=step, bad=step % 100 == 0)
        tracked.flush()
        tracked.numbers(200, {"test_top1": 1.0})
        tracked.numbers(250, {"test_top1": 2.0, "test_top5": 3.0})
    assert layout.RECENT == 100
    mean = sum(range(151, 251)) / 100
    assert tracker.summary(tmp_path / "metrics.jsonl") == {"loss": mean, "bad": 2, "test_top1": 2.0, "test_top5": 3.0}


def test_summary_without_evaluations(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 2.0}\n')
    assert tracker.summary(tmp_path / "metrics.jsonl") == {"loss": 2.0, "bad": 0}


def test_wandb_offline_is_one_run_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    events.append(tmp_path, "start", step=0)
    for start in (0, 2):
        with new_tracker(tmp_path, start, wandb="offline") as tracked:
            assert tracked.mirror is not None
            record_step(tracked, start + 1)
            record_step(tracked, start + 2)
            tracked.flush()
        events.append(tmp_path, "start", step=2)
    name = tracker.wandb_id(tmp_path)
    assert len(name) == 8
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) >= 1
    assert all(f"-{name}" in folder for folder in folders)  # two in one second get a number, too
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


class Broken:
    """A mirror whose server has gone."""

    def log(self, record: dict[str, Any]) -> None:
        raise ConnectionError(f"cannot send {record}")

    finish = log


def test_wandb_failure_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with new_tracker(tmp_path) as tracked:
        tracked.mirror = Broken()
        record_step(tracked, 1)
        record_step(tracked, 2)
        tracked.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert caplog.text.count("wandb failed") == 1


@pytest.mark.parametrize(("seconds", "warned"), [(2.0, True), (3.0, False)])
def test_waiting_for_data_is_warned_of_once(
    seconds: float, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each step waits 0.25 s for data; the first flush, in which the loader starts, does not count."""
    now = [0.0]
    monkeypatch.setattr(tracker.time, "perf_counter", lambda: now[0])
    with new_tracker(tmp_path) as tracked:
        for step in range(1, 60):
            now[0] += seconds
            record_step(tracked, step)
            tracked.flush()
            if step == 10:
                assert "waiting for data" not in caplog.text
    assert caplog.text.count("12 % of the time went into waiting for data (machine.workers=4)") == warned
    assert caplog.text.count("waiting for data") == warned
