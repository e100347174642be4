"""`mae-dist finetune CONFIG.yaml init_from=RUN data.path=... out=RUN2`: backbone and head trained on labels."""

import numpy as np
import torch

from mae_dist import evaluate, parallel
from mae_dist.data.loader import Source
from mae_dist.objectives import classify
from mae_dist.schema import FinetuneConfig
from mae_dist.stages.setup import Setup, num_classes, prepare_run
from mae_dist.stages.supervised import train_and_test

SAMPLES = 4096
"""Training images, spread evenly, over which features are standardised: their deviations are known to 1.1 %."""
EPS = 1e-6
"""Added to a variance, as by the batch norm of the paper's linear probe (He et al. 2022, section A.1)."""


def run(config: FinetuneConfig) -> None:
    """Fine-tune to the end; the same call resumes."""
    opened = prepare_run("finetune", config, needs_labels=True, build=build)
    if opened is None:
        return
    setup, objective = opened
    with setup.recorded():
        train_and_test(setup, objective, adapt=standardise if config.model.standardise else None)


def build(setup: Setup[FinetuneConfig]) -> classify.Finetune:
    """The objective that the settings describe."""
    config = setup.config
    with parallel.meta_init(config.machine):
        return classify.Finetune(
            setup.backbone, num_classes(setup.train_split), drop_path=config.model.drop_path, mix=config.mix,
            label_smoothing=config.train.label_smoothing, loss=config.train.loss, seed=config.train.seed,
        )  # fmt: skip


def standardise(setup: Setup[FinetuneConfig], objective: classify.Finetune, source: Source) -> None:
    """Make the features that the head reads have mean 0 and deviation 1 over training images, by the last norm's weight
    and bias: a head that starts at 0 learns slowly from features with a large common part. What the batch norm of a
    linear probe does, but without depending on a batch later.
    """
    count = min(SAMPLES, len(setup.train_split))
    chosen = setup.evaluation_batches(source, np.arange(count) * len(setup.train_split) // count)
    with parallel.autocast(setup.config.train.precision, setup.device):
        mean, deviation = evaluate.input_statistics(objective.head, objective, chosen, setup.device)
    deviation = (deviation.square() + EPS).sqrt()
    weight, bias = objective.backbone.last_norm.parameters()
    with torch.no_grad():
        for parameter, value in ((weight, parallel.whole(weight)), (bias, parallel.whole(bias) - mean)):
            parallel.copy_into(parameter, value / deviation)
