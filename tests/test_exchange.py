"""Ranks exchange plain values as text: nothing that comes over the network is unpickled."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch.distributed.distributed_c10d as collectives
from running import MAE, SETTINGS, finish_ranks, losses

from mae_dist.__main__ import main


def rank_without_pickle(argv: list[str], place: dict[str, str], log: Path) -> None:
    """Be a rank in which torch cannot unpickle an object of another one."""
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 2)
    os.environ.update(place)
    collectives._tensor_to_object = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main(argv))


def test_ranks_unpickle_nothing_of_each_other(tiny_data: Path, tmp_path: Path) -> None:
    context, log, out = multiprocessing.get_context("forkserver"), tmp_path / "log", tmp_path / "run"
    context.set_forkserver_preload(["mae_dist.stages.pretrain"])
    argv = ["pretrain", *SETTINGS, *MAE, f"data.path={tiny_data}", f"out={out}", "train.steps=2", "checkpoint.every=1"]
    argv += ["machine.strategy=fsdp", "machine.processes=2"]
    for attempt in range(2):  # the second one reads the checkpoint
        (out / "result.json").unlink(missing_ok=True)
        meeting = {"MAE_DIST_MEETING_FILE": str(tmp_path / f"meeting-{attempt}")}
        place = meeting | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        own = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        ranks = [context.Process(target=rank_without_pickle, args=(argv, one, log)) for one in own]
        for rank in ranks:
            rank.start()
        finish_ranks(ranks, log)
    assert len(losses(out)) == 2
