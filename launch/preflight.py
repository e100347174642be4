"""Checks before a job is queued, so that an error costs a second and not a night in the queue: number of ranks, data,
initial weights, folder and disk. Each raises ValueError with one sentence. Imports no torch.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from launch.cluster import Cluster
from mae_dist import config as configuration
from mae_dist import forecast, model_sizes, starts
from mae_dist.data import places, split_checks
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.run import identity, jobs, layout, slurm_cli
from mae_dist.schema import RunConfig

DISK_MARGIN = 2**30
"""Bytes of disk for what is not a checkpoint: logs, pictures, code."""


def check(verb: str, config: RunConfig, cluster: Cluster) -> None:
    """All checks of a run whose data and initial weights exist already."""
    check_initial_weights(config)
    check_ranks(config, cluster)
    for index in splits_used(verb, config):
        check_readable(index)
    if verb == "pretrain":
        test_split(config)
    check_folder(verb, config)
    check_disk(config)


def splits_used(verb: str, config: RunConfig) -> list[ShardIndex]:
    """The splits on which the result of a run depends."""
    data = config.data
    train = open_split(data.path, data.split, merging=data.merge_labels, allow_outside=data.allow_outside)
    split_checks.refuse_mixed(train, f"data.path={data.path}")
    if verb == "pretrain":
        return [train]
    test = open_split(
        data.test_path or data.path, data.test_split, merging=data.merge_labels, allow_outside=data.allow_outside
    )
    return [train, split_checks.numbered_like(train, test, data.accept)]


def test_split(config: RunConfig) -> ShardIndex | None:
    """The split on which a pretraining measures its loss; None where there is none."""
    data = config.data
    path = data.test_path or data.path
    if data.test_path is None and places.evaluation_split(path, data.test_split) not in places.splits(path):
        return None
    return open_split(path, data.test_split, allow_outside=data.allow_outside)


def check_ranks(config: RunConfig, cluster: Cluster) -> None:
    """Whether the model exists, and the settings allow the ranks of every number of nodes that SLURM may choose."""
    model_sizes.size_of(config.model.name)
    least, most = cluster.nodes_range
    for nodes in range(least, most + 1):
        configuration.check_world(config, nodes * cluster.ranks_per_node)


def check_readable(index: ShardIndex) -> None:
    """Whether this user may read the tars of a split."""
    for file in index.tars:
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file}: you may not read it; ask its owner for `chmod a+r`")


def check_initial_weights(config: RunConfig) -> None:
    """Whether the run that `init_from=` names has a checkpoint, of the same model."""
    start = config.origin
    if start is None:
        return
    if starts.is_of_others(Path(start)):
        if config.model.name == starts.UNKNOWN:
            raise ValueError(
                f"init_from={start}: is not imported yet, so it does not say model.name; give that, or run "
                f"`mae-dist import {start} --out RUN` first and give init_from=RUN"
            )
        return
    run, step = starts.run_and_step(start)
    if not (run / layout.CONFIG).is_file():
        raise ValueError(f"init_from={start}: no run lies there; give the out= folder of an earlier run, or random")
    if step is not None:
        layout.checkpoint_at(run, step, f"init_from={start}")
    elif not layout.checkpoints(run):
        raise ValueError(f"init_from={start}: the run has no checkpoint yet; wait for it, or make it a pipeline")
    starts.check_same_model(config, layout.settings(run)[2])


def check_folder(verb: str, config: RunConfig) -> None:
    """Whether the run's folder is its own, and the run is not finished."""
    if finished(verb, config):
        raise ValueError(f"out={config.out}: this run is finished; `mae-dist report {config.out}` draws it")


def finished(verb: str, config: RunConfig) -> bool:
    """Whether this run, with these settings, data and initial weights, is finished; what is gone is not compared.
    ValueError if its folder holds anything else.
    """
    out = Path(config.out)
    if (out / layout.CONFIG).is_file():
        config = identity.completed(config, layout.settings(out)[2])
    try:
        fingerprint = "-".join(index.fingerprint for index in splits_used(verb, config))
        check_initial_weights(config)
    except ValueError:
        if identity.finished(out, verb, config):
            return True
        raise
    identity.refuse_others(out, verb, config, fingerprint)
    return layout.result(out) is not None


def check_idle(runs: Iterable[Path]) -> None:
    """Whether no job that could write to these runs is queued or running."""
    owners = {submission.job: run for run in runs for submission in jobs.submissions(run)}
    states = {name: state.partition(" ")[0] for name, state in slurm_cli.states(owners).items()}
    if owners and not states:  # SLURM has forgotten them, or does not answer
        name, run = list(owners.items())[-1]
        unknown = f"out={run}: it is unknown whether job {name} of this run is still queued or running"
        if shutil.which("squeue") is None:
            raise ValueError(f"{unknown}, as there is no squeue here; submit from a login node of its cluster")
        try:
            slurm_cli.call("squeue", "-h", "--me", "-o", "%i")
        except ValueError as error:
            raise ValueError(f"{unknown} ({error}); try again when SLURM answers") from error
    if alive := [name for name in owners if states.get(name) in slurm_cli.ALIVE]:
        name, it, more, end = alive[0], "it", "", alive[0]
        if len(alive) > 1:
            it, more = "them", f", and {len(alive) - 1} more are queued or running"
            end = " ".join(dict.fromkeys(job.partition("_")[0] for job in alive))
        raise ValueError(
            f"out={owners[name]}: job {name} of this run is {states[name]}{more}; "
            f"wait for {it}, or end {it}: scancel {end}"
        )


def check_writable(path: Path) -> None:
    """Whether this user can make the folder, or write into it if it exists."""
    parent = nearest_existing(path)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) and shutil.disk_usage(parent).total):
        raise ValueError(f"out={path}: nothing can be written in {parent}; choose a folder where you may write")


def nearest_existing(path: Path) -> Path:
    """The path if it exists, else the nearest folder above it that does."""
    return next(found for found in (path.absolute(), *path.absolute().parents) if os.path.exists(found))


def check_disk(config: RunConfig) -> None:
    """Whether the disk has room for the checkpoints that are kept, and for one that is being written."""
    size, number = forecast.checkpoint_bytes(config), forecast.num_checkpoints(config, steps=0)
    need, free = size * number + DISK_MARGIN, shutil.disk_usage(nearest_existing(Path(config.out))).free
    if free < need:
        raise ValueError(
            f"out={config.out}: {free / 1e9:.1f} GB of disk are free, but {number} checkpoints of {size / 1e9:.2f} GB "
            f"need {need / 1e9:.1f}; make room, or lower checkpoint.keep"
        )
