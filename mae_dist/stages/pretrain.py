"""`mae-dist pretrain CONFIG.yaml data.path=... out=RUN`: masked autoencoding of images without labels."""

from __future__ import annotations

import numpy as np
import torch

from mae_dist import dist, evaluate, parallel, pictures
from mae_dist.data.loader import Resident, Streamed
from mae_dist.data.views import denormalise
from mae_dist.objectives.mae import MAE
from mae_dist.schema import Pretrain
from mae_dist.stages.opening import Opening, open_run
from mae_dist.train import fit

GALLERY = 8
"""Images in the gallery: the first of the test split, or of the training split, each with the mask of epoch 0."""


def run(config: Pretrain) -> None:
    """Pretrain until done; running it again goes on."""
    opened = open_run("pretrain", config, labels=False, build=build)
    if opened is None:
        return
    opening, objective = opened
    config, opening = opening.config, opening.settled(objective)
    train, micro = opening.source(opening.train, training=True), opening.num_micro
    test = opening.source(opening.test) if opening.test else None

    def look(step: int) -> dict[str, float]:
        draw(opening, objective, test or train, step)
        if test is None:
            return {}
        return {"test_loss": evaluate.mean_loss(objective, opening.evaluation_batches(test), opening.device)}

    numbers = fit(
        run=opening.run, verb="pretrain", config=config, objective=objective,
        spare_tokens=False, begin=lambda: None,
        batches=lambda steps: opening.training_batches(train, micro, steps), num_micro=micro,
        num_samples=len(opening.train), describe=opening.train.describe, evaluate=look, device=opening.device,
    )  # fmt: skip
    opening.run.finish({"verb": "pretrain"} | numbers)


def build(opening: Opening) -> MAE:
    """The objective that the settings describe."""
    with parallel.skeleton(opening.config.machine):
        return MAE(opening.backbone, opening.config.mae, opening.config.train.seed)


@torch.no_grad()
def draw(opening: Opening, objective: MAE, source: Resident | Streamed, step: int) -> None:
    """Write pictures/reconstruction-STEP.png: originals, masked, reconstructed."""
    ids = np.arange(min(GALLERY, len(source.index)), dtype=np.int64)
    (batch,) = source.batches([(np.zeros_like(ids), ids)], opening.view(training=False))
    data = opening.config.data
    with parallel.precision(opening.config.train.precision, opening.device):
        prediction = objective(batch).prediction
    if dist.is_main():
        rows = [list(denormalise(i, data.mean, data.std)) for i in objective.pictures(batch, prediction)]
        pictures.sheet(rows).save(opening.run.path / "pictures" / f"reconstruction-{step:09d}.png")
