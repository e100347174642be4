"""Tracking: one line a step whatever happens, no line for a loss that is not finite, one wandb run over resumes."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SETTINGS, start_forked
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from mae_dist import config, cost, schema
from mae_dist.__main__ import main
from mae_dist.run import events, jsonl, layout, mirror, tracker


def settings(path: Path, wandb: str | None = "off") -> schema.PretrainConfig:
    overrides = [
        f"out={path}",
        "data.path=/data",
        "model.name=vit_demo4",
        "train.global_batch=10",
        f"track.wandb={wandb or 'none'}",
    ]
    return config.load("pretrain", None, overrides)


def new_tracker(path: Path, step: int = 0, wandb: str | None = "off") -> tracker.Tracker:
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


def record_steps(path: Path, steps: range, killed: bool = False) -> None:
    """A start that records these steps on wandb, offline, and then stops or kills its process."""
    if killed:  # this process has no wandb in common with that of the tests
        os.environ.pop("WANDB_SERVICE", None)
    with new_tracker(path, steps.start - 1, wandb="offline") as tracked:
        for step in steps:
            record_step(tracked, step)
        tracked.flush()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)


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
    first, second, evaluation, third, interval = lines(tmp_path)
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
    assert interval["kind"] == "interval"  # none of the first flush, in which a start waits for its loader
    assert interval["step"] == 3
    assert "mfu" not in interval  # neither operations nor peak are known
    assert sum(interval[part] for part in ("data", "communication", "checkpoint", "compute")) == pytest.approx(1)


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


def test_log_has_a_line_of_the_first_step_and_days_that_are_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with new_tracker(tmp_path) as tracked:
        tracked.flushed -= 2e4  # two steps took so many seconds
        for step in (1, 2):
            record_step(tracked, step, loss=step / 4)
        tracked.flush()
        record_step(tracked, 3)
        tracked.flush()
    silent, line = [message for message in caplog.messages if message.startswith("step ")]
    assert silent == "step 1/100; the loss is shown every 20 steps (track.every)"
    assert line.startswith("step 2/100  loss 0.3750  lr 0.001  0.001 images/s  data 0%  ")
    assert line.endswith(" 11 days, 8:13:20 left")


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


def test_summary_is_of_the_last_tenth_of_the_steps_and_the_last_evaluation(tmp_path: Path) -> None:
    with new_tracker(tmp_path) as tracked:
        for step in range(1, 251):
            record_step(tracked, step, loss=step, bad=step % 100 == 0)
        tracked.flush()
        tracked.numbers(200, {"test_top1": 1.0})
        tracked.numbers(250, {"test_top1": 2.0, "test_top5": 3.0})
    assert [layout.recent(steps) for steps in (1, 29, 999, 10**6)] == [1, 2, 99, 100]
    mean = sum(range(226, 251)) / 25
    assert tracker.summary(tmp_path / "metrics.jsonl") == {"loss": mean, "bad": 2, "test_top1": 2.0, "test_top5": 3.0}


def test_summary_without_evaluations(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 2.0}\n')
    assert tracker.summary(tmp_path / "metrics.jsonl") == {"loss": 2.0, "bad": 0}


def mirrored(run: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """(folder, internal step, values) of each record in the offline files of wandb, in the order of their making."""
    found = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        data, place, content = file.read_bytes(), 7, b""
        while place + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, pieces with checksum, length and kind
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last piece
                record, content = Record.FromString(content), b""
                if record.HasField("history"):
                    items = record.history.item
                    values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                    found.append((file.parent.name, record.history.step.num, values))
    return found


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_is_one_complete_run_over_stops_and_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    events.append(tmp_path, "start", step=0)

    def make(steps: range, stopped: bool) -> None:
        """A start that makes these steps, and then stops, or is killed with what wandb has not written yet."""
        if stopped:
            record_steps(tmp_path, steps)
            return
        killed = start_forked(record_steps, tmp_path, steps, True)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL

    make(range(1, 3), stopped=True)
    make(range(3, 6), stopped=False)
    make(range(5, 7), stopped=True)  # from the checkpoint of step 4
    make(range(7, 8), stopped=True)
    found = mirrored(tmp_path)
    assert [values["step"] for _, _, values in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [internal for _, internal, _ in found] == [0, 1, 2, 3, 4, 5, 6]
    assert len({folder for folder, _, _ in found}) == 3
    assert all(f"-{mirror.run_id(tmp_path)}" in folder for folder, _, _ in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("verb", "settings", "steps"),
    [("knn", ["knn.k=5"], []), ("probe", ["train.steps=2", "heads.sgd=[0.1]", "heads.ridge=true"], [1, 2])],
)
def test_wandb_has_what_knn_and_probe_heads_measure(
    verb: str, settings: list[str], steps: list[int], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = [verb, f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, "init_from=random", *settings]
    assert main([*words, "track.wandb=offline"]) == 0
    found = [values for _, _, values in mirrored(tmp_path / "run")]
    assert [values["step"] for values in found if "train/loss" in values] == steps
    result = json.loads((tmp_path / "run/result.json").read_text())
    numbers = {name.removeprefix("test_"): value for name, value in result.items() if isinstance(value, int | float)}
    last = {name.removeprefix("test/"): value for name, value in found[-1].items()}
    assert {"top1", "top5"} <= numbers.keys() & last.keys()
    assert all(numbers[name] == value for name, value in last.items() if name in numbers)


def test_last_step_has_a_line_though_the_one_before_is_recent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rising = replace(settings(tmp_path), train=schema.TrainConfig(global_batch=10, resolutions=((0, 16), (0.5, 224))))
    with tracker.Tracker(tmp_path, rising, "pretrain", 0, 3, 50, peak=1e6) as tracked:
        for step in (1, 2, 3):
            record_step(tracked, step)
            tracked.flush()
    shown = [message.split("  ") for message in caplog.messages if message.startswith("step ")]
    assert [words[0] for words in shown] == ["step 1/3", "step 3/3"]
    assert [word for word in shown[1] if word.startswith("MFU ")]
    assert tracker.last_speed(tmp_path) > 0
    lines = jsonl.read(tmp_path / layout.METRICS)
    speeds = [line["images_per_second"] for line in lines if line["kind"] == jsonl.STEP][1:]
    intervals = [line for line in lines if line["kind"] == jsonl.INTERVAL]
    found = [line["mfu"] * 1e6 / speed for line, speed in zip(intervals, speeds, strict=True)]
    costs = [cost.pretraining("vit_demo4", rising.mae, side) for side in (16, 224)]
    assert found == pytest.approx([found.training_flops for found in costs if found], rel=1e-3)


def test_wandb_names_are_grouped() -> None:
    summed = {"kind": "interval", "step": 3, "mfu": 0.5, "limit": "data"}
    assert mirror.grouped(summed) == {"step": 3, "system/mfu": 0.5, "system/limit": "data"}
    step = {"kind": "step", "step": 3, "epoch": 0.1, "loss": 1.0, "images_per_second": 5.0}
    assert mirror.grouped(step) == {"step": 3, "epoch": 0.1, "train/loss": 1.0, "system/images_per_second": 5.0}
    assert mirror.grouped({"kind": "evaluation", "step": 3, "test_top1": 1.0}) == {"step": 3, "test/top1": 1.0}


def test_wandb_variables_count_where_a_setting_was_not_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Online without a key: offline at once, without a question."""
    for name, value in {"MODE": "online", "PROJECT": "mine", "NAME": "its-name", "TAGS": "a,b", "SILENT": "true",
                        "DIR": str(tmp_path)}.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    with new_tracker(run, wandb=None) as tracked:
        assert tracked.mirror is not None
        known: Any = tracked.mirror.run
        assert (known.project, known.name, known.tags) == ("mine", "its-name", ("a", "b"))
    assert "there is no key" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert mirror.mode_of(schema.TrackConfig(wandb="off")) == "off"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "cannot be reached" in (mirror.offline_reason("http://127.0.0.1:9") or "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hangs", [False, True])
def test_wandb_failure_does_not_end_the_run(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """wandb refuses what is logged to a run that has ended. One thread makes all calls."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    with new_tracker(tmp_path, wandb="offline") as tracked:
        sent: Any = tracked.mirror
        record_step(tracked, 1)
        tracked.flush()
        threads = threading.active_count()
        if hangs:
            monkeypatch.setattr(mirror, "WAIT", 0.1)
            sent.calls.put(threading.Event().wait)
        else:
            sent.run.finish()
        for step in (2, 3):
            record_step(tracked, step)
        tracked.flush()
        assert threading.active_count() <= threads
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == [1, 2, 3]
    assert caplog.text.count("wandb failed") == 1
    assert sent.run is None


@pytest.mark.parametrize(("seconds", "warned"), [(2.0, True), (3.0, False)])
def test_limit_of_the_speed_is_logged_when_it_changes(
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
                assert "limited by" not in caplog.text
    limited = "limited by data: the run waited 12% of the time for images (machine.workers=4); `mae-dist bench data`"
    assert caplog.text.count(limited) == warned
    assert caplog.text.count("limited by") == warned
