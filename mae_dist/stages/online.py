"""What a pretraining measures of itself at its evaluations: the test loss, by position too, and of its features nearest
neighbours, ridge regression and effective rank.

Weights are those that a run gets which starts from a checkpoint of this step, the averaged ones if the run averages, so
that the verbs knn and probe give the same accuracies. Nothing is drawn from the stream of training.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_dist import dist, evaluate, forecast, image_grid
from mae_dist.batch import Batch
from mae_dist.data.loader import Source
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import held_out
from mae_dist.schema import HeadsConfig, KnnConfig, PretrainConfig
from mae_dist.stages.probe_heads import PENALTIES
from mae_dist.stages.setup import Setup, num_classes
from mae_dist.train import evaluation_interval

log = logging.getLogger(__name__)

TILE = 256
"""Pixels a side of the picture of the loss by position."""


def check(setup: Setup[PretrainConfig]) -> None:
    """Raise ValueError where the data have not what is to be measured."""
    config, (rest, held) = setup.config, divide(setup)
    if config.checkpoint.keep_best == "test_loss" and setup.test_split is None:
        raise ValueError("checkpoint.keep_best=test_loss: there is no test split to measure it on; give data.test_path")
    if "ridge" in config.track.online and not (len(rest) and len(held)):
        raise ValueError(
            f"track.online=[ridge]: of {len(rest) + len(held)} training images {len(held)} would be held out to choose "
            f"its penalty; give more (track.online_images), or leave it out"
        )


def announce(setup: Setup[PretrainConfig]) -> None:
    """Log what track.online costs, where that is known."""
    config, interval = setup.config, evaluation_interval(setup.config, len(setup.train_split))
    count, images = forecast.online_features(config, len(setup.train_split), len(setup.test_split or ()))
    if dist.is_main() and interval and images:
        share = 100 * images / (config.train.global_batch * interval)
        log.info("track.online: features of %d images at each evaluation, about %.3g %% of the computing", count, share)


def divide(setup: Setup[PretrainConfig]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training images whose features are taken: those that ridge regression learns from, and those held out,
    as in the verb probe.
    """
    total = len(setup.train_split)
    count = min(setup.config.track.online_images or total, total)
    ids = np.arange(count) * total // count
    held = held_out(setup.config.train.seed, HeadsConfig().held_out, ids)
    return ids[~held], ids[held]


def test_loss(setup: Setup[PretrainConfig], objective: MAE, source: Source, step: int) -> dict[str, Any]:
    """{"test_loss", "loss_by_position"}: the mean loss, and rows of that of each patch over the images in which it is
    predicted (None: in none), with a picture of them in pictures/. Masks are those of epoch 0 at every step.
    """
    sums = torch.zeros(2, objective.backbone.num_patches, dtype=torch.float64, device=setup.device)

    def add(batch: Batch, prediction: Tensor) -> None:
        mask = objective.mask(batch)
        errors = objective.errors(batch, mask, prediction).mean(2).double()
        places, readable = objective.predicted(mask), (~batch.bad).double()[:, None]
        for row, values in zip(sums, (errors, torch.ones_like(errors)), strict=True):
            spread = torch.zeros(len(values), sums.shape[1], dtype=sums.dtype, device=sums.device)
            row += (spread.scatter_(1, places, values) * readable).sum(0)  # adds up in a fixed order

    loss, count = evaluate.mean_loss(objective, setup.evaluation_batches(source), setup.device, add)
    total, seen = dist.all_reduce_sum(sums).cpu().numpy()
    means = np.divide(total, seen, out=np.full_like(total, np.nan), where=seen > 0).reshape(objective.backbone.grid)
    if dist.is_main() and np.isfinite(means).any():
        draw_map(means).save(setup.run.path / "pictures" / f"loss_by_position-{step:09d}.png")
    rows = [[round(value, 5) if np.isfinite(value) else None for value in row] for row in means.tolist()]
    return {"test_loss": loss, "loss_by_position": rows} | evaluate.unreadable(count, len(source.index))


def draw_map(means: np.ndarray) -> Any:
    """A picture of losses by position (rows, columns): black for the least, white for the most, grey-blue for none."""
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    grey = 255 * (np.nan_to_num(means, nan=low) - low) / max(high - low, 1e-12)
    pixels = np.where(np.isfinite(means)[..., None], grey[..., None], np.array([90.0, 110.0, 160.0]))
    return image_grid.sheet([[pixels.astype(np.uint8)]], [f"black {low:.3g}, white {high:.3g}"], TILE)


@torch.no_grad()
def measure(setup: Setup[PretrainConfig], objective: MAE, train: Source, test: Source | None) -> dict[str, float]:
    """What track.online asks for, over all ranks: "knn_top1" and "ridge_top1" in percent of the test images, as by the
    verbs knn and probe with heads.ridge, and "rankme" of the training images. {} where features are not finite.
    """
    wanted = setup.config.track.online
    if not wanted:
        return {}

    def read(source: Source, ids: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        batches = setup.evaluation_batches(source, ids)
        return evaluate.features(objective, objective.backbone.dim, batches, setup.device, objective.pooled)

    rest, held = (read(train, ids) for ids in divide(setup))
    known = torch.cat([rest[0], held[0]]), torch.cat([rest[1], held[1]])
    asked = read(test) if test and {"knn", "ridge"} & {*wanted} else (known[0][:0], known[1][:0])
    objective.train()
    if dist.all_reduce_sum((~torch.cat([known[0], asked[0]]).isfinite()).sum()):
        if dist.is_main():
            log.warning("features are not finite: track.online measures nothing at this evaluation")
        return {}
    found: dict[str, float] = {}
    with torch.autocast(setup.device.type, enabled=False):
        if "rankme" in wanted:
            found["rankme"] = evaluate.rankme(known[0])
        if test and "knn" in wanted:
            knn, bank = KnnConfig(), (dist.gather(known[0]), dist.gather(known[1]))
            counts = evaluate.knn(bank, asked, num_classes(setup.train_split), knn.k, knn.temperature)
            found["knn_top1"] = evaluate.percentages(dist.all_reduce_sum(counts), len(test.index))["top1"]
        if test and "ridge" in wanted:
            counts = evaluate.ridge(rest, held, asked, num_classes(setup.train_split), PENALTIES)
            found["ridge_top1"] = evaluate.percentages(counts, len(test.index))["top1"]
    return found
