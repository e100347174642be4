"""Vision Transformer (Dosovitskiy et al. 2021), able to encode a subset of its patches.

A backbone gives tokens (`encode`) and one feature vector per image (`forward`); it has no head. Names and shapes in the
state dict are those of timm's VisionTransformer without its head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.models.layers import EPS, Block, sincos_positions


def patchify(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n ppc"]:
    """Non-overlapping patches in row order, each flattened as (row, column, channel), MAE's order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: Float[Tensor, "b n ppc"], patch: int, height: int) -> Float[Tensor, "b c hp wp"]:
    """The inverse; `height` is the number of patch rows."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=patch, q=patch, h=height)


def take(tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Each sample's tokens at its own positions."""
    return tokens.gather(1, repeat(index, "b k -> b k d", d=tokens.shape[2]))


def class_and_grid(dim: int, grid: int) -> Float[Tensor, "1 n d"]:
    """Fixed positions of a class token, 0, and of a square grid."""
    return torch.cat([torch.zeros(1, dim), sincos_positions(dim, grid, grid)])[None]


class PatchEmbed(nn.Module):
    """A linear map of each patch, kept as the convolution that timm names."""

    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, patches: Float[Tensor, "b n ppc"]) -> Float[Tensor, "b n d"]:
        return F.linear(patches, rearrange(self.proj.weight, "d c p q -> d (p q c)"), self.proj.bias)


class ViT(nn.Module):
    """The backbone.

    With ``pool="cls"`` the final norm is `norm` and the feature is the class token; ``pool="avg"``: patch tokens are
    averaged and then normed by `fc_norm` (MAE's fine-tuning, section A.1). ``position="sincos"`` keeps positions fixed,
    ``"learned"`` trains them from there. Raises ValueError when the image size is no multiple of the patch.
    """

    def __init__(
        self, *, patch: int, dim: int, depth: int, num_heads: int, image_size: int, channels: int = 3,
        pool: str = "cls", position: str = "sincos",
    ):  # fmt: skip
        super().__init__()
        if image_size % patch:
            below, above = image_size // patch * patch, -(-image_size // patch) * patch
            near = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"model.image_size={image_size}: not divisible by the patch size {patch}; try {near}")
        self.patch, self.dim, self.depth, self.grid, self.channels = patch, dim, depth, image_size // patch, channels
        self.pool, self.image_size = pool, image_size
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, dim), requires_grad=position == "learned")
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=EPS) if pool == "avg" else nn.Identity()

    @property
    def num_patches(self) -> int:
        return self.grid**2

    def fixed(self) -> dict[str, Tensor]:
        """Positions at the start: 0 for the class token, then the grid."""
        return {"pos_embed": class_and_grid(self.dim, self.grid)}

    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        scale: Float[Tensor, "depth two b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Class and patch tokens after the last norm; with `visible`, only those are embedded and encoded."""
        patches = patchify(images, self.patch)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)
        if visible is not None:
            patches, positions = take(patches, visible), take(positions, visible)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1)
        for number, block in enumerate(self.blocks):
            x = block(x, None if scale is None else scale[number])
        return self.norm(x)

    def forward(
        self, images: Float[Tensor, "b c h w"], scale: Float[Tensor, "depth two b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """One feature vector per image."""
        tokens = self.encode(images, scale=scale)
        return self.fc_norm(tokens[:, 1:].mean(1) if self.pool == "avg" else tokens[:, 0])
