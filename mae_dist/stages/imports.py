"""A checkpoint of other software that `init_from` names is imported on the way, to a run beside the run's folder."""

import dataclasses
import logging
import os
import subprocess
from pathlib import Path

from mae_dist import dist, environment, errors, starts, weights
from mae_dist.checksum import sha256
from mae_dist.errors import MachineFault
from mae_dist.run import layout
from mae_dist.schema import C, RunConfig

log = logging.getLogger(__name__)


def with_imported(config: C) -> C:
    """The config with init_from at the run that `mae-dist import` makes of a checkpoint of others, once; other configs
    as they are. Raises ValueError, on every rank, where the checkpoint cannot be imported or is another than before.
    """
    if config.origin is None or not starts.is_of_others(Path(config.origin)):
        return config
    source, run = Path(config.origin), starts.imported(config.out)
    dist.run_on_rank0(lambda: import_once(source, run))
    return dataclasses.replace(config, **{"init_from": str(run)})


def import_for(config: RunConfig) -> None:
    """Import the checkpoint of others that a run starts from before its settings are complete, all ranks together. A
    run of a checkpoint that says no model.name has that of the import.
    """
    dist.setup(config.machine.timeout)
    with_imported(config)


def import_once(source: Path, run: Path) -> None:
    """Import `source` to the folder `run`, unless it was already. In a process of its own, which is not one of several
    ranks. Raises ValueError where it cannot be imported or the folder holds something else.
    """
    if run.exists():
        known = (layout.result(run) or {}).get("imported", {}) if run.is_dir() else {}
        if known.get("sha256") != sha256(*weights.locate(source)[0]):
            raise ValueError(f"init_from={source}: is not what {run} was imported from; choose another out=")
        return
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*environment.python(), "import", str(source), "--out", str(run)], capture_output=True, text=True,
        env=variables | {"CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    last = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("mae-dist: ")
    if done.returncode == errors.USER_ERROR:
        raise ValueError(f"init_from={source}: {last.removeprefix(f'{source}: ')}")
    if done.returncode:
        raise MachineFault(f"init_from={source}: its import ended with status {done.returncode}: {last}")
    log.info("init_from=%s: imported\n%s", source, done.stdout.partition("\nnext:")[0])
