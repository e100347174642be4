"""What a run warns of beside its curve: before its first step settings that are seldom meant, after its last a result
that says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mae_dist import config as configuration
from mae_dist import environment, evaluate, optim
from mae_dist.data.index import ShardIndex
from mae_dist.data.split_checks import label_counts
from mae_dist.run.warned import FEW_STEPS, Warned
from mae_dist.schema import ProbeConfig, RunConfig

USUAL_LR = {
    ("pretrain", "adamw"): (3e-5, 5e-3, 1.5e-4), ("pretrain", "muon"): (3e-5, 5e-3, 1.5e-4),
    ("finetune", "adamw"): (6e-5, 5e-3, 5e-4), ("finetune", "muon"): (6e-5, 5e-3, 5e-4),
    ("probe", "lars"): (0.01, 50.0, 0.1),
}  # fmt: skip
"""(Verb, optimizer) -> the least base_lr, the limit of its peak, and the base_lr of He et al. 2022. What lies outside
is about ten times off all recipes, or was already multiplied by the batch. With few images a step base_lr may be large,
with many the peak must not be.
"""


def of_settings(verb: str, config: RunConfig, device: torch.device, num_samples: int) -> Iterator[Warned]:
    """Settings that are possible, but seldom meant: a batch that is most of the data, a warmup that does not end, an lr
    that is far off, and 16 bits on a CPU.
    """
    batch, precision = config.train.global_batch, config.train.precision
    settings, epochs = getattr(config, "optim", None), configuration.total_steps(config.train, num_samples)
    epochs *= batch / num_samples
    if settings is not None and num_samples < FEW_STEPS * batch:
        more = ", so that a step shows images more than once" if num_samples < batch else ""
        yield Warned(
            "train.global_batch",
            f"train.global_batch={batch}: an epoch of {num_samples} images is {num_samples / batch:.2g} steps{more}; a "
            f"smaller batch gives more",
        )
    if settings is not None and epochs and settings.warmup_epochs >= epochs:
        yield Warned(
            "optim.warmup_epochs",
            f"optim.warmup_epochs={settings.warmup_epochs:g}: the run has {epochs:.3g} epochs, so its lr does not "
            f"reach its peak before the end; set it to {epochs / 20:.2g}, or make the run longer",
        )
    if settings is not None and not (isinstance(config, ProbeConfig) and config.heads.active):
        yield from _of_lr(verb, config, settings.name, settings.base_lr, optim.peak_lr(settings, batch))
    if device.type == "cpu" and precision != "fp32" and not (precision == "bf16" and environment.has_bf16()):
        yield Warned(
            "train.precision",
            f"train.precision={precision}: this CPU has no instructions for it; fp32 is faster",
        )


def _of_lr(verb: str, config: RunConfig, name: str, base_lr: float, peak: float) -> Iterator[Warned]:
    low, limit, usual = USUAL_LR.get((verb, name), (0.0, float("inf"), base_lr))
    if base_lr >= low and peak < limit:
        return
    what = f"is below the usual {low:g}" if base_lr < low else f"rises to {peak:g}, and usually stays below {limit:g}"
    yield Warned(
        "optim.base_lr",
        f"optim.base_lr={base_lr:g}: the lr, times train.global_batch={config.train.global_batch} / 256, {what} in "
        f"{verb} with {name}; set optim.base_lr={usual:g}, the paper's",
    )


def of_labels(split: ShardIndex) -> Iterator[Warned]:
    """Labels that are all the same, where it is known how many there are of each."""
    counts = label_counts(split)
    if counts is not None and len(counts) == 1 and len(split) > 1:
        (label,) = counts
        yield Warned(
            "labels",
            f"all labels of the training split are {label}, so there is nothing to tell apart; check what "
            f"`mae-dist data show` draws, and index or pack again with other --labels",
        )


def of_chance(top1: float, num_images: int, test: ShardIndex, num_classes: int, what: str) -> Iterator[Warned]:
    """A top-1 accuracy in percent, after training, that guessing has as well."""
    counts = label_counts(test)
    share = max(counts.values()) / sum(counts.values()) if counts else 1 / num_classes
    if share < 1 and evaluate.is_chance(top1, num_images, share):
        yield Warned(
            f"{what} at chance",
            f"{what}: {top1:.4g} % of {num_images:,} test images is no better than always guessing one class "
            f"({100 * share:.3g} %): the labels may not belong to their images (`mae-dist data show` draws them), or "
            f"training was too short or its lr off (train.epochs, optim.base_lr)",
        )
