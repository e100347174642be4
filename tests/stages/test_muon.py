"""Runs with optim.name=muon: the same on any number of ranks and strategies, and over a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import MAE, SETTINGS, copy_of_begun, kill_ranks_when, losses, refused, start_ranks, weights

from mae_dist.__main__ import main


def test_muon_learns_and_its_resume_is_bit_identical(tiny_data: Path, tmp_path: Path) -> None:
    shared, whole = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "optim.name=muon"], tmp_path / "whole"
    assert main([*shared, "train.steps=2", "checkpoint.every=1", f"out={whole}"]) == 0
    out = copy_of_begun(whole, tmp_path / "begun")
    assert main([*shared, "train.steps=2", f"out={out}"]) == 0
    assert losses(out) == losses(whole)
    assert losses(out)[1] < losses(out)[0]
    ended, expected = weights(out), weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ended.items())
    assert "optimizer.backbone.blocks.0.attn.qkv.weight.momentum" in ended
    assert "optimizer.decoder_blocks.0.mlp.fc1.weight.momentum" in ended
    assert "optimizer.decoder_embed.weight.exp_avg" in ended
    assert "optimizer.backbone.blocks.0.attn.qkv.bias.exp_avg" in ended


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_muon_is_elastic_and_resumes_after_sigkill(strategy: str, tiny_data: Path, tmp_path: Path) -> None:
    shared = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "optim.name=muon", "train.steps=3"]
    log, out = tmp_path / "log", tmp_path / "killed"
    ranks = start_ranks(2, *shared, f"out={out}", f"machine.strategy={strategy}", "checkpoint.every=1", log=log)
    kill_ranks_when(ranks, lambda: (out / "checkpoints" / "step-000000001").is_dir(), log)
    for run in (out, tmp_path / "whole"):
        assert main([*shared, f"out={run}"]) == 0
    whole = losses(tmp_path / "whole")
    assert losses(out) == pytest.approx(whole, rel=1e-5)


def test_muon_is_refused_for_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "data.path=d", f"out={tmp_path / 'o'}", *SETTINGS, "init_from=random", "optim.name=muon"]
    assert "optim.name=muon: is for the matrices of blocks" in refused(capsys, *words)
