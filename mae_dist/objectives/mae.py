"""Masked autoencoding of a ViT or a Mixer (He et al. 2022, section 3): hide a part, encode the rest, predict it.

What is hidden is absent from the encoder (``hidden="drop"``), or a learned token is in its place ("token": SimMIM, Xie
et al. 2022). The decoder is of the backbone's own kind over visible and predicted patches ("full"), or predicted
patches look at visible ones only ("cross"); its last block computes nothing that the loss does not need, except after
"token" with "full", where all patches are in it, as in SimMIM. Names in the state dict are the official code's.
"""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.batch import Batch
from mae_dist.config import check_mae
from mae_dist.models.backbone import Backbone, patchify, take, unpatchify
from mae_dist.models.layers import EPS, CrossBlock, sincos_positions, single
from mae_dist.objectives import Objective, Output, masks
from mae_dist.objectives.masks import Mask
from mae_dist.schema import MaeConfig


def normalise_patches(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """`norm_pix`: each patch to zero mean and unit (unbiased) variance over its pixels (He et al. 2022, section 3)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


class MAE(Objective):
    """Backbone, light decoder, pixel loss; ``seed`` decides initialisation and masks.

    Raises ValueError for settings that are impossible or go with no such backbone.
    """

    def __init__(self, backbone: Backbone, settings: MaeConfig, seed: int):
        check_mae(settings)
        super().__init__(backbone, seed)
        self.settings, dim = settings, settings.decoder_dim
        self.num_visible = masks.num_visible(settings.masking, backbone.grid, settings.mask_ratio)
        self.num_predicted = round((backbone.num_patches - self.num_visible) * settings.predict)
        whole, cross = settings.hidden == "token", settings.decoder == "cross"
        if not self.num_predicted:
            raise ValueError(f"mae.predict={settings.predict}: leaves no patch to predict")
        if settings.decoder_depth == 0 and (cross or not whole):
            raise ValueError("mae.decoder_depth=0: only mae.hidden=token with mae.decoder=full needs no block")
        if whole and not cross and settings.predict < 1:
            raise ValueError(f"mae.predict={settings.predict}: mae.hidden=token has all patches in its decoder already")
        if whole:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, backbone.dim))
        if cross:
            blocks = [CrossBlock(dim, backbone.dim, settings.decoder_heads) for _ in range(settings.decoder_depth)]
        else:
            self.decoder_embed = nn.Linear(backbone.dim, dim)
            blocks = [backbone.decoder_block(dim, settings.decoder_heads) for _ in range(settings.decoder_depth)]
        if cross or not whole:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        num_positions = backbone.num_prefix + backbone.num_patches
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim), False)
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(dim, eps=EPS)
        self.decoder_pred = nn.Linear(dim, backbone.patch**2 * backbone.channels)
        self.initialise_rest()

    def fixed(self) -> dict[str, Tensor]:
        """The decoder's positions, which are not trained: 0 for a prefix, then the grid."""
        dim, backbone = self.settings.decoder_dim, self.backbone
        grid = sincos_positions(dim, *backbone.grid)
        return {"decoder_pos_embed": torch.cat([torch.zeros(backbone.num_prefix, dim), grid])[None]}

    def mask(self, batch: Batch) -> Mask:
        """The masks of a batch, a function of its epochs and ids."""
        grid = self.backbone.grid
        return masks.draw(self.settings.masking, self.seed, batch.epochs, batch.ids, grid, self.num_visible)

    def predicted(self, mask: Mask) -> Int[Tensor, "b p"]:
        """The masked patches that are decoded: all, or a random `predict` of them."""
        return mask.masked[:, : self.num_predicted]

    def forward(self, batch: Batch) -> Output:
        """Loss of each sample: mean squared error over its predicted patches; predictions (b, predicted, pixels)."""
        mask = self.mask(batch)
        prediction = single(self.predict(batch.images, mask))
        target = take(patchify(batch.images, self.backbone.patch), self.predicted(mask))
        if self.settings.norm_pix:
            target = normalise_patches(target)
        return Output((prediction - target).square().mean((1, 2)), prediction)

    def predict(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b p ppc"]:
        """Pixels of the patches that `predicted` lists."""
        encoder_mask_token = self.encoder_mask_token if self.settings.hidden == "token" else None
        latent, wanted = (
            self.backbone.encode(images, mask.visible, encoder_mask_token=encoder_mask_token),
            self.predicted(mask),
        )
        if self.settings.decoder == "cross":
            x = self._across(latent, wanted)
        elif encoder_mask_token is not None:
            x = self._whole(latent, wanted)
        else:
            x = self._full(latent, mask.visible, wanted)
        return self.decoder_pred(self.decoder_norm(x))

    def _positions(self, index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        positions = self.decoder_pos_embed[:, self.backbone.num_prefix :]
        return take(positions.expand(len(index), -1, -1), index)

    def _asked(self, latent: Tensor, wanted: Int[Tensor, "b p"]) -> Float[Tensor, "b p d"]:
        return self.mask_token.to(latent.dtype) + self._positions(wanted)

    def _across(self, latent: Float[Tensor, "b n d"], wanted: Int[Tensor, "b p"]) -> Float[Tensor, "b p dd"]:
        x = self._asked(latent, wanted)
        for block in self.decoder_blocks:
            x = block(x, latent)
        return x

    def _whole(self, latent: Float[Tensor, "b n d"], wanted: Int[Tensor, "b p"]) -> Float[Tensor, "b p dd"]:
        x = self.decoder_embed(latent) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return take(x[:, self.backbone.num_prefix :], wanted)

    def _full(
        self, latent: Float[Tensor, "b n d"], visible: Int[Tensor, "b v"], wanted: Int[Tensor, "b p"]
    ) -> Float[Tensor, "b p dd"]:
        latent, prefix = self.decoder_embed(latent), self.backbone.num_prefix
        seen = latent[:, prefix:] + self._positions(visible)
        first = latent[:, :prefix] + self.decoder_pos_embed[:, :prefix]
        x = torch.cat([first, seen, self._asked(latent, wanted)], 1)
        present = torch.cat([visible, wanted], 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x, None, present)
        return self.decoder_blocks[-1](x, None, present, wanted.shape[1])

    @torch.no_grad()
    def pictures(self, batch: Batch, prediction: Float[Tensor, "b p ppc"]) -> list[Float[Tensor, "b c h w"]]:
        """[original, what the encoder saw, what the decoder made of it], normalised like the batch.

        Hidden patches are 0 (the mean colour) in the second, and in the third where they were not predicted. With
        `norm_pix` predictions are scaled back with the true statistics of each patch, which the model does not know:
        structure is the model's, brightness is not.
        """
        mask, patches = self.mask(batch), patchify(batch.images, self.backbone.patch)
        wanted = self.predicted(mask)
        if self.settings.norm_pix:
            true = take(patches, wanted)
            prediction = prediction * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        hidden = patches.scatter(1, repeat(mask.masked, "b m -> b m d", d=patches.shape[2]), 0.0)
        filled = hidden.scatter(1, repeat(wanted, "b p -> b p d", d=patches.shape[2]), prediction.to(patches.dtype))
        return [batch.images] + [unpatchify(p, self.backbone.patch, self.backbone.grid[0]) for p in (hidden, filled)]
