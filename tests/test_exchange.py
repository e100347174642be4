"""Ranks exchange plain values as text: nothing that comes over the network is unpickled."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.distributed_c10d as collectives
from running import MAE, SETTINGS, finish_ranks, losses, start_ranks


def unpickle_nothing() -> None:
    """Let torch be unable to unpickle an object of another rank."""
    collectives._tensor_to_object = None  # pyright: ignore[reportAttributeAccessIssue]


def test_ranks_unpickle_nothing_of_each_other(tiny_data: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    argv = ["pretrain", *SETTINGS, *MAE, f"data.path={tiny_data}", f"out={out}", "train.steps=2", "checkpoint.every=1"]
    for _ in range(2):  # the second one reads the checkpoint
        (out / "result.json").unlink(missing_ok=True)
        finish_ranks(start_ranks(2, *argv, "machine.strategy=fsdp", log=log, before=unpickle_nothing), log)
    assert len(losses(out)) == 2
