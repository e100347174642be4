"""Ranks: groups wait alike, and lost ranks are named, also where connections cannot be closed."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import pytest
import torch

from mae_dist import dist, parallel
from mae_dist.errors import RankLost
from mae_dist.schema import MachineConfig

CPU = torch.device("cpu")


def test_timeout_of_hsdp_groups_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives the groups of a mesh 30 minutes."""
    dist.setup()
    monkeypatch.setattr(dist, "_timeout", timedelta(seconds=7))
    where = parallel.mesh(MachineConfig(strategy="hsdp", shards=1), CPU)
    waits = [group._get_backend(CPU).options._timeout for group in where.get_all_groups()]
    assert waits == [timedelta(seconds=7)] * 2


def test_lost_ranks_are_named_before_connections_that_hang_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits in the end of a group for a collective that a lost rank never joins."""
    store, ended, order = dist.dist.HashStore(), threading.Event(), []
    monkeypatch.setattr(dist, "_store", store)
    monkeypatch.setattr(dist, "ROLL_CALL", 0.1)
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "shutdown", lambda: order.append(store.check(["here/0"])) or ended.wait(60))
    exits: list[tuple] = []
    monkeypatch.setattr(dist.atexit, "register", lambda *arguments: exits.append(arguments))
    with (
        pytest.raises(RankLost, match="rank 1 did not answer at step 3: hung or gone"),
        dist.name_lost_ranks(lambda: "step 3"),
    ):
        raise RuntimeError("[gloo] Connection closed by peer")
    ended.set()
    assert order == [True]  # this rank had reported already
    assert exits == [(os._exit, 1)]  # or the end of the process would hang where the thread does
