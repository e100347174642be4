"""Layers that backbones and decoders share: attention, MLP, block, fixed positions, initialisation.

Parameter names are timm's. Tensors in, tensors out: no file, no rank, no configuration, no random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

EPS = 1e-6
"""Epsilon of every LayerNorm (the papers' value, not torch's)."""
TOKENS = ("cls_token", "mask_token", "encoder_mask_token", "query")
"""Parameters that stand for a token and start as N(0, 0.02)."""


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1), heads of dim / num_heads."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], last: int | None = None) -> Float[Tensor, "b m d"]:
        """What each token, or each of the `last` ones, gathers from all."""
        if last is None:
            q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        else:
            dim, bias = x.shape[2], self.qkv.bias
            q = F.linear(x[:, -last:], self.qkv.weight[:dim], None if bias is None else bias[:dim])
            kv = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
            q = rearrange(q, "b m (h d) -> b h m d", h=self.num_heads)
            k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Attention of tokens to others: queries from `x`, keys and values from `context`."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b m d"], context: Float[Tensor, "b n c"]) -> Float[Tensor, "b m d"]:
        q = rearrange(self.q(x), "b m (h d) -> b h m d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h m d -> b m (h d)"))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Two residual branches, each on what a LayerNorm gives: the unit that is recomputed, compiled and sharded.

    A block is called with tokens `x` and, each perhaps None: `scale` (two, b), the weights of the two branches of each
    sample (stochastic depth: 0 or 1 / keep probability); `present` (b, k), the positions of the grid that `x` holds
    where some are absent; `last`, how many of the last tokens its output is wanted for.
    """


def residual(x: Tensor, branch: Tensor, scale: Float[Tensor, "two b"] | None, number: int) -> Tensor:
    """x + branch, weighted per sample by row `number` of `scale`."""
    return x + (branch if scale is None else scale[number, :, None, None] * branch)


class AttentionBlock(Block):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, eq. 2-3). Positions are in its tokens, so `present` is not
    looked at.
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
        present: Int[Tensor, "b k"] | None = None,  # noqa: ARG002
        last: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        attended = self.attn(self.norm1(x), last)
        x = residual(x if last is None else x[:, -last:], attended, scale, 0)
        return residual(x, self.mlp(self.norm2(x)), scale, 1)


class CrossBlock(Block):
    """Cross-attention to a context, then an MLP: no token sees another of its kind (CrossMAE, Fu et al. 2024,
    section 3.2).
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
    """16-bit numbers as fp32; fp32 and float64 as they are. For what losses are computed from."""
    return x.float() if x.element_size() < 4 else x


def depth_scale(keep: Bool[Tensor, "depth two b"], rates: Float[Tensor, " depth"]) -> Float[Tensor, "depth two b"]:
    """Stochastic depth (Huang et al. 2016), inverted: kept branches are divided by their probability of being kept."""
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
"""Puts a value into a parameter; `Tensor.copy_` where the parameter is an ordinary tensor."""


@torch.no_grad()
def initialise(module: nn.Module, seed: int, skip: nn.Module | None = None, fill: Fill = Tensor.copy_) -> None:
    """MAE's initialisation: Xavier-uniform linear layers with zero bias, LayerNorm 1 and 0, tokens N(0, 0.02). So is
    the patch embedding, but for its bias, which the official code leaves as torch draws it for a convolution.

    Every parameter is drawn on the CPU from a generator of its own, seeded by (seed, its name), so that the bits depend
    on neither the order of construction nor device nor ranks. Parameters that a module's `fixed()` names take the value
    given there. What has no storage yet stays so, and everything in `skip` is left alone.
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
            fill(parameter, fixed[leaf] if leaf in fixed else _draw(part, leaf, parameter.shape, _seed_of(seed, name)))


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
    bound = math.sqrt(6.0 / (shape[0] + shape[1:].numel()))  # a linear layer, or a patch embedding seen as one
    return value.uniform_(-bound, bound, generator=generator)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
