"""MLP-Mixer (Tolstikhin et al. 2021), able to look at a subset of its patches.

What is hidden is absent before anything is mixed: token mixing sees zeros in its place, which here means that only the
weights of visible positions are used, each sample's own, and channel mixing runs on visible tokens alone. So masks per
sample save what they save in a ViT. Names and shapes in the state dict are those of timm's MlpMixer without its head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.models.backbone import Backbone, PatchEmbed
from mae_dist.models.layers import EPS, Block, Mlp, residual


class TokenMlp(Mlp):
    """An MLP over positions, the same for every channel (Tolstikhin et al. 2021, eq. 1, first line)."""

    def forward(
        self, x: Float[Tensor, "b k d"], present: Int[Tensor, "b k"] | None = None, last: int | None = None
    ) -> Float[Tensor, "b m d"]:
        """Mixed tokens in the order of `x`, all or the `last` ones.

        `present` says which positions of the grid `x` holds, in any order; none: all of it, in order. Sums over k of n
        positions are scaled by sqrt(n / k), which makes them as large as sums over all, weights being of either sign;
        n / k, dropout's way, would make them twice as large where a quarter is visible.
        """
        if present is None and last is None:
            return rearrange(super().forward(rearrange(x, "b n d -> b d n")), "b d n -> b n d")
        assert present is not None
        wanted = present if last is None else present[:, -last:]
        first = F.embedding(present, self.fc1.weight.T)
        scale = math.sqrt(self.fc1.in_features / x.shape[1])
        hidden = torch.baddbmm(self.fc1.bias, x.transpose(1, 2), first, alpha=scale)
        second, bias = F.embedding(wanted, self.fc2.weight), F.embedding(wanted, self.fc2.bias[:, None])
        return torch.baddbmm(bias, second, F.gelu(hidden).transpose(1, 2))


class MixerBlock(Block):
    """Token mixing, then channel mixing (Tolstikhin et al. 2021, eq. 1)."""

    def __init__(self, dim: int, num_patches: int, token_hidden: int, channel_hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mlp_tokens = TokenMlp(num_patches, token_hidden)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp_channels = Mlp(dim, channel_hidden)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        scale: Float[Tensor, "two b"] | None = None,
        present: Int[Tensor, "b k"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        mixed = self.mlp_tokens(self.norm1(x), present, last)
        x = residual(x if last is None else x[:, -last:], mixed, scale, 0)
        return residual(x, self.mlp_channels(self.norm2(x)), scale, 1)


class Mixer(Backbone):
    """The backbone: the feature is the mean of the tokens after the last norm; there is no class token.

    ``token_hidden`` and ``channel_hidden`` are the paper's D_S and D_C. A Mixer is bound to the grid it was made for.
    Raises ValueError for a pooling other than "avg".
    """

    num_prefix = 0

    def __init__(
        self, *, patch: int, dim: int, depth: int, token_hidden: int, channel_hidden: int,
        image_size: int | tuple[int, int], channels: int = 3, pool: str = "avg",
    ):  # fmt: skip
        if pool != "avg":
            raise ValueError(f"model.pool={pool}: a Mixer has no class token; leave model.pool out, or set avg")
        super().__init__(patch, dim, depth, image_size, channels, pool)
        self.stem = PatchEmbed(patch, channels, dim)
        sizes = (self.num_patches, token_hidden, channel_hidden)
        self.blocks = nn.ModuleList(MixerBlock(dim, *sizes) for _ in range(depth))
        self.norm, self.fc_norm = nn.LayerNorm(dim, eps=EPS), nn.Identity()

    def decoder_block(self, dim: int, num_heads: int) -> Block:  # noqa: ARG002  (a Mixer has no heads)
        """The paper's proportions: D_S = dim / 2, D_C = 4 dim."""
        return MixerBlock(dim, self.num_patches, dim // 2, 4 * dim)

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        encoder_mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        return self._patches(images, visible, encoder_mask_token, self.stem)
