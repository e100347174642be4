"""`mae-dist probe CONFIG.yaml from=RUN data.path=... out=RUN2`: a linear head on a frozen backbone."""

from __future__ import annotations

from mae_dist import parallel
from mae_dist.objectives import classify
from mae_dist.schema import Probe
from mae_dist.stages.opening import num_classes, open_run
from mae_dist.stages.supervised import train_and_test


def run(config: Probe) -> None:
    """Probe until done; running it again goes on."""
    opening = open_run("probe", config, labels=True)
    if opening.finished:
        return
    with parallel.skeleton(config.machine):
        objective = classify.Probe(
            opening.backbone, num_classes(opening.train), chunk=opening.micro_batch, seed=config.train.seed
        )
    # the objective itself cuts the batch for the backbone, so that its batch norm sees all of it
    train_and_test("probe", opening, objective, num_micro=1)
