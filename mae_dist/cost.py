"""What models cost, in closed form: multiply-adds of an image's forward and backward pass, and memory kept in between.

Counted are matrix products, linear layers and attention, as in the papers' tables; norms, GELU and softmax are below
1 %. A ViT and a Mixer are known; of another kind of model nothing is. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Protocol

from mae_dist import heads_settings, resolutions
from mae_dist.model_sizes import block_parameters, grid_of, num_parameters, size_of
from mae_dist.patch_counts import patch_counts
from mae_dist.schema import FinetuneConfig, MaeConfig, PretrainConfig, ProbeConfig, RunConfig, TrainingConfig

FP32 = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Cost:
    """Cost per image. ``forward`` and ``backward`` are multiply-adds, which the papers' tables call FLOPs; ``kept``
    counts the numbers that autograd keeps for the backward pass, parameters and indices left out, with attention as
    fused kernels compute it: they keep queries, keys, values, the result and one number a row. ``recomputable`` are
    those of them that blocks need not keep with activation checkpointing: all but each block's input.
    """

    forward: int = 0
    backward: int = 0
    kept: int = 0
    recomputable: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * number for number in astuple(self)))

    @property
    def training_flops(self) -> int:
        """Floating point operations of a forward and a backward pass: two for each multiply-add. What activation
        checkpointing computes again does not count (Chowdhery et al. 2022, appendix B).
        """
        return 2 * (self.forward + self.backward)

    @property
    def activations(self) -> int:
        """Bytes in fp32 of what autograd keeps, without activation checkpointing."""
        return FP32 * self.kept

    def block(self, inputs: int) -> Cost:
        """The same as the cost of a block that is given so many numbers."""
        return replace(self, recomputable=self.kept - inputs)


class BlockCost(Protocol):
    """Cost of a block that is given `tokens` tokens and computes the last `out` of them; ``dropped``: hidden patches
    are not among them.
    """

    def __call__(self, tokens: int, out: int, dropped: bool) -> Cost: ...


def product(rows: int, inner: int, columns: int, kept: int = 0, into_input: bool = True) -> Cost:
    """A matrix product, whose backward pass takes two; one where the input needs no gradient."""
    forward = rows * inner * columns
    return Cost(forward, (1 + into_input) * forward, kept)


def norm(rows: int, dim: int) -> Cost:
    """A LayerNorm, which keeps its input, means and deviations; it counts as no operations."""
    return Cost(kept=rows * (dim + 2))


def mlp(rows: int, dim: int, hidden: int) -> Cost:
    """A norm and an MLP: it keeps its input, and what goes into and comes out of GELU."""
    return norm(rows, dim) + product(rows, dim, hidden, rows * dim) + product(rows, hidden, dim, 2 * rows * hidden)


def attention(queries: int, keys: int, dim: int, context_dim: int, heads: int) -> Cost:
    """Queries, keys and values, the two products of attention and the projection (Vaswani et al. 2017, section 3.2);
    without what is kept of the inputs.
    """
    return (
        product(queries, dim, dim, queries * dim) + product(keys, context_dim, 2 * dim, 2 * keys * dim)
        + product(2 * queries, dim, keys, queries * heads) + product(queries, dim, dim, queries * dim)
    )  # fmt: skip


def vit_block(tokens: int, out: int, dropped: bool, *, dim: int, heads: int) -> Cost:  # noqa: ARG001
    """`layers.AttentionBlock`."""
    attended = norm(tokens, dim) + Cost(kept=tokens * dim) + attention(out, tokens, dim, dim, heads)
    return (attended + mlp(out, dim, 4 * dim)).block(tokens * dim)


def cross_block(tokens: int, context: int, dim: int, context_dim: int, heads: int) -> Cost:
    """`layers.CrossBlock`."""
    queries = norm(tokens, dim) + Cost(kept=tokens * dim)
    attended = queries + attention(tokens, context, dim, context_dim, heads)
    return (attended + mlp(tokens, dim, 4 * dim)).block(tokens * dim)


def mixer_block(tokens: int, out: int, dropped: bool, *, dim: int, hidden: int, wide: int) -> Cost:
    """`mixer.MixerBlock`; where patches are hidden, each sample keeps the weights of its own positions."""
    weights = hidden * (tokens + out) if dropped else 0
    mixing = product(dim, tokens, hidden, tokens * dim) + product(dim, hidden, out, 2 * dim * hidden)
    return (norm(tokens, dim) + mixing + Cost(kept=weights) + mlp(out, dim, wide)).block(tokens * dim)


def block_of(name: str, dim: int, heads: int = 0) -> BlockCost | None:
    """The blocks of a model, or with `heads` those of its decoder, which is `dim` wide (see `decoder_block`)."""
    size, kind = size_of(name), name.partition("_")[0]
    if kind == "vit":
        return partial(vit_block, dim=dim, heads=heads or size["num_heads"])
    if kind == "mixer":
        hidden, wide = (dim // 2, 4 * dim) if heads else (size["token_hidden"], size["channel_hidden"])
        return partial(mixer_block, dim=dim, hidden=hidden, wide=wide)
    return None


def encoder(name: str, image_size: int | tuple[int, int], channels: int, mae: MaeConfig | None = None) -> Cost | None:
    """The backbone without its last norm: of all patches, or as masked autoencoding uses it."""
    size, grid = size_of(name), grid_of(image_size, size_of(name)["patch"])
    if (block := block_of(name, size["dim"])) is None:
        return None
    embedded = math.prod(grid) if mae is None else patch_counts(mae, grid).visible
    pixels = channels * size["patch"] ** 2
    dropped = mae is not None and mae.hidden == "drop"
    tokens = num_prefix(name) + (embedded if dropped else math.prod(grid))
    embedding = product(embedded, pixels, size["dim"], embedded * pixels, into_input=False)
    return embedding + block(tokens, tokens, dropped) * size["depth"]


def num_prefix(name: str) -> int:
    """Tokens before the patches: a ViT has a class token."""
    return int(name.startswith("vit_"))


def pretraining(name: str, mae: MaeConfig, image_size: int | tuple[int, int], channels: int = 3) -> Cost | None:
    """Masked autoencoding of an image, decoder and loss included; None for a model of an unknown kind. Raises
    ValueError for settings that are impossible with this model.
    """
    size, grid = size_of(name), grid_of(image_size, size_of(name)["patch"])
    (visible, predicted), whole, prefix = patch_counts(mae, grid), mae.hidden == "token", num_prefix(name)
    block, encoding = block_of(name, mae.decoder_dim, mae.decoder_heads), encoder(name, image_size, channels, mae)
    if block is None or encoding is None:
        return None
    dim, wide, depth, pixels = size["dim"], mae.decoder_dim, mae.decoder_depth, channels * size["patch"] ** 2
    encoded = prefix + (math.prod(grid) if whole else visible)
    kept = predicted * (wide + 2 * pixels)  # the loss keeps predictions and targets
    head = norm(predicted, wide) + product(predicted, wide, pixels, kept)
    if mae.decoder == "cross":
        latent = Cost(kept=encoded * dim)
        decoder = cross_block(predicted, encoded, wide, dim, mae.decoder_heads) * depth
    else:
        latent = product(encoded, dim, wide, encoded * dim)
        tokens = encoded if whole else encoded + predicted
        last = tokens if whole else predicted
        decoder = block(tokens, tokens, not whole) * (depth - 1) + block(tokens, last, not whole) if depth else Cost()
    return encoding + norm(encoded, dim) + latent + decoder + head


def finetuning(
    name: str, image_size: int | tuple[int, int], channels: int = 3, classes: int = 0, trained: float | None = None
) -> Cost | None:
    """A backbone with mean pooling and a head of some classes, of which the last `trained` blocks are trained (None:
    all); None for a model of an unknown kind.
    """
    size = size_of(name)
    whole, block = encoder(name, image_size, channels), block_of(name, size["dim"])
    if whole is None or block is None:
        return None
    dim, prefix = size["dim"], num_prefix(name)
    tokens = prefix + math.prod(grid_of(image_size, size["patch"]))
    head = norm(tokens if prefix == 0 else 1, dim) + product(1, dim, classes, dim)
    if trained is None:
        return whole + head
    one = mlp(tokens, dim, size.get("channel_hidden", 4 * dim)) if trained == 0.5 else block(tokens, tokens, False)
    trains = one * math.ceil(trained) + head
    return Cost(whole.forward + head.forward, trains.backward, trains.kept, trains.recomputable)


def of_run(config: TrainingConfig, size: int | tuple[int, int] | None = None) -> Cost | None:
    """The cost of an image in a step of a run, at model.image_size or another size, without heads of classes, which are
    below 1 %; None of heads on stored features, which are all of a step.
    """
    if isinstance(config, ProbeConfig) and heads_settings.stores_features(config):
        return None
    model, channels, size = config.model, config.data.channels or 3, size or config.model.image_size
    if isinstance(config, PretrainConfig):
        return pretraining(model.name, config.mae, size, channels)
    trained = config.model.train_blocks if isinstance(config, FinetuneConfig) else 0
    return finetuning(model.name, size, channels, trained=trained)


def training_flops(config: TrainingConfig, steps: range, total: int) -> float:
    """Floating point operations of an image in a step: the mean over `steps` (0 for the first) of a run of `total`
    steps, each at its resolution; 0 where they are not known.
    """
    parts = resolutions.spans(config.train, config.model.image_size, steps, total)
    costs = [(max(1, len(part)), of_run(config, size)) for part, size in parts]
    summed = sum(number * cost.training_flops for number, cost in costs if cost)
    return summed / sum(number for number, _ in costs)


def seconds_left(config: TrainingConfig, step: int, total: int, rate: float) -> float:
    """Time of the steps after `step`, from the images a second before it: a step at another resolution takes as much
    more as it has operations.
    """
    before = training_flops(config, range(step - 1, step), total)
    more = training_flops(config, range(step, total), total) / before if before else 1.0
    return (total - step) * config.train.global_batch * more / rate


def parameters(config: RunConfig, classes: int = 0) -> tuple[int, int]:
    """(All parameters of a run's objective, fixed ones included; those that are trained), with one head of so many
    classes. Raises ValueError for a model that does not exist or images that it cannot have.
    """
    model, channels = config.model, config.data.channels or 3
    backbone, dim = num_parameters(model.name, model.image_size, channels), size_of(model.name)["dim"]
    if isinstance(config, PretrainConfig):
        total = backbone + decoder_parameters(model.name, config.mae, model.image_size, channels)
        return total, total
    head = (dim + 1) * classes
    if not isinstance(config, FinetuneConfig):
        return backbone + head, head
    blocks = config.model.train_blocks
    share = 1.0 if blocks is None else min(1.0, blocks / size_of(model.name)["depth"])
    return backbone + head, int(share * backbone) + head


def decoder_parameters(name: str, mae: MaeConfig, image_size: int | tuple[int, int], channels: int) -> int:
    """Parameters of the decoder of masked autoencoding, with its fixed position embedding."""
    size, grid = size_of(name), grid_of(image_size, size_of(name)["patch"])
    dim, wide, tokens, pixels = size["dim"], mae.decoder_dim, math.prod(grid), channels * size["patch"] ** 2
    ends = (num_prefix(name) + tokens) * wide + 2 * wide + (wide + 1) * pixels + (dim if mae.hidden == "token" else 0)
    if mae.decoder == "cross":
        block = block_parameters(wide) + 2 * (dim - wide) * wide
        return ends + wide + mae.decoder_depth * block
    mixing = {"tokens": tokens, "token_hidden": wide // 2, "channel_hidden": 4 * wide} if "token_hidden" in size else {}
    embedding = (dim + 1) * wide + (wide if mae.hidden == "drop" else 0)
    return ends + embedding + mae.decoder_depth * block_parameters(wide, **mixing)
