"""Classification on labels: fine-tuning of a backbone with a linear head, and the linear probe of a frozen one."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mae_dist import dist, rng
from mae_dist.batch import Batch
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import Fill, depth_scale, single
from mae_dist.objectives import Objective, Output, mixing
from mae_dist.schema import MixConfig

UNMIXED = MixConfig()


class Classifier(Objective):
    """A backbone with a linear head, whose initial weights are drawn by `draw_head`."""

    def __init__(self, backbone: Backbone, num_classes: int, std: float, seed: int, bias: float = 0.0):
        super().__init__(backbone, seed)
        self.std, self.bias, self.head = std, bias, nn.Linear(backbone.dim, num_classes)
        self.initialise_rest()

    def initialise_rest(self, fill: Fill = Tensor.copy_) -> None:
        draw_head(self.head, self.std, self.seed, fill, self.bias)


@torch.no_grad()
def draw_head(head: nn.Linear, std: float, seed: int, fill: Fill = Tensor.copy_, bias: float = 0.0) -> None:
    """Set the weights of a head to N(0, std) truncated at +-2, drawn from `seed` alone, and its biases to `bias`; those
    of a head on the meta device stay without values.
    """
    if head.weight.is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    fill(head.weight, nn.init.trunc_normal_(torch.empty(head.weight.shape), std=std, generator=generator))
    fill(head.bias, torch.full(head.bias.shape, bias))


class Finetune(Classifier):
    """Fine-tuning: backbone and head are trained together.

    Stochastic depth is a function of (seed, epoch, id) of each sample, and frozen blocks have none; mixup and CutMix
    are functions of those of each pair. ``loss``: "softmax" is cross-entropy over classes; "sigmoid" is binary
    cross-entropy summed over classes, with biases that start at -log(classes), the prior of balanced classes (Beyer et
    al. 2020).
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, drop_path: float, label_smoothing: float, seed: int,
        loss: str = "softmax", mix: MixConfig = UNMIXED,
    ):  # fmt: skip
        super().__init__(backbone, num_classes, 2e-5, seed, -math.log(num_classes) if loss == "sigmoid" else 0.0)
        self.drop_path, self.label_smoothing, self.loss, self.mix = drop_path, label_smoothing, loss, mix

    def forward(self, batch: Batch) -> Output:
        """Loss and logits (b, classes) of each sample, after mixup or CutMix where those are on."""
        images = batch.images
        targets = mixing.smoothed(batch.labels, self.head.out_features, self.label_smoothing, images.dtype)
        if self.training and self.mix.enabled:
            images, targets = mixing.mix(batch, targets, self.mix, self.seed)
        logits = single(self.head(self.backbone(images, self._scale(batch))))
        if self.loss == "sigmoid":
            loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none").sum(1)
        else:
            loss = -(targets.to(logits) * logits.log_softmax(1)).sum(1)
        return Output(loss, logits)

    def _scale(self, batch: Batch) -> Float[Tensor, "depth two b"] | None:
        if not self.training or not self.drop_path:
            return None
        words = rng.bits(self.seed, rng.Purpose.DROP_PATH, batch.epochs, batch.ids, 2 * self.backbone.depth)
        draws = (words.double() / 2.0**32).T.reshape(self.backbone.depth, 2, batch.size)
        rates = torch.linspace(0, self.drop_path, self.backbone.depth, dtype=torch.float64, device=words.device)
        rates[: self.backbone.num_frozen] = 0.0
        return depth_scale(draws >= rates[:, None, None], rates).to(batch.images.dtype)


class Probe(Classifier):
    """Linear probe (He et al. 2022, section A.1): frozen backbone, batch norm without affine parameters, linear head.

    Features are computed `chunk` samples at a time, and normalised with the statistics of the whole global batch on any
    number of ranks.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, chunk: int, seed: int):
        super().__init__(backbone.requires_grad_(False), num_classes, 0.01, seed)
        self.chunk, self.norm = chunk, GlobalBatchNorm(backbone.dim)

    def initialise(self, fill: Fill = Tensor.copy_) -> None:
        super().initialise(fill)
        self.norm.reset()

    def forward(self, batch: Batch) -> Output:
        """Cross-entropy and logits (b, classes) of each sample."""
        self.backbone.eval()
        with torch.no_grad():
            features = torch.cat([self.backbone(part.images) for part in batch.split(self.chunk)])
        logits = single(self.head(self.norm(single(features))))
        return Output(F.cross_entropy(logits, batch.labels, reduction="none"), logits)


class GlobalBatchNorm(nn.Module):
    """Batch norm without affine parameters over the batch of all ranks, for features that need no gradient.

    Equals torch's BatchNorm1d(dim, affine=False, eps=1e-6, momentum=0.1) on the gathered batch (Ioffe and Szegedy 2015,
    algorithm 1). In evaluation it uses the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def reset(self) -> None:
        """Set the running statistics to mean 0 and variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x: Float[Tensor, "b d"], counts: Bool[Tensor, " b"] | None = None) -> Float[Tensor, "b d"]:
        """All rows of `x`, normalised; in training with statistics of the rows marked by `counts` (None: of all)."""
        if self.training:
            weight = torch.ones_like(x[:, :1]) if counts is None else counts[:, None].to(x)
            count = dist.all_reduce_sum(weight.sum()).clamp(min=1)
            mean = dist.all_reduce_sum((weight * x).sum(0)) / count
            variance = dist.all_reduce_sum((weight * (x - mean).square()).sum(0)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt()
