"""What can be known before a job is queued, so that a mistake costs a second and not a night: settings against shape,
data, start, folder and disk. Every finding is one sentence (ValueError). Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.cluster import Cluster, ask
from mae_dist import config as configuration
from mae_dist import model_sizes
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.run import jobs, layout
from mae_dist.schema import RANDOM, FinetuneConfig, PretrainConfig

ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")
SPARE = 2**30
"""Bytes of disk beside checkpoints: logs, pictures, code."""


def check(verb: str, config: Any, cluster: Cluster) -> None:
    """Everything about one run whose data and start are there already."""
    check_shape(config, cluster)
    for index in deciding(verb, config):
        check_readable(index)
    if verb == "pretrain" and config.data.test_path is not None:
        open_split(config.data.test_path, config.data.test_split)
    check_start(config)
    check_folder(verb, config)
    check_disk(config)


def deciding(verb: str, config: Any) -> list[ShardIndex]:
    """The splits that decide what comes out."""
    data = config.data
    train = open_split(data.path, data.split)
    return [train] if verb == "pretrain" else [train, open_split(data.test_path or data.path, data.test_split)]


def check_shape(config: Any, cluster: Cluster) -> None:
    """The model's name; ranks of every number of nodes that SLURM may choose against the settings."""
    model_sizes.size_of(config.model.name)
    least, most = cluster.nodes_range
    for nodes in range(least, most + 1):
        configuration.check_world(config, nodes * cluster.ranks_per_node)


def check_readable(index: ShardIndex) -> None:
    """Whether this user may read the tars."""
    for file in index.tars:
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file}: you may not read it; ask its owner for `chmod a+r`")


def check_start(config: Any) -> None:
    """The run that `init_from=` names must have something to start from."""
    start = getattr(config, "init_from", RANDOM)
    if start == RANDOM:
        return
    if not (Path(start) / layout.CONFIG).is_file():
        raise ValueError(f"init_from={start}: no run lies there; give the out= folder of an earlier run, or random")
    if not layout.checkpoints(Path(start)):
        raise ValueError(f"init_from={start}: the run has no checkpoint yet; wait for it, or make it a pipeline")
    configuration.check_same_model(config, layout.settings(Path(start))[2])


def check_folder(verb: str, config: Any) -> None:
    """The run's folder: nobody's else, not finished."""
    if finished(verb, config):
        raise ValueError(f"out={config.out}: this run is finished; `mae-dist report {config.out}` draws it")


def finished(verb: str, config: Any) -> bool:
    """Whether this very run is finished; ValueError if its folder is another run's, or is no run's at all."""
    out = Path(config.out)
    if (out / layout.CONFIG).is_file():
        old = layout.settings(out)[2].data
        data = dataclasses.replace(config.data, mean=config.data.mean or old.mean, std=config.data.std or old.std)
        config = dataclasses.replace(config, data=data)
    layout.refuse_others(out, verb, config, "-".join(index.fingerprint for index in deciding(verb, config)))
    return layout.result(out) is not None


def check_idle(runs: Iterable[Path]) -> None:
    """No job that could write to the runs may be queued or running."""
    owners = {submission.job: run for run in runs for submission in jobs.submissions(run)}
    states = jobs.states(owners)
    if owners and not states:  # they are forgotten, or nobody answers
        name, run = list(owners.items())[-1]
        unknown = f"out={run}: whether job {name} of this run is still alive cannot be known"
        if shutil.which("squeue") is None:
            raise ValueError(f"{unknown}, as there is no squeue here; submit from a login node of its cluster")
        try:
            ask("squeue", "-h", "--me", "-o", "%i")
        except ValueError as error:
            raise ValueError(f"{unknown} ({error}); try again when SLURM answers") from error
    if alive := [name for name in owners if states.get(name) in ALIVE]:
        name, it, more, end = alive[0], "it", "", alive[0]
        if len(alive) > 1:
            it, more = "them", f", and {len(alive) - 1} more live"
            end = " ".join(dict.fromkeys(job.partition("_")[0] for job in alive))
        raise ValueError(
            f"out={owners[name]}: job {name} of this run is {states[name]}{more}; "
            f"wait for {it}, or end {it}: scancel {end}"
        )


def check_writable(path: Path) -> None:
    """Whether this user can make the folder, or write into it if it is there."""
    there = existing(path)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK) and shutil.disk_usage(there).total):
        raise ValueError(f"out={path}: nothing can be written in {there}; choose a folder where you may write")


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(found for found in (path.absolute(), *path.absolute().parents) if os.path.exists(found))


def check_disk(config: Any) -> None:
    """Room for as many checkpoints as are kept at once, and one that is being written."""
    need = state_bytes(config) * (config.checkpoint.keep + 1) + SPARE
    free = shutil.disk_usage(existing(Path(config.out))).free
    if free < need:
        raise ValueError(
            f"out={config.out}: {free / 1e9:.1f} GB of disk are free, but {config.checkpoint.keep + 1} checkpoints of "
            f"{state_bytes(config) / 1e9:.2f} GB need {need / 1e9:.1f}; make room, or lower checkpoint.keep"
        )


def state_bytes(config: Any) -> int:
    """About the bytes of a checkpoint: parameters in fp32, their two moments, their average if there is one."""
    backbone = model_sizes.num_parameters(config.model.name, config.model.image_size)
    decoder = 13 * config.mae.decoder_depth * config.mae.decoder_dim**2 if isinstance(config, PretrainConfig) else 0
    if isinstance(config, PretrainConfig | FinetuneConfig):
        return 4 * (backbone + decoder) * (3 + bool(config.train.ema))
    return 4 * backbone
