"""`mae-dist finetune CONFIG.yaml init_from=RUN data.path=... out=RUN2`: backbone and head trained on labels."""

from __future__ import annotations

from mae_dist import parallel
from mae_dist.objectives import classify
from mae_dist.schema import FinetuneConfig
from mae_dist.stages.setup import Setup, num_classes, prepare_run
from mae_dist.stages.supervised import train_and_test


def run(config: FinetuneConfig) -> None:
    """Fine-tune to the end; the same call resumes."""
    opened = prepare_run("finetune", config, needs_labels=True, build=build)
    if opened is None:
        return
    setup, objective = opened
    with setup.recorded():
        train_and_test(setup, objective)


def build(setup: Setup[FinetuneConfig]) -> classify.Finetune:
    """The objective that the settings describe."""
    config = setup.config
    with parallel.meta_init(config.machine):
        return classify.Finetune(
            setup.backbone, num_classes(setup.train_split), drop_path=config.model.drop_path, mix=config.mix,
            label_smoothing=config.train.label_smoothing, loss=config.train.loss, seed=config.train.seed,
        )  # fmt: skip
