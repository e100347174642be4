"""Objectives: modules that hold a `backbone` and map a Batch to per-sample losses."""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import Fill, initialise
from mae_dist.schema import OptimConfig


class Output(NamedTuple):
    """Result of an objective on a micro-batch: each sample's loss and its prediction (logits, or masked pixels)."""

    loss: Float[Tensor, " b"]
    prediction: Float[Tensor, "b ..."]


class Objective(nn.Module):
    """A backbone and the loss that trains it. ``seed`` decides the initialisation and all that is drawn per sample."""

    def __init__(self, backbone: Backbone, seed: int):
        super().__init__()
        self.backbone, self.seed = backbone, seed

    def initialise(self, fill: Fill = Tensor.copy_) -> None:
        """Set every parameter to its initial value; `fill(parameter, value)` writes one."""
        initialise(self.backbone, self.seed, fill=fill)
        self.initialise_rest(fill)

    def initialise_rest(self, fill: Fill = Tensor.copy_) -> None:
        """Set every parameter outside the backbone to its initial value; `fill(parameter, value)` writes one."""
        initialise(self, self.seed, skip=self.backbone, fill=fill)

    def pooled(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The features of images. Of an objective that is sharded, only its own methods gather the backbone's weights
        (see `parallel.shard`).
        """
        return self.backbone(images)

    def compile_draws(self) -> None:
        """Compile what is drawn for each sample; the blocks are compiled by `parallel.compile_blocks`."""

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]] | None:  # noqa: ARG002
        """Parameter groups with lr_scale, weight_decay and the update rule of each (see `optim.build`).

        None means the default groups of `optim.param_groups`.
        """
        return None
