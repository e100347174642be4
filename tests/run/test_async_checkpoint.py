"""Saves beside training: each is of the step at which it began, and one that fails ends no run before its last save."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import opened
from torch import Tensor

from mae_dist import evaluate, schema
from mae_dist.__main__ import main
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.errors import MachineFault
from mae_dist.run import async_checkpoint, checkpoint, directory
from mae_dist.run.directory import RunDir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TINY = [
    "model.name=vit_demo4", "model.image_size=32", "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4",
    "train.precision=fp32", "train.global_batch=4", "machine.processes=1",
]  # fmt: skip


def simple(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((3, 2), value), "optimizer.weight.exp_avg": torch.full((3, 2), value)}


def test_async_save_is_of_the_step_at_which_it_began(tmp_path: Path) -> None:
    run, large = opened(tmp_path), torch.ones(1_000_000)
    state = simple(1.0) | {"model.large": large, "optimizer.large.exp_avg": large.clone(), "ema.large": large.clone()}
    with async_checkpoint.AsyncSaver(run, schema.CheckpointConfig(keep=5), pinned=False) as saving:
        for step in (1, 2, 3):
            saving.save(step, state)
            for name, tensor in state.items():
                if name.startswith(("optimizer.", "ema.")):  # only an update changes these, which waits
                    saving.wait_for_copies()
                tensor += 1
        saving.wait()
        assert not saving.busy
    for step in (1, 2, 3):
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        checkpoint.load(tmp_path / "checkpoints" / f"step-{step:09d}", found)
        assert all((tensor == step).all() for tensor in found.values())


def test_async_save_that_fails_is_logged_and_ends_the_run_only_if_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = opened(tmp_path)
    run.save(1, checkpoint.share(simple(1.0)), 10)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("in the way")
    with async_checkpoint.AsyncSaver(run, schema.CheckpointConfig(), pinned=False) as saving:
        saving.save(2, simple(2.0))
        saving.wait(last=False)
        assert "checkpoint of step 2 could not be written" in caplog.text
        assert "Training continues" in caplog.text
        saving.save(3, simple(3.0))
        with pytest.raises(MachineFault, match="checkpoint of step 3 could not be written"):
            saving.wait()


def test_async_save_has_ended_before_an_evaluation_forks_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a worker that hung in fork() because the thread of a save was just ending, and the rank waited for it."""
    pack(from_synthetic(16, 4), tmp_path / "set", shard_size=8)
    quick, mean_loss, seen = RunDir.save, evaluate.mean_loss, []

    def slow(self: RunDir, *arguments: Any) -> None:
        time.sleep(0.3)
        quick(self, *arguments)

    def measured(*arguments: Any) -> tuple[float, int]:
        seen.append([thread for thread in threading.enumerate() if "_write" in thread.name])
        return mean_loss(*arguments)

    monkeypatch.setattr(RunDir, "save", slow)
    monkeypatch.setattr(evaluate, "mean_loss", measured)
    words = [*TINY, "train.steps=3", "track.evaluate_every=0.25", "checkpoint.every=1"]
    assert main(["pretrain", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'run'}", *words]) == 0
    assert seen == [[], [], []]


@pytest.mark.parametrize(("minutes", "saved"), [("1e-9", [1, 2, 3, 4]), ("60", [4])])
def test_checkpoint_minutes_bounds_the_lost_work(tmp_path: Path, minutes: str, saved: list[int]) -> None:
    pack(from_synthetic(16, 4), tmp_path / "set", shard_size=8)
    words = [*TINY, "train.steps=4", f"checkpoint.minutes={minutes}", "checkpoint.keep=9"]
    assert main(["pretrain", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'run'}", *words]) == 0
    assert [directory.step_of(path) for path in RunDir(tmp_path / "run").checkpoints()] == saved


def test_async_save_calls_nothing_of_cuda_in_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is one a thread, and begins at 0: each rank would have a second context, on GPU 0."""
    called: list[str] = []
    for name in ("current_stream", "current_device", "synchronize", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = opened(tmp_path)
    with async_checkpoint.AsyncSaver(run, schema.CheckpointConfig(), pinned=False) as saving:
        saving.save(1, simple(1.0))
        saving.wait()
    assert run.restore(simple(0.0)) == 1
    assert not called


def test_update_waits_for_the_copy_of_what_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(from_synthetic(16, 4), tmp_path / "set", shard_size=8)
    quick, found = async_checkpoint.AsyncSaver._copy, []

    def slow(self: async_checkpoint.AsyncSaver, name: str, part: checkpoint.Part) -> checkpoint.Part:
        time.sleep(0.002 * (threading.current_thread() is not threading.main_thread()))
        return quick(self, name, part)

    words = [*TINY, "train.steps=3", "train.ema=0.9", "checkpoint.every=1", "checkpoint.keep=9"]
    for name in ("quick", "slow"):
        assert main(["pretrain", f"data.path={tmp_path / 'set'}", f"out={tmp_path / name}", *words]) == 0
        monkeypatch.setattr(async_checkpoint.AsyncSaver, "_copy", slow)
        found.append(
            [checkpoint.read_named(path, checkpoint.names_in(path)) for path in RunDir(tmp_path / name).checkpoints()]
        )
    for first, second in zip(*found, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(name.startswith("ema.") for name in first)
