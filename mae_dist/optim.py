"""Optimizers: parameter groups, AdamW and LARS, and the learning rate as a pure function of progress.

Nothing here has state but the optimizer's moments: the rate of a step follows from the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import nn

from mae_dist.config import Optim

TOKENS = ("cls_token", "pos_embed")
"""Spared from weight decay in fine-tuning (timm's rule); in pretraining the official code decays the tokens."""


def peak_lr(optim: Optim, global_batch: int) -> float:
    """The linear scaling rule (Goyal et al. 2017): base_lr * global_batch / 256."""
    return optim.base_lr * global_batch / 256


def schedule(optim: Optim, peak: float, epochs: float) -> ParamScheduler:
    """lr over progress in [0, 1): linear warmup from 0, half a cosine down to min_lr (Loshchilov and Hutter 2017)."""
    warmup = min(optim.warmup_epochs / epochs, 1.0)
    cosine = CosineParamScheduler(peak, optim.min_lr)
    if warmup == 0:
        return cosine
    parts = [LinearParamScheduler(0.0, peak), cosine]
    return CompositeParamScheduler(parts, [warmup, 1 - warmup], ["rescaled", "rescaled"])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_of(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, depth + 1 for what follows (as MAE's fine-tuning; Clark et al. 2020)."""
    if name.startswith(("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed")):
        return 0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def param_groups(objective: nn.Module, optim: Optim, depth: int, spare_tokens: bool) -> list[dict[str, Any]]:
    """Trainable parameters by (lr_scale, weight_decay); biases and one-dimensional ones are not decayed."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or (spare_tokens and name.rpartition(".")[2] in TOKENS)
        decay = 0.0 if spared else optim.weight_decay
        scale = optim.layer_decay ** (depth + 1 - layer_of(name, depth))
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build(optim: Optim, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` says."""
    if optim.name == "lars":
        return LARS(groups, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as MAE's linear probe uses it.

    The update of a matrix, gradient plus weight decay, is scaled by trust * |w| / |update|; one-dimensional
    parameters take plain momentum SGD. timm's Lars is not used because it skips the scaling where weight decay is 0,
    which is the probe's case.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "lr_scale": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if update is None:
                    continue
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    size, length = parameter.norm(), update.norm()
                    ratio = torch.where(
                        (size > 0) & (length > 0), group["trust"] * size / length, torch.ones_like(size)
                    )
                    update = update * ratio
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum"], alpha=-group["lr"])


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's moments without moving a parameter, so that a checkpoint can be loaded into them."""
    set_lr(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for moments in optimizer.state.values():  # that step is not one of training: AdamW's count starts at 0
        for moment in moments.values():
            moment.zero_()
