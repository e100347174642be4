"""Backbone, the base class of all models: tokens of an image (`encode`) and one feature vector per image (`forward`).

A backbone can encode a subset of an image's patches, which is all that masked autoencoding needs. It has no head.
Names and shapes in its state dict are timm's.
"""

import math
from collections.abc import Collection

import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.model_sizes import grid_of, sides
from mae_dist.models.layers import EPS, Block


def patchify(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n ppc"]:
    """Non-overlapping patches in row order, each flattened as (row, column, channel), MAE's order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: Float[Tensor, "b n ppc"], patch: int, height: int) -> Float[Tensor, "b c hp wp"]:
    """Images from flattened patches as `patchify` gives them; `height` is the number of patch rows."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=patch, q=patch, h=height)


def take(tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens of each sample at the positions `index` of that sample."""
    return tokens.gather(1, repeat(index, "b k -> b k d", d=tokens.shape[2]))


class PatchEmbed(nn.Module):
    """A linear map of each flattened patch; its parameters have the names and shapes of timm's convolution."""

    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, patches: Float[Tensor, "b n ppc"]) -> Float[Tensor, "b n d"]:
        return F.linear(patches, rearrange(self.proj.weight, "d c p q -> d (p q c)"), self.proj.bias)


def fit_channels(weight: Float[Tensor, "d c p q"], channels: int) -> Float[Tensor, "d n p q"]:
    """A patch embedding's weight for another number of channels, by the rule of timm's adapt_input_conv: summed over
    the old channels for a single new one, else repeated in turn and scaled by old / new.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // old), 1, 1)[:, :channels] * (old / channels)


class Backbone(nn.Module):
    """A stack of `depth` blocks, `dim` wide, over a `grid` (rows, columns) of patches of `patch` x `patch` pixels.

    ``num_prefix`` tokens (1 with a class token, else 0) come before the patch tokens; ``num_frozen`` leading blocks are
    not trained. ``image_size`` is in pixels, one side or (height, width); raises ValueError when a side is no multiple
    of `patch`.
    """

    num_prefix: int
    num_frozen = 0
    blocks: nn.ModuleList
    norm: nn.Module
    fc_norm: nn.Module

    def __init__(self, patch: int, dim: int, depth: int, image_size: int | tuple[int, int], channels: int, pool: str):
        super().__init__()
        self.patch, self.dim, self.depth, self.channels, self.pool = patch, dim, depth, channels, pool
        self.image_size, self.grid = sides(image_size), grid_of(image_size, patch)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def grid_of(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """(rows, columns) of patches of a batch, which may be of another size than the model's."""
        return int(images.shape[2]) // self.patch, int(images.shape[3]) // self.patch  # tensors in torch.jit.trace

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose output, or the mean of it over patches, is the feature vector: of a ViT `fc_norm` where the
        patches are averaged first, else `norm`.
        """
        return self.norm if isinstance(self.fc_norm, nn.Identity) else self.fc_norm

    def train_last(self, num_blocks: float) -> None:
        """Partial fine-tuning (He et al. 2022, figure 9): train only the last `num_blocks` blocks and the last norm.

        0.5 trains the second branch (norm and MLP) of the last block only, 0 the last norm alone. Sets `num_frozen`.
        Raises ValueError when the model has fewer blocks.
        """
        if num_blocks != 0.5 and num_blocks not in range(self.depth + 1):
            raise ValueError(
                f"model.train_blocks={num_blocks:g}: must be 0.5 or a whole number from 0 to the model's {self.depth}"
            )
        self.requires_grad_(False)
        self.num_frozen = self.depth - math.ceil(num_blocks)
        last = self.blocks[self.num_frozen :]
        branches = list(self.blocks[-1].children())[2:] if num_blocks == 0.5 else last
        for part in (*branches, self.norm, self.fc_norm):
            part.requires_grad_(True)

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        encoder_mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Prefix and patch tokens before the first block, (b, num_prefix + patches, dim). Arguments as in `encode`."""
        raise NotImplementedError

    def decoder_block(self, dim: int, num_heads: int) -> Block:
        """A block of this backbone's type, `dim` wide, for a decoder over its grid; a Mixer ignores `num_heads`."""
        raise NotImplementedError

    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        scale: Float[Tensor, "depth two b"] | None = None,
        encoder_mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Prefix and patch tokens after the last norm, (b, num_prefix + patches, dim).

        ``visible`` lists the patches of each sample that are encoded (None: all). The others are left out or, with
        `encoder_mask_token`, replaced by that token. ``scale`` holds the branch factors of `layers.Block` per block.
        """
        x = self.embed(images, visible, encoder_mask_token)
        positions = visible if encoder_mask_token is None else None
        for number, block in enumerate(self.blocks):
            x = block(x, None if scale is None else scale[number], positions)
        return self.norm(x)

    def layers(self, images: Float[Tensor, "b c h w"], numbers: Collection[int]) -> list[Float[Tensor, "b n d"]]:
        """Prefix and patch tokens after each of the blocks `numbers` (1 for the first), in ascending order.

        The last block's tokens go through the backbone's norm, as in `encode`. Other blocks have no trained norm: their
        tokens go through a LayerNorm without affine parameters, so that all have one scale.
        """
        x, found = self.embed(images), []
        for number, block in enumerate(self.blocks[: max(numbers)], 1):
            x = block(x)
            if number in numbers:
                found.append(self.norm(x) if number == self.depth else F.layer_norm(x, (self.dim,), eps=EPS))
        return found

    def read(self, tokens: Float[Tensor, "b n d"], block: int, kind: str) -> Float[Tensor, "b ... d"]:
        """Features of an image out of its `tokens` after a block, which `layers` gives. ``kind``: "cls" is the class
        token, "mean" the mean of the patch tokens, "patches" are these themselves, and "tokens" all. Those of the last
        block go through the norm of the backbone's own pooling.
        """
        last_norm = self.fc_norm if block == self.depth else nn.Identity()
        if kind == "cls":
            return last_norm(tokens[:, 0])
        patches = tokens if kind == "tokens" else tokens[:, self.num_prefix :]
        return last_norm(patches.mean(1) if kind == "mean" else patches)

    def forward(
        self, images: Float[Tensor, "b c h w"], scale: Float[Tensor, "depth two b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """One feature vector per image: the class token, or the mean of the patch tokens (``pool="avg"``)."""
        tokens = self.encode(images, scale=scale)
        return self.fc_norm(tokens[:, self.num_prefix :].mean(1) if self.pool == "avg" else tokens[:, 0])

    def _patches(
        self, images: Tensor, visible: Tensor | None, encoder_mask_token: Tensor | None, embed: nn.Module
    ) -> Float[Tensor, "b n d"]:
        patches = patchify(images, self.patch)
        if visible is None:
            return embed(patches)
        tokens = embed(take(patches, visible))
        if encoder_mask_token is None:
            return tokens
        grid = encoder_mask_token.to(tokens.dtype).expand(images.shape[0], self.num_patches, -1)
        return grid.scatter(1, repeat(visible, "b k -> b k d", d=self.dim), tokens)
