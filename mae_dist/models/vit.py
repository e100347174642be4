"""Vision Transformer (Dosovitskiy et al. 2021), that can encode a subset of its patches.

Names and shapes in the state dict are those of timm's VisionTransformer without its head.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.models.backbone import Backbone, PatchEmbed
from mae_dist.models.layers import EPS, AttentionBlock, Block, sincos_positions


def class_and_grid(dim: int, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
    """Fixed position embedding: zeros for the class token, sin-cos for a grid of (rows, columns)."""
    return torch.cat([torch.zeros(1, dim), sincos_positions(dim, *grid)])[None]


@functools.cache
def fixed_positions(dim: int, grid: tuple[int, int], device: torch.device) -> Float[Tensor, "1 n d"]:
    """`class_and_grid` on a device, kept, since the host would wait for each copy to a GPU."""
    return class_and_grid(dim, grid).to(device)


def resize_positions(
    positions: Float[Tensor, "1 n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 m d"]:
    """Resize a position embedding from a grid of `old` (rows, columns) to one of `new`, bicubically.

    The class token's position is unchanged. As interpolate_pos_embed of the official MAE code, also for rectangles.
    """
    grid = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)


class ViT(Backbone):
    """Vision Transformer backbone with a class token.

    ``pool="cls"``: the feature is the class token after the last norm (`norm`). ``pool="avg"``: it is the mean of the
    patch tokens, then normed by `fc_norm` (He et al. 2022, section A.1). ``position="sincos"`` keeps the position
    embedding fixed, ``"learned"`` starts from it and trains it. Raises ValueError for other values of both, and for a
    `dim` that is not divisible by `num_heads` and by 4.
    """

    num_prefix = 1

    def __init__(
        self, *, patch: int, dim: int, depth: int, num_heads: int, image_size: int | tuple[int, int], channels: int = 3,
        pool: str = "cls", position: str = "sincos", qkv_bias: bool = True,
    ):  # fmt: skip
        if pool not in ("cls", "avg"):
            raise ValueError(f"model.pool={pool}: must be cls or avg")
        if position not in ("sincos", "learned"):
            raise ValueError(f"model.position={position}: must be sincos or learned")
        if dim % math.lcm(num_heads, 4):
            raise ValueError(f"model.dim={dim}: must be divisible by num_heads={num_heads} and by 4")
        super().__init__(patch, dim, depth, image_size, channels, pool)
        self.position = position
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, dim), requires_grad=position == "learned")
        self.blocks = nn.ModuleList(AttentionBlock(dim, num_heads, qkv_bias=qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=EPS) if pool == "avg" else nn.Identity()

    def fixed(self) -> dict[str, Tensor]:
        """Initial values that are not drawn: the sin-cos position embedding."""
        return {"pos_embed": class_and_grid(self.dim, self.grid)}

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """The position embedding of a grid: for another than the model's, learned positions resized, fixed ones
        computed.
        """
        if grid == self.grid:
            return self.pos_embed
        if self.position == "learned":
            return resize_positions(self.pos_embed, self.grid, grid)
        return fixed_positions(self.dim, grid, self.pos_embed.device)

    def decoder_block(self, dim: int, num_heads: int) -> Block:
        return AttentionBlock(dim, num_heads)

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        encoder_mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        table = self.positions(self.grid_of(images))
        positions = table[:, 1:]
        if visible is not None and encoder_mask_token is None:
            positions = F.embedding(visible, positions[0])
        x = self._patches(images, visible, encoder_mask_token, self.patch_embed) + positions
        cls = (self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], 1)
