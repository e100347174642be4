"""MLP-Mixer (Tolstikhin et al. 2021) that can encode a subset of its patches.

Hidden patches enter token mixing as zeros: each sample uses only the weights of its visible positions. Channel mixing
runs on visible tokens alone. So masking saves as much computation as in a ViT. Names and shapes in the state dict are
those of timm's MlpMixer without its head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.models.backbone import Backbone, PatchEmbed
from mae_dist.models.layers import EPS, Block, Mlp, residual


class TokenMlp(Mlp):
    """An MLP over positions, applied to every channel (Tolstikhin et al. 2021, eq. 1, first line)."""

    def forward(
        self, x: Float[Tensor, "b k d"], positions: Int[Tensor, "b k"] | None = None, num_out: int | None = None
    ) -> Float[Tensor, "b m d"]:
        """Mixed tokens in the order of `x`: all, or the last `num_out`.

        `positions` lists the grid positions of the tokens in `x`, in any order; None means the whole grid in order.
        Sums over k of n positions are scaled by sqrt(n / k), which keeps their magnitude, as weights have either sign;
        n / k, as in dropout, would double it with a quarter visible.
        """
        if positions is None and num_out is None:
            return rearrange(super().forward(rearrange(x, "b n d -> b d n")), "b d n -> b n d")
        assert positions is not None
        out = positions if num_out is None else positions[:, -num_out:]
        first = F.embedding(positions, self.fc1.weight.T)
        scale = math.sqrt(self.fc1.in_features / x.shape[1])
        hidden = torch.baddbmm(self.fc1.bias, x.transpose(1, 2), first, alpha=scale)
        second, bias = F.embedding(out, self.fc2.weight), F.embedding(out, self.fc2.bias[:, None])
        return torch.baddbmm(bias, second, F.gelu(hidden).transpose(1, 2))


class MixerBlock(Block):
    """Token mixing, then channel mixing (Tolstikhin et al. 2021, eq. 1). See `Block` for the arguments."""

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
        positions: Int[Tensor, "b n"] | None = None,
        num_out: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        mixed = self.mlp_tokens(self.norm1(x), positions, num_out)
        x = residual(x if num_out is None else x[:, -num_out:], mixed, scale, 0)
        return residual(x, self.mlp_channels(self.norm2(x)), scale, 1)


class Mixer(Backbone):
    """MLP-Mixer backbone: its feature is the mean of the tokens after the last norm; there is no class token.

    ``token_hidden`` and ``channel_hidden`` are the paper's D_S and D_C. The weights fit one grid only. Raises
    ValueError for a pooling other than "avg".
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
        """A Mixer block in the paper's proportions, D_S = dim / 2 and D_C = 4 dim, over this backbone's grid."""
        return MixerBlock(dim, self.num_patches, dim // 2, 4 * dim)

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        encoder_mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        return self._patches(images, visible, encoder_mask_token, self.stem)
