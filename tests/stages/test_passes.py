"""What people see of a run: its first lines, the rank that slows it down, passes over a split, what comes next."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from running import MAE, SETTINGS, finish_ranks, records, start_ranks

from mae_dist import devices
from mae_dist.__main__ import main
from mae_dist.batch import Batch
from mae_dist.objectives import mae
from mae_dist.stages import passes


def delay(rank: int, seconds: float) -> None:
    """Have one rank take longer to compute."""
    if os.environ["RANK"] == str(rank):
        forward = mae.MAE.forward
        mae.MAE.forward = lambda self, batch: (time.sleep(seconds), forward(self, batch))[1]


def test_slow_rank_is_named_in_the_run_and_its_log(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", *SETTINGS, *MAE, f"data.path={tiny_data}", f"out={run}", "train.steps=3"]
    finish_ranks(start_ranks(2, *words, log=log, before=partial(delay, 1, 1.0)), log)
    intervals = [record for record in records(run) if record["kind"] == "interval"]
    limits = [(found["step"], found["limit"], found["rank"]) for found in intervals]
    assert limits == [(2, "compute", 1), (3, "compute", 1)]
    assert all(found["waited"] > 0.1 for found in intervals)
    assert all(0 < found["mfu"] < 1 for found in intervals)
    printed = log.read_text()
    assert "pretrain: 3 steps of batch 16 = 2 ranks (ddp) x 8 images x 1 micro-batch" in printed
    assert f"GFLOPs an image and step, on 2 x {devices.name_of(torch.device('cpu'))} (1 thread)" in printed
    typed = f"data.path={tiny_data} train.precision=fp32"
    assert f"labels: mae-dist probe {typed} init_from={run} out={run}-probe" in printed
    assert main(["logs", str(run), "--lines", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run}: finished")
    assert "step 3/3  loss " in shown
    assert "batch 16" not in shown
    assert main(["logs", str(run), "--all"]) == 0
    assert "batch 16" in capsys.readouterr().out


def test_pass_over_a_split_logs_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    number = torch.zeros(4, dtype=torch.int64)
    batch = Batch(torch.zeros(4, 3, 2, 2), number, number, number, number.bool())
    assert len(list(passes.reported(iter([batch] * 3), 10, "test split"))) == 3
    assert not caplog.messages  # it was short
    monkeypatch.setattr(passes, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(passes, "SHORT", 0)
    list(passes.reported(iter([batch] * 3), 10, "test split"))
    assert [message.partition(" images")[0] for message in caplog.messages] == [
        "test split: 4/10", "test split: 8/10", "test split: 10",
    ]  # fmt: skip
