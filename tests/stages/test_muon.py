"""Runs with optim.name=muon: the same on any number of ranks and strategies, and over a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import MAE, SETTINGS, kill_ranks_when, losses, refused, start_ranks, weights

from mae_dist.__main__ import main


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_muon_is_elastic_and_resumes_after_sigkill(strategy: str, tiny_data: Path, tmp_path: Path) -> None:
    shared = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "optim.name=muon", "train.steps=2"]
    log, out = tmp_path / "log", tmp_path / "killed"
    ranks = start_ranks(2, *shared, f"out={out}", f"machine.strategy={strategy}", "checkpoint.every=1", log=log)
    kill_ranks_when(ranks, lambda: (out / "checkpoints" / "step-000000001").is_dir(), log)
    for run in (out, tmp_path / "whole"):
        assert main([*shared, f"out={run}"]) == 0
    whole = losses(tmp_path / "whole")
    assert losses(out) == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < whole[0]
    names = weights(out).keys()
    assert "optimizer.backbone.blocks.0.attn.qkv.weight.momentum" in names
    assert "optimizer.decoder_blocks.0.mlp.fc1.weight.momentum" in names
    assert "optimizer.decoder_embed.weight.exp_avg" in names
    assert "optimizer.backbone.blocks.0.attn.qkv.bias.exp_avg" in names


def test_muon_is_refused_for_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "data.path=d", f"out={tmp_path / 'o'}", *SETTINGS, "init_from=random", "optim.name=muon"]
    assert "optim.name=muon: is for the matrices of blocks" in refused(capsys, *words)
