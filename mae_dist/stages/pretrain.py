"""`mae-dist pretrain CONFIG.yaml data.path=... out=RUN`: masked autoencoding of images without labels."""

import logging

import numpy as np
import torch

from mae_dist import dist, image_grid, parallel, resolutions
from mae_dist.data.loader import TarSource
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import denormalise
from mae_dist.objectives.mae import MAE
from mae_dist.patch_counts import patch_counts
from mae_dist.schema import PretrainConfig
from mae_dist.stages import online, warn
from mae_dist.stages.setup import Setup, num_classes, prepare_run
from mae_dist.train import fit

log = logging.getLogger(__name__)

GALLERY = 8
"""Images in the gallery: the first of the test split, or of the training split, each with the mask of epoch 0."""


def run(config: PretrainConfig) -> None:
    """Pretrain to the end; the same call resumes."""
    opened = prepare_run("pretrain", config, needs_labels=False, build=build)
    if opened is None:
        return
    setup, objective = opened
    with setup.recorded():
        train(setup, objective)


def train(setup: Setup[PretrainConfig], objective: MAE) -> None:
    """Train the objective, with pictures, the test loss and what track.online asks for at every evaluation; write
    result.json.
    """
    train_source = setup.source(setup.train_split, training=True)
    test_source = setup.source(setup.test_split) if setup.test_split else None
    setup = setup.with_micro_batch(objective)  # beside the images that are kept on the GPU
    online.announce(setup)
    if dist.is_main() and (channels := setup.backbone.channels) not in (1, 3):
        log.info("pictures show the first %s of %d channels", "3" if channels > 3 else "one", channels)

    def evaluate_step(step: int) -> dict[str, float]:
        draw(setup, objective, test_source or train_source, step)
        numbers = online.test_loss(setup, objective, test_source, step) if test_source else {}
        return numbers | online.measure(setup, objective, train_source, test_source)

    task = setup.task(objective, train_source, setup.num_micro, evaluate_step, no_decay_tokens=False)
    numbers = fit(task, setup.run, setup.config, setup.device)
    if (test_split := setup.test_split) and "ridge_top1" in numbers:
        top1, classes = numbers["ridge_top1"], num_classes(setup.train_split)
        setup.warn(warn.of_chance(top1, len(test_split), test_split, classes, "ridge_top1"))
    setup.run.finish({"verb": "pretrain"} | numbers)


def build(setup: Setup[PretrainConfig]) -> MAE:
    """The objective that the settings describe. Raises ValueError where what is to be measured of it cannot be."""
    online.check(setup)
    with parallel.meta_init(setup.config.machine):
        objective = MAE(setup.backbone, setup.config.mae, setup.config.train.seed)
    for side in resolutions.sides(setup.config):  # raises now what is impossible for one of them
        patch_counts(setup.config.mae, (side // setup.backbone.patch, side // setup.backbone.patch))
    return objective


@torch.no_grad()
def draw(setup: Setup, objective: MAE, source: ResidentSource | TarSource, step: int) -> None:
    """Write pictures/reconstruction-STEP.png: originals, masked, reconstructed."""
    ids = np.arange(min(GALLERY, len(source.index)), dtype=np.int64)
    (batch,) = source.batches([(np.zeros_like(ids), ids)], setup.view(training=False))
    data = setup.config.data
    with parallel.autocast(setup.config.train.precision, setup.device):
        prediction = objective(batch).prediction
    if dist.is_main():
        rows = [list(denormalise(i, data.mean, data.std)) for i in objective.pictures(batch, prediction)]
        image_grid.sheet(rows).save(setup.run.path / "pictures" / f"reconstruction-{step:09d}.png")
