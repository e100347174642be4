"""Several probe heads on one frozen backbone, trained together, so that the features of a batch are computed once.

Heads are independent: their losses are added, so gradients do not mix, and a head that diverges gets zero gradients
from then on while the others are trained further. Heads that read the same features are computed as one wide matrix.
Heads are fp32 whatever the precision of the backbone. Held-out samples stay in the stream with a loss of zero.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mae_dist import dist, rng, schema
from mae_dist.batch import Batch
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import Fill, initialise, single
from mae_dist.objectives import Objective, Output
from mae_dist.objectives.classify import GlobalBatchNorm, draw_head

LIMIT = 1e15
"""A head has diverged when a sample's loss or a gradient's norm reaches this. Sums of smaller ones are finite."""
HEAD_DIM = 64
"""Channels of one attention head of attentive pooling."""
ATTENTIVE = "attentive"
SGD: dict[str, Any] = {"rule": "lars", "trust": None}
RULES: dict[str, dict[str, Any]] = {"lars": {"rule": "lars"}, "sgd": SGD, "adamw": {"rule": "adamw"}}
"""The update rule of each method, as a part of its parameter groups (see `optim.build`)."""


def held_out(seed: int, share: float, ids: Any) -> Any:
    """Mark held-out samples, about a `share` of `ids`, by (seed, id) alone; bool (n,), NumPy or torch like `ids`."""
    return rng.bits(seed, rng.Purpose.HELD_OUT, 0, ids, 1)[:, 0] < math.ceil(share * 2**32)


@dataclass(frozen=True)
class Head:
    """One head: the method that trains it (lars, sgd, adamw, ridge, knn) and the features that it reads.

    ``base_lr`` is per 256 images. For ridge regression ``weight_decay`` is the penalty, as a multiple of the features'
    mean variance.
    """

    method: str
    base_lr: float | None
    weight_decay: float | None
    features: str
    block: int

    @property
    def name(self) -> str:
        rate = "" if self.base_lr is None else f" lr {self.base_lr:g}"
        word = "penalty" if self.method == "ridge" else "wd"
        decay = "" if self.weight_decay is None else f" {word} {self.weight_decay:g}"
        return f"{self.method}{rate}{decay} on {self.features} of block {self.block}"

    @property
    def reads(self) -> tuple[int, str, bool]:
        """(block, features, batch-normed): heads with the same value are computed together."""
        return self.block, self.features, self.method == "lars"


class AttentivePool(nn.Module):
    """Multi-head cross-attention of one learned query to patch tokens, as in an attentive probe.

    Source: Chen et al. 2023, "Context autoencoder". There are no biases: one of the keys would cancel in the softmax,
    one of the values is covered by the following linear layer.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.num_heads = max(1, dim // HEAD_DIM)
        self.query = nn.Parameter(torch.zeros(dim))
        self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def score_weights(self) -> Float[Tensor, "heads d"]:
        """Vectors whose product with a token is its score for each attention head (query times key matrix)."""
        query, key = (rearrange(p, "(h c) ... -> h c ...", h=self.num_heads) for p in (self.query, self.key.weight))
        return torch.einsum("hc,hcd->hd", query, key) / math.sqrt(query.shape[1])

    def values(self) -> Float[Tensor, "heads c d"]:
        """The value matrix of each attention head (c output channels a head)."""
        return rearrange(self.value.weight, "(h c) d -> h c d", h=self.num_heads)


def attend(pools: list[AttentivePool], tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b pools d"]:
    """The output of each pool. Tokens are averaged before the linear map to values, which gives equal results."""
    scores = tokens @ torch.cat([pool.score_weights() for pool in pools]).T
    mixed = scores.softmax(1).transpose(1, 2) @ tokens
    values = torch.cat([pool.values() for pool in pools])
    return rearrange(torch.einsum("bkd,kcd->bkc", mixed, values), "b (a h) c -> b a (h c)", a=len(pools))


class ProbeHeads(Objective):
    """All heads of the section `heads`, over ``width`` features a sample; `columns` maps (block, kind) to their slice.

    The last columns are the patch tokens, for attentive pooling. A batch holds either images, whose features are
    computed `chunk` at a time, or features. Features of the last block are those of the backbone's own pooling; for
    other blocks see `Backbone.layers`. Raises ValueError for a class token or a block that the backbone does not have.
    """

    dead: Tensor

    def __init__(self, backbone: Backbone, num_classes: int, settings: schema.HeadsConfig, *, chunk: int, seed: int):
        super().__init__(backbone.requires_grad_(False), seed)
        kinds = [kind for kind in ("cls", "mean") if {kind, "both"} & set(settings.features)]
        if "cls" in kinds and not backbone.num_prefix:
            chosen = ", ".join(settings.features)
            raise ValueError(f"heads.features=[{chosen}]: this model has no class token; set heads.features=[mean]")
        self.blocks = sorted(set(settings.blocks or (backbone.depth,)))
        if self.blocks[-1] > backbone.depth:
            raise ValueError(f"heads.blocks={list(settings.blocks)}: this model has blocks 1 to {backbone.depth}")
        self.settings, self.chunk, dim = settings, chunk, backbone.dim
        self.reads = list(product(self.blocks, dict.fromkeys(settings.features)))
        self.columns: dict[tuple[int, str], slice] = {}
        for number, (block, kind) in enumerate(product(self.blocks, kinds)):
            self.columns[block, kind] = slice(number * dim, (number + 1) * dim)
        for block in self.blocks:
            first = self.columns[block, kinds[0]].start
            self.columns[block, "both"] = slice(first, first + len(kinds) * dim)
        self.num_columns = len(self.blocks) * len(kinds) * dim
        self.width = self.num_columns + settings.attentive * backbone.num_patches * dim
        self.heads = self._heads()
        sizes = [dim if h.features == ATTENTIVE else self._size(h.block, h.features) for h in self.heads]
        self.linears = nn.ModuleList(nn.Linear(size, num_classes) for size in sizes)
        self.pools = nn.ModuleList(AttentivePool(dim) for head in self.heads if head.features == ATTENTIVE)
        normed = self.reads if settings.lars else []
        norms = {f"{kind}_{block}": GlobalBatchNorm(self._size(block, kind)) for block, kind in normed}
        self.norms = nn.ModuleDict(norms)
        self.register_buffer("dead", torch.zeros(len(self.heads), dtype=torch.bool))
        self.initialise_rest()
        for number in range(len(self.heads)):
            for _, parameter in self.parameters_of(number):
                parameter.register_hook(partial(self._zero_if_dead, number))

    def _heads(self) -> list[Head]:
        """All heads, in an order in which heads that are computed together are neighbours."""
        settings, found = self.settings, []
        for block, kind in self.reads:
            for methods in (("lars",), ("sgd", "adamw")):
                rates = [(method, rate) for method in methods for rate in getattr(settings, method)]
                found += [Head(*rate, decay, kind, block) for rate, decay in product(rates, settings.weight_decay)]
        pooled = product(settings.adamw, settings.weight_decay) if settings.attentive else ()
        return found + [Head("adamw", *rate, ATTENTIVE, self.backbone.depth) for rate in pooled]

    def _size(self, block: int, kind: str) -> int:
        columns = self.columns[block, kind]
        return columns.stop - columns.start

    def initialise_rest(self, fill: Fill = Tensor.copy_) -> None:
        """Set every head to the initial values that a single linear probe has, whichever other heads there are."""
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            draw_head(linear, 0.01, self.seed, fill)
        for pool in self.pools:
            initialise(pool, self.seed, fill=fill)

    def parameters_of(self, number: int) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that head `number` trains."""
        parts: list[nn.Module] = [self.linears[number]]
        if self.heads[number].features == ATTENTIVE:
            parts.append(self.pools[number - len(self.heads)])
        return [pair for part in parts for pair in part.named_parameters()]

    def groups(self, optim: schema.OptimConfig) -> list[dict[str, Any]]:
        """Parameter groups with each head's own rule, weight decay and lr_scale; `optim` gives the common schedule."""
        groups: dict[tuple[str, float, float], dict[str, Any]] = {}
        for number, head in enumerate(self.heads):
            assert head.base_lr is not None
            assert head.weight_decay is not None
            for _, parameter in self.parameters_of(number):
                decay, scale = head.weight_decay if parameter.ndim > 1 else 0.0, head.base_lr / optim.base_lr
                group = groups.setdefault((head.method, scale, decay), {"params": []})
                group |= {"lr_scale": scale, "weight_decay": decay} | RULES[head.method]
                group["params"].append(parameter)
        return list(groups.values())

    def _zero_if_dead(self, number: int, gradient: Tensor) -> Tensor:
        """A zero gradient for a diverged head, which keeps it out of the gradient norm; else `gradient` unchanged."""
        alive = ~self.dead[number] & (gradient.norm() < LIMIT)
        return torch.where(alive, gradient, torch.zeros_like(gradient))

    @torch.no_grad()
    def features(self, batch: Batch) -> Float[Tensor, "b width"]:
        """The features of a batch: its own where it holds features, else computed from its images."""
        if batch.images.ndim == 2:
            return batch.images
        self.backbone.eval()
        return torch.cat([self.rows(images) for images in batch.images.split(self.chunk)])

    def rows(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width"]:
        """The features of images, computed in one forward pass."""
        backbone = self.backbone
        numbers = {*self.blocks, backbone.depth} if self.settings.attentive else set(self.blocks)
        found = []
        for number, tokens in zip(sorted(numbers), backbone.layers(images, numbers), strict=True):
            kinds = [kind for kind in ("cls", "mean") if (number, kind) in self.columns]
            found += [backbone.read(tokens, number, kind) for kind in kinds]
            if number == backbone.depth and self.settings.attentive:
                found.append(backbone.read(tokens, number, "patches").flatten(1))
        return torch.cat([single(part) for part in found], 1)

    def logits(
        self, rows: Float[Tensor, "b width"], trained: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b heads classes"]:
        """Logits of each head for features `rows`; in training, batch norm uses rows marked `trained` (None: all)."""
        found, number = [], 0
        for (block, kind, normed), together in groupby(self.heads, key=lambda head: head.reads):
            linears = self.linears[number : number + len(list(together))]
            number += len(linears)
            weight, bias = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
            if kind == ATTENTIVE:
                tokens = rearrange(rows[:, self.num_columns :], "b (n d) -> b n d", d=self.backbone.dim)
                pooled = attend(list(self.pools), tokens)  # pyright: ignore
                found.append(torch.einsum("bad,acd->bac", pooled, torch.stack(weight)) + torch.stack(bias))
                continue
            x = rows[:, self.columns[block, kind]]
            x = self.norms[f"{kind}_{block}"](x, trained) if normed else x
            wide = F.linear(x, torch.cat(weight), torch.cat(bias))
            found.append(rearrange(wide, "b (a c) -> b a c", a=len(linears)))
        return torch.cat(found, 1)

    def forward(self, batch: Batch) -> Output:
        """Each sample's sum of the cross-entropies of all heads, and the logits (b, heads, classes)."""
        rows = self.features(batch)
        with torch.autocast(rows.device.type, enabled=False):
            trained = ~held_out(self.seed, self.settings.held_out, batch.ids)
            logits = self.logits(rows, trained)
            labels = repeat(batch.labels, "b -> (b a)", a=len(self.heads))
            loss = F.cross_entropy(rearrange(logits, "b a c -> (b a) c"), labels, reduction="none")
            loss = rearrange(loss, "(b a) -> b a", a=len(self.heads))
            if self.training:
                self.dead |= self._diverged(loss.detach(), rows)
                loss = loss * (trained.float() / (1 - self.settings.held_out))[:, None]  # the mean loss keeps its scale
            return Output(torch.where(self.dead, 0, loss).sum(1), logits)

    def _diverged(self, loss: Float[Tensor, "b heads"], rows: Float[Tensor, "b width"]) -> Bool[Tensor, " heads"]:
        """Heads whose loss reaches LIMIT on any rank; none if a feature is not finite (then the step is skipped)."""
        found = torch.cat([~(loss < LIMIT).all(0), ~rows.isfinite().all()[None]]).float()
        found = dist.all_reduce_sum(found) > 0
        return found[:-1] & ~found[-1]
