"""Masked autoencoding of a ViT (He et al. 2022, section 3): hide patches, encode the rest, predict the hidden pixels.

Masks are drawn per sample on the device from (seed, epoch, id), as two index lists; a boolean mask, whose meaning
must be remembered, exists nowhere. Decoder names in the state dict are the official code's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist import rng
from mae_dist.batch import Batch
from mae_dist.models.layers import EPS, Block
from mae_dist.models.vit import ViT, class_and_grid, patchify, take, unpatchify
from mae_dist.objectives import Objective, Output


class Mask(NamedTuple):
    """Each sample's patches in two lists of positions that together hold every patch once."""

    visible: Int[Tensor, "b v"]
    masked: Int[Tensor, "b m"]


def random_mask(
    seed: int, epochs: Int[Tensor, " b"], ids: Int[Tensor, " b"], num_patches: int, num_visible: int
) -> Mask:
    """Per-sample random masking: patches sorted by random bits, ties by position, the first `num_visible` are visible.

    Integers only, so every device gives the same lists.
    """
    words = rng.bits(seed, rng.Purpose.MASK, epochs, ids, num_patches)
    order = torch.argsort(words, dim=1, stable=True)
    return Mask(order[:, :num_visible], order[:, num_visible:])


def normalise_patches(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """`norm_pix`: each patch to zero mean and unit (unbiased) variance over its pixels (He et al. 2022, section 3)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


class MAE(Objective):
    """Backbone, light decoder, pixel loss. ``mask_ratio``: share of hidden patches; ``seed``: of the masks."""

    def __init__(
        self, backbone: ViT, *, mask_ratio: float, norm_pix: bool, decoder_dim: int, decoder_depth: int,
        decoder_heads: int, seed: int,
    ):  # fmt: skip
        super().__init__(backbone, seed)
        self.norm_pix, self.decoder_dim = norm_pix, decoder_dim
        self.num_visible = int(backbone.num_patches * (1 - mask_ratio))
        if not 0 < self.num_visible < backbone.num_patches:
            raise ValueError(
                f"mae.mask_ratio={mask_ratio}: of {backbone.num_patches} patches some must be hidden and some visible"
            )
        self.decoder_embed = nn.Linear(backbone.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + backbone.num_patches, decoder_dim), False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_dim, backbone.patch**2 * backbone.channels)
        self.initialise_rest()

    def fixed(self) -> dict[str, Tensor]:
        """The decoder's positions, which are not trained."""
        return {"decoder_pos_embed": class_and_grid(self.decoder_dim, self.backbone.grid)}

    def mask(self, batch: Batch) -> Mask:
        """The masks of a batch, a function of its epochs and ids."""
        return random_mask(self.seed, batch.epochs, batch.ids, self.backbone.num_patches, self.num_visible)

    def forward(self, batch: Batch) -> Output:
        """Loss of each sample: mean squared error over its masked patches; predictions (b, masked, pixels)."""
        mask = self.mask(batch)
        prediction = self.predict(batch.images, mask).float()
        target = take(patchify(batch.images, self.backbone.patch), mask.masked)
        if self.norm_pix:
            target = normalise_patches(target)
        return Output((prediction - target).square().mean((1, 2)), prediction)

    def predict(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m ppc"]:
        """Pixels of the masked patches, in the order of `mask.masked`."""
        latent = self.decoder_embed(self.backbone.encode(images, mask.visible))
        cls, visible = latent[:, :1], latent[:, 1:]
        grid = self.mask_token.to(latent.dtype).expand(len(images), self.backbone.num_patches, -1)
        grid = grid.scatter(1, repeat(mask.visible, "b v -> b v d", d=grid.shape[2]), visible)
        x = torch.cat([cls, grid], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(take(x[:, 1:], mask.masked)))

    @torch.no_grad()
    def pictures(self, batch: Batch, prediction: Float[Tensor, "b m ppc"]) -> list[Float[Tensor, "b c h w"]]:
        """[original, what the encoder saw, what the decoder made of it], normalised like the batch.

        Hidden patches are 0 (the mean colour) in the second. With `norm_pix` predictions are scaled back with the true
        statistics of each patch, which the model does not know: structure is the model's, brightness is not.
        """
        mask, patches = self.mask(batch), patchify(batch.images, self.backbone.patch)
        where = repeat(mask.masked, "b m -> b m d", d=patches.shape[2])
        if self.norm_pix:
            true = take(patches, mask.masked)
            prediction = prediction * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        hidden = patches.scatter(1, where, torch.zeros_like(prediction))
        filled = patches.scatter(1, where, prediction.to(patches.dtype))
        return [batch.images] + [unpatchify(p, self.backbone.patch, self.backbone.grid) for p in (hidden, filled)]
