"""Optimizers: parameter groups; AdamW, LARS, Muon; the learning rate as a function of progress; EMA; loss scale.

The state is the optimizer's moments, the EMA of the weights and, for fp16, the loss scale; the learning rate follows
from the step. A step whose gradient is not finite is skipped on the device, so the host does not wait to find out.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import Tensor, nn

from mae_dist import parallel
from mae_dist.schema import OptimConfig

TOKENS = ("cls_token", "pos_embed")
"""Not decayed in fine-tuning (timm's rule); in pretraining the official code decays them."""


def schedule(optim: OptimConfig, peak: float, epochs: float) -> ParamScheduler:
    """lr over progress in [0, 1): linear warmup from 0, then half a cosine (Loshchilov and Hutter 2017) or a straight
    line down to min_lr.
    """
    warmup = min(optim.warmup_epochs / epochs, 1.0)
    curve = CosineParamScheduler if optim.schedule == "cosine" else LinearParamScheduler
    falling = curve(peak, optim.min_lr)
    if warmup == 0:
        return falling
    parts = [LinearParamScheduler(0.0, peak), falling]
    return CompositeParamScheduler(parts, [warmup, 1 - warmup], ["rescaled", "rescaled"])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_of(name: str, depth: int) -> int:
    """Layer number for layer-wise lr decay: 0 for the embedding, i + 1 for block i, depth + 1 for what follows (as in
    MAE's fine-tuning; Clark et al. 2020).
    """
    if name.startswith(("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed", "backbone.stem")):
        return 0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def param_groups(objective: nn.Module, optim: OptimConfig, depth: int, no_decay_tokens: bool) -> list[dict[str, Any]]:
    """Trainable parameters grouped by update rule, lr_scale and weight_decay. Biases and other one-dimensional
    parameters are not decayed, nor with `no_decay_tokens` the class token and positions. With optim.name=muon the
    matrices of blocks have that rule, and all else AdamW's.
    """
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = parameter.ndim <= 1 or (no_decay_tokens and name.rpartition(".")[2] in TOKENS)
        decay = 0.0 if no_decay else optim.weight_decay
        scale = optim.layer_decay ** (depth + 1 - layer_of(name, depth))
        in_block = parameter.ndim == 2 and "blocks." in name
        rule = "adamw" if optim.name == "muon" and not in_block else optim.name
        group = {"params": [], "lr_scale": scale, "weight_decay": decay, "rule": rule}
        group = groups.setdefault((rule, scale, decay), group)
        group["params"].append(parameter)
    return list(groups.values())


def build(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of `optim.name`, or of each group's own `rule` ("adamw", "lars", "muon"), over these groups."""
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        by_rule.setdefault(group.get("rule", optim.name), []).append(group)
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "lars": partial(LARS, momentum=optim.momentum), "muon": partial(Muon, momentum=optim.momentum),
        "adamw": partial(AdamW, lr=0.0, betas=optim.betas, fused=True),
    }  # fmt: skip
    parts = [makers[rule](own) for rule, own in by_rule.items()]
    return parts[0] if len(parts) == 1 else CombinedOptimizer(parts)


def without_compiler(method: Callable[..., Any]) -> Any:
    """A method of torch's optimizers without its wrapper, which imports torch's compiler (2 s of a core), to have it
    leave the method alone. Nothing here compiles an optimizer.
    """
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """torch's base class of optimizers, which imports no compiler."""

    add_param_group = without_compiler(torch.optim.Optimizer.add_param_group)
    zero_grad = without_compiler(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW, which imports no compiler."""

    step = torch.no_grad()(without_compiler(torch.optim.AdamW.step))


class CombinedOptimizer(Optimizer):
    """Several optimizers that step as one: each has its own groups; the state and `found_inf` are shared."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyright: ignore[reportIncompatibleMethodOverride]
        for part in self.parts:
            part.found_inf = getattr(self, "found_inf", None)  # pyright: ignore
            part.step()


class LossScale:
    """fp16's loss scale (Micikevicius et al. 2018, section 3.2): halved by a step that overflows, doubled by 2000 that
    do not. Always 1 where not `enabled`. It stays on the device and is equal on all ranks, as the gradient norm is.
    """

    START, PATIENCE = 2.0**16, 2000

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(self.START if enabled else 1.0, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Update the scale from whether the last step was finite."""
        if self.enabled:
            self.good.copy_(torch.where(finite, self.good + 1, torch.zeros_like(self.good)))
            grow = self.good == self.PATIENCE
            self.good.masked_fill_(grow, 0.0)
            self.scale.mul_(torch.where(finite, 1.0 + grow.float(), torch.full_like(self.scale, 0.5)))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name; empty where the scale is fixed."""
        return {"scale": self.scale, "good": self.good} if self.enabled else {}


def update(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: Tensor, clip: float | None,
    scale: LossScale, ranks: int = 1,
) -> Tensor:  # fmt: skip
    """One optimizer step from gradients of the scaled loss, whose norm is `norm`; returns the norm of the unscaled
    ones. With a loss scale the gradients are means over `ranks`, and their sum is meant.

    Clips as torch does, by clip / (norm + 1e-6). If the norm is not finite, weights and moments stay as they are.
    """
    factor = (ranks if scale.enabled else 1) / scale.scale
    norm = norm * factor
    finite = norm.isfinite()
    if clip is not None:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    if clip is not None or scale.enabled:
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)
    optimizer.found_inf = (~finite).float()  # pyright: ignore  (what torch's fused optimizers ask, and LARS below)
    optimizer.step()
    optimizer.zero_grad()
    scale.update(finite)
    return norm


class EMA:
    """Exponential moving average of the trained parameters (Polyak and Juditsky 1992), beside them on the device and
    sharded as they are: average = decay * average + (1 - decay) * weights after each step. Of nothing when `decay` is
    None.

    torch's AveragedModel is not used because it would copy the placed module and move after a skipped step, too.
    """

    def __init__(self, objective: nn.Module, decay: float | None):
        trained = [] if decay is None else [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        self.decay = decay or 0.0
        self.parameters: list[Tensor] = [parameter for _, parameter in trained]
        self.values = {name: parameter.detach().clone() for name, parameter in trained}

    @torch.no_grad()
    def reset(self) -> None:
        """Set the average to the weights."""
        for value, parameter in zip(self.values.values(), self.parameters, strict=True):
            value.copy_(parameter)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Update the average after a step; a step that was not `finite` changes nothing. The host does not wait."""
        if self.values:
            values = list(self.values.values())
            away = torch._foreach_sub(self.parameters, values)
            torch._foreach_mul_(away, finite * (1 - self.decay))
            torch._foreach_add_(values, away)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context manager: in its block the objective has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values.values(), self.parameters, strict=True):
            held = value.clone()
            value.copy_(parameter)
            parameter.copy_(held)

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return self.values


class MomentumOptimizer(Optimizer):
    """An optimizer with one moment, whose `change` gives the new moment and weights of a parameter. A step that is not
    finite changes nothing, and the host does not wait to find out.
    """

    def __init__(self, params: Iterable[Any], **defaults: Any):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "lr_scale": 1.0} | defaults)

    def change(
        self, parameter: Tensor, gradient: Tensor, before: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """(Moment, weights) after a step, from those `before`."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyright: ignore[reportIncompatibleMethodOverride]
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                before = state["momentum"], parameter
                for old, new in zip(before, self.change(parameter, parameter.grad, before[0], group), strict=True):
                    old.copy_(new if skip is None else torch.where(skip > 0, old, new))


class LARS(MomentumOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as MAE's linear probe uses it.

    As in the official code (util/lars.py) the update of a matrix, gradient plus weight decay, is scaled by
    trust * |w| / |update|, and one-dimensional parameters take plain momentum SGD, neither scaled nor decayed; matrices
    of a group whose `trust` is None are decayed, but not scaled.

    timm's Lars is not used: it divides by |gradient| + decay * |w| + 1e-8 instead of |update|, tells what to scale by
    group instead of by dimensions, and would take a step that is not finite.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.0, momentum: float = 0.9, trust: float | None = 0.001):
        super().__init__(params, lr=lr, momentum=momentum, trust=trust)

    def change(
        self, parameter: Tensor, gradient: Tensor, before: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        update = gradient
        if parameter.ndim > 1:
            update = update + group["weight_decay"] * parameter
        if parameter.ndim > 1 and group["trust"] is not None:
            size, length = parameter.norm(), update.norm()
            ratio = torch.where((size > 0) & (length > 0), group["trust"] * size / length, torch.ones_like(size))
            update = update * ratio
        momentum = group["momentum"] * before + update
        return momentum, parameter - group["lr"] * momentum


class Muon(MomentumOptimizer):
    """Nesterov momentum whose update of a matrix is orthogonalised (Jordan et al. 2024), and scaled to the size that
    AdamW's updates have (Liu et al. 2025, section 2.2), so that both go with the same learning rate and weight decay.

    torch.optim.Muon orthogonalises. Around it: the momentum of a sharded matrix is sharded, but its update is gathered,
    so that every rank computes all of it (a shard has another orthogonal factor, and torch would sum parts in bf16);
    and a step that is not finite changes nothing, which torch's does not ask.
    """

    def __init__(self, params: Iterable[Any], momentum: float = 0.95):
        super().__init__(params, momentum=momentum)

    def change(
        self, parameter: Tensor, gradient: Tensor, before: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        momentum = before.lerp(gradient, 1 - group["momentum"])
        update = orthogonalised(parallel.whole(gradient.lerp(momentum, group["momentum"])))
        decayed = parameter * (1 - group["lr"] * group["weight_decay"])
        return momentum, decayed + group["lr"] * parallel.part_of(update, parameter)


def orthogonalised(gradient: Tensor) -> Tensor:
    """The step that torch.optim.Muon makes from 0 against a `gradient` with lr 1, without momentum."""
    matrix = nn.Parameter(torch.zeros_like(gradient))
    matrix.grad = gradient
    muon = torch.optim.Muon([matrix], 1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw")
    muon.step()
    return matrix.detach()


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's moments, all zero, for a checkpoint to be loaded into; parameters do not change."""
    set_lr(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for moments in optimizer.state.values():  # that step is not one of training: AdamW's count starts at 0
        for moment in moments.values():
            moment.zero_()
