"""`mae-dist probe CONFIG.yaml from=RUN data.path=... out=RUN2`: a frozen backbone's head, or a board of many."""

from __future__ import annotations

from mae_dist import parallel
from mae_dist.objectives import classify
from mae_dist.objectives.board import Board
from mae_dist.schema import Probe
from mae_dist.stages import board
from mae_dist.stages.opening import Opening, num_classes, open_run
from mae_dist.stages.supervised import train_and_test


def run(config: Probe) -> None:
    """Probe until done; running it again goes on."""
    if config.board.active:
        board.run(config)
        return
    opened = open_run("probe", config, labels=True, build=build)
    if opened is None:
        return
    opening, objective = opened
    assert isinstance(objective, classify.Probe)
    # the objective itself cuts the batch for the backbone, so that its batch norm sees all of it
    train_and_test("probe", opening, objective, num_micro=1)


def build(opening: Opening) -> classify.Probe | Board:
    """The objective that the settings describe."""
    if opening.config.board.active:
        return board.build(opening)
    with parallel.skeleton(opening.config.machine):
        return classify.Probe(
            opening.backbone, num_classes(opening.train), chunk=opening.micro_batch, seed=opening.config.train.seed
        )
