"""Objectives: what is learned. Each is a module that holds a `backbone` and maps a Batch to per-sample losses."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import Fill, initialise
from mae_dist.schema import OptimConfig


class Output(NamedTuple):
    """What an objective says of a micro-batch: each sample's loss, and its prediction (logits, or masked pixels)."""

    loss: Float[Tensor, " b"]
    prediction: Float[Tensor, "b ..."]


class Objective(nn.Module):
    """A backbone and what it is trained with. ``seed`` decides initialisation and everything drawn per sample."""

    def __init__(self, backbone: Backbone, seed: int):
        super().__init__()
        self.backbone, self.seed = backbone, seed

    def initialise(self, fill: Fill = Tensor.copy_) -> None:
        """Give every parameter the value it starts with; `fill` knows how to put it there."""
        initialise(self.backbone, self.seed, fill=fill)
        self.initialise_rest(fill)

    def initialise_rest(self, fill: Fill = Tensor.copy_) -> None:
        """The same for everything but the backbone."""
        initialise(self, self.seed, skip=self.backbone, fill=fill)

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]] | None:  # noqa: ARG002
        """Groups of parameters with lr_scale, weight_decay and, each, the `rule` that trains it (see `optim.build`).
        None: those of `optim.param_groups`.
        """
        return None
