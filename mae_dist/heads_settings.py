"""Checks of the settings of a probe's heads that contradict each other. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from mae_dist import hints
from mae_dist.schema import HeadsConfig, ProbeConfig

OWN_OF_HEADS = {
    "optim.name": "heads.lars, heads.sgd, heads.adamw", "optim.base_lr": "heads.lars, heads.sgd, heads.adamw",
    "optim.weight_decay": "heads.weight_decay",
}  # fmt: skip
"""Settings of a probe's only head -> those of several heads."""


def check(config: ProbeConfig, changed: Mapping[str, Any]) -> None:
    """Refuse settings, of those that are `changed`, that several heads have of their own, and settings of several heads
    where there are none (ValueError).
    """
    heads = config.heads
    for name, value in changed.items():
        if not heads.active and name.startswith("heads."):
            raise ValueError(
                f"{hints.given(name, value)}: there is no head to try it on; give for example heads.lars=[0.1]"
            )
        if heads.active and name in OWN_OF_HEADS:
            raise ValueError(
                f"{hints.given(name, value)}: several heads have their own ({OWN_OF_HEADS[name]}); leave it out"
            )
    for name in ("features", "weight_decay"):
        if heads.active and not getattr(heads, name):
            raise ValueError(f"heads.{name}=[]: nothing to try; give at least one, or leave it out")
    if heads.attentive and not heads.adamw:
        raise ValueError("heads.attentive=true: these heads are trained by AdamW; give heads.adamw=[lr, ...]")
    if config.data.weights and (heads.ridge or heads.knn):
        raise ValueError("data.weights: heads.ridge and heads.knn take each image once; leave it out")
    if heads.active and config.train.clip_grad is not None:
        raise ValueError(f"train.clip_grad={config.train.clip_grad:g}: several heads would clip each other; omit it")


def num_trained(heads: HeadsConfig) -> int:
    """Heads that are trained by steps: all but ridge regression and nearest neighbours."""
    rates, reads = len(heads.lars) + len(heads.sgd) + len(heads.adamw), len({*heads.blocks} or {0})
    per_rate = len(heads.weight_decay)
    pooled = len(heads.adamw) * per_rate if heads.attentive else 0
    return reads * len({*heads.features}) * rates * per_rate + pooled


def stores_features(config: ProbeConfig) -> bool:
    """Whether heads are trained on features that are computed once, as no image is augmented."""
    view = config.view
    augmented = view.crop != "center" or view.flip or view.random_erasing or view.randaugment or view.color_jitter
    return config.heads.active and not augmented
