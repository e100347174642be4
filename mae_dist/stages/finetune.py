"""`mae-dist finetune CONFIG.yaml from=RUN data.path=... out=RUN2`: backbone and head trained on labels."""

from __future__ import annotations

from mae_dist import parallel
from mae_dist.objectives import classify
from mae_dist.schema import Finetune
from mae_dist.stages.opening import Opening, num_classes, open_run
from mae_dist.stages.supervised import train_and_test


def run(config: Finetune) -> None:
    """Fine-tune until done; running it again goes on."""
    opened = open_run("finetune", config, labels=True, build=build)
    if opened is None:
        return
    opening, objective = opened
    opening = opening.settled(objective)
    train_and_test("finetune", opening, objective, num_micro=opening.num_micro)


def build(opening: Opening) -> classify.Finetune:
    """The objective that the settings describe."""
    config = opening.config
    with parallel.skeleton(config.machine):
        return classify.Finetune(
            opening.backbone, num_classes(opening.train), drop_path=config.model.drop_path, mix=config.mix,
            label_smoothing=config.train.label_smoothing, loss=config.train.loss, seed=config.train.seed,
        )  # fmt: skip
