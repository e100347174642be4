"""Layers that backbones and decoders share: attention, MLP, block, fixed positions, initialisation.

Parameter names are timm's. Tensors in, tensors out: no file, no rank, no configuration, no random state.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mae_dist.models import short_attention

EPS = 1e-6
"""Epsilon of every LayerNorm (the papers' value, not torch's)."""
TOKENS = ("cls_token", "mask_token", "stand_in", "query")
"""Names of the parameters that are tokens; they start as N(0, 0.02)."""


def split_heads(x: Float[Tensor, "b n partsxhxc"], parts: int, heads: int) -> tuple[Float[Tensor, "b n h c"], ...]:
    """Queries, keys or values that lie side by side in `x`, each split into heads. `parts` stays behind the tokens, so
    that the backward pass copies the gradients once.
    """
    return x.unflatten(2, (parts, heads, -1)).unbind(2)


def attend(
    q: Float[Tensor, "b m h c"], k: Float[Tensor, "b n h c"], v: Float[Tensor, "b n h c"]
) -> Float[Tensor, "b m hxc"]:
    """Attention of queries to keys and values, the results of all heads side by side (Vaswani et al. 2017, 3.2)."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1) with dim / num_heads channels a head. `short`: what
    `short_attention.takes` is computed by its kernels, all else by torch's.
    """

    short = False

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], num_out: int | None = None) -> Float[Tensor, "b m d"]:
        """Attention of the last `num_out` tokens (None: of every token) to all tokens."""
        if num_out is None:
            qkv = self.qkv(x)
            if self.short and short_attention.takes(qkv, self.num_heads):
                return self.proj(short_attention.short_attention(qkv, self.num_heads))
            parts = split_heads(qkv, 3, self.num_heads)
        else:
            sizes, bias = (x.shape[2], 2 * x.shape[2]), self.qkv.bias
            weights, biases = self.qkv.weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
            query, context = F.linear(x[:, -num_out:], weights[0], biases[0]), F.linear(x, weights[1], biases[1])
            parts = split_heads(query, 1, self.num_heads) + split_heads(context, 2, self.num_heads)
        return self.proj(attend(*parts))


class CrossAttention(nn.Module):
    """Multi-head cross-attention: queries from `x` (dim wide), keys and values from `context` (context_dim wide)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b m d"], context: Float[Tensor, "b n c"]) -> Float[Tensor, "b m d"]:
        parts = split_heads(self.q(x), 1, self.num_heads) + split_heads(self.kv(context), 2, self.num_heads)
        return self.proj(attend(*parts))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Two residual branches with a LayerNorm before each. Activation checkpointing, compilation and FSDP act per block.

    `forward` takes tokens `x` (b, n, d) and three optional arguments. `scale` (two, b): factors of the two branches for
    each sample (stochastic depth: 0 or 1 / keep probability). `positions` (b, k): the grid positions of the patch
    tokens in `x`, where that is not the whole grid in order. `num_out`: compute only the last `num_out` tokens.
    """


def residual(x: Tensor, branch: Tensor, scale: Float[Tensor, "two b"] | None, number: int) -> Tensor:
    """x + branch, with the branch multiplied per sample by row `number` of `scale`."""
    return x + (branch if scale is None else scale[number, :, None, None] * branch)


class AttentionBlock(Block):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, eq. 2-3).

    The tokens already hold their position embedding, so `positions` is ignored. See `Block` for the other arguments.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        scale: Float[Tensor, "two b"] | None = None,
        positions: Int[Tensor, "b k"] | None = None,  # noqa: ARG002
        num_out: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        attended = self.attn(self.norm1(x), num_out)
        x = residual(x if num_out is None else x[:, -num_out:], attended, scale, 0)
        return residual(x, self.mlp(self.norm2(x)), scale, 1)


class CrossBlock(Block):
    """Cross-attention of tokens `x` to a `context`, then an MLP; the tokens of `x` do not attend to each other.

    Source: CrossMAE (Fu et al. 2024), section 3.2.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b m d"], context: Float[Tensor, "b n c"]) -> Float[Tensor, "b m d"]:
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


def single(x: Tensor) -> Tensor:
    """16-bit numbers cast to fp32, others unchanged: losses are computed in fp32 or more."""
    return x.float() if x.element_size() < 4 else x


def depth_scale(keep: Bool[Tensor, "depth two b"], rates: Float[Tensor, " depth"]) -> Float[Tensor, "depth two b"]:
    """Branch factors of stochastic depth (Huang et al. 2016): 0 where a branch is dropped, else 1 / (1 - rate)."""
    return keep / (1 - rates)[:, None, None]


def sincos_positions(dim: int, height: int, width: int) -> Float[Tensor, "n dim"]:
    """Fixed 2-D sin-cos position embedding of a grid in row order (MAE, section 3; Chen et al. 2021).

    The first half of the channels encodes the column, the second the row; each half is [sin, cos] of dim / 4
    frequencies.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()


Fill = Callable[[Tensor, Tensor], object]
"""fill(parameter, value) sets a parameter: `Tensor.copy_`, or `parallel.copy_into` where parameters are sharded."""


@torch.no_grad()
def initialise(module: nn.Module, seed: int, skip: nn.Module | None = None, fill: Fill = Tensor.copy_) -> None:
    """Initialise the parameters of `module` as the official MAE code does.

    Linear layers are Xavier-uniform with zero bias, LayerNorms 1 and 0, tokens N(0, 0.02). The patch embedding is
    Xavier-uniform as a linear layer; its bias is drawn as torch draws a convolution's.

    Every parameter is drawn on the CPU from a generator of its own, seeded by (seed, its name), so that its bits depend
    neither on the order of construction nor on devices or ranks. A module with a method `fixed()` gives the values of
    the parameters that it names there. Parameters on the meta device, and all in `skip`, are left unchanged.
    """
    skipped = set(skip.modules()) if skip is not None else set()
    for prefix, part in module.named_modules():
        if part in skipped:
            continue
        parameters = [(name, p) for name, p in part.named_parameters(prefix=prefix, recurse=False) if not p.is_meta]
        fixed_of = getattr(part, "fixed", None)
        fixed: dict[str, Tensor] = fixed_of() if parameters and callable(fixed_of) else {}  # pyright: ignore
        for name, parameter in parameters:
            leaf = name.rpartition(".")[2]
            own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            fill(parameter, fixed[leaf] if leaf in fixed else _draw(part, leaf, parameter.shape, own))


def _draw(part: nn.Module, leaf: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.zeros(shape)
    if isinstance(part, nn.LayerNorm):
        return value.fill_(1.0 if leaf == "weight" else 0.0)
    if leaf == "bias":
        bound = part.weight[0].numel() ** -0.5 if isinstance(part, nn.Conv2d) else 0.0
        return value.uniform_(-bound, bound, generator=generator)
    if leaf in TOKENS:
        return value.normal_(0.0, 0.02, generator=generator)
    bound = math.sqrt(6.0 / (shape[0] + shape[1:].numel()))  # linear layers, and the patch embedding as one
    return value.uniform_(-bound, bound, generator=generator)
