"""What can be known before a job is queued, so that a mistake costs a second and not a night: settings against shape,
data, start, folder and disk. Every finding is one sentence (ValueError). Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from mae_dist import config as configuration
from mae_dist import folder, jobs, sizes
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.schema import RANDOM, Finetune, Pretrain

ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")
SPARE = 2**30
"""Bytes of disk beside checkpoints: logs, pictures, code."""


def check(verb: str, config: Any, cluster: Cluster) -> None:
    """Everything about one run whose data and start are there already."""
    check_shape(config, cluster)
    train = open_split(config.data.path, config.data.split)
    labelled = verb != "pretrain"
    test_path = config.data.test_path or config.data.path
    if labelled or config.data.test_path is not None:
        test = open_split(test_path, config.data.test_split)
        parts = (train, test) if labelled else (train,)
    else:
        parts = (train,)
    for index in parts:
        check_readable(index)
    check_start(config)
    check_folder(verb, config, "-".join(index.fingerprint for index in parts))
    check_disk(config)


def check_shape(config: Any, cluster: Cluster) -> None:
    """The model's name; ranks of the smallest and of the largest shape against the settings."""
    sizes.size_of(config.model.name)
    for nodes in dict.fromkeys(cluster.nodes_range):
        configuration.check_world(config, nodes * cluster.ranks_per_node)


def check_readable(index: ShardIndex) -> None:
    """Whether this user may read the tars."""
    for file in index.tars:
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file}: you may not read it; ask its owner for `chmod a+r`")


def check_start(config: Any) -> None:
    """The run that `from=` names must have something to start from."""
    start = getattr(config, "start", RANDOM)
    if start == RANDOM:
        return
    if not (Path(start) / folder.CONFIG).is_file():
        raise ValueError(f"from={start}: no run lies there; give the out= folder of an earlier run, or random")
    if not folder.checkpoints(Path(start)):
        raise ValueError(f"from={start}: the run has no checkpoint yet; wait for it, or make it a pipeline")
    was = folder.settings(Path(start))[2].model.name
    if was != config.model.name:
        raise ValueError(f"model.name={config.model.name}: the run from={start} has {was}; set model.name={was}")


def check_folder(verb: str, config: Any, fingerprint: str | None) -> None:
    """The run's folder: nobody's else, not finished, no job at work in it."""
    out = Path(config.out)
    if (out / folder.CONFIG).is_file() and fingerprint is not None:
        old = folder.settings(out)[2].data
        data = dataclasses.replace(config.data, mean=config.data.mean or old.mean, std=config.data.std or old.std)
        config = dataclasses.replace(config, data=data)
    if fingerprint is not None:
        folder.refuse_others(out, verb, config, fingerprint)
    if folder.result(out):
        raise ValueError(f"out={out}: this run is finished; `mae-dist report {out}` draws it")
    check_idle(out)


def check_idle(run: Path) -> None:
    """No job that could write to the run may be queued or running."""
    names = [submission.job for submission in jobs.submissions(run)]
    for name, state in jobs.states(names).items():
        if state in ALIVE:
            raise ValueError(f"out={run}: job {name} of this run is {state}; wait for it, or end it: scancel {name}")


def check_disk(config: Any) -> None:
    """Room for as many checkpoints as are kept at once, and one that is being written."""
    need = state_bytes(config) * (config.checkpoint.keep + 1) + SPARE
    there = next(path for path in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise ValueError(
            f"out={config.out}: {free / 1e9:.1f} GB of disk are free, but {config.checkpoint.keep + 1} checkpoints of "
            f"{state_bytes(config) / 1e9:.2f} GB need {need / 1e9:.1f}; make room, or lower checkpoint.keep"
        )


def state_bytes(config: Any) -> int:
    """About the bytes of a checkpoint: parameters in fp32, their two moments, their average if there is one."""
    backbone = sizes.num_parameters(config.model.name, config.model.image_size)
    decoder = 13 * config.mae.decoder_depth * config.mae.decoder_dim**2 if isinstance(config, Pretrain) else 0
    if isinstance(config, Pretrain | Finetune):
        return 4 * (backbone + decoder) * (3 + bool(config.train.ema))
    return 4 * backbone
