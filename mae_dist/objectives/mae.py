"""Masked autoencoding of a ViT or a Mixer (He et al. 2022, section 3): encode part of an image, predict the rest.

Hidden patches are left out of the encoder (``hidden="drop"``) or replaced by a learned token (``"token"``: SimMIM, Xie
et al. 2022). The decoder has blocks of the backbone's type over visible and predicted patches (``decoder="full"``), or
predicted patches attend to visible ones only (``"cross"``: CrossMAE, Fu et al. 2024). Its last block computes only what
the loss needs, except for ``"token"`` with ``"full"``, which decodes all patches, as in SimMIM. Names in the state dict
are the official code's.
"""

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist.batch import Batch
from mae_dist.config import check_mae
from mae_dist.models.backbone import Backbone, patchify, take, unpatchify
from mae_dist.models.layers import EPS, CrossBlock, sincos_positions, single
from mae_dist.models.vit import fixed_positions
from mae_dist.objectives import Objective, Output, masks
from mae_dist.objectives.masks import Mask
from mae_dist.patch_counts import patch_counts
from mae_dist.schema import MaeConfig


def normalise_patches(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Normalise each patch to zero mean and unit (unbiased) variance over its pixels (He et al. 2022, section 3)."""
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


class MAE(Objective):
    """A backbone, a light decoder and a pixel loss; ``seed`` decides the initialisation and the masks.

    Raises ValueError for settings that are impossible, alone or with this backbone.
    """

    def __init__(self, backbone: Backbone, settings: MaeConfig, seed: int):
        check_mae(settings)
        super().__init__(backbone, seed)
        self.settings, dim, self.draw_masks = settings, settings.decoder_dim, masks.draw
        patch_counts(settings, backbone.grid)  # raises for what is impossible
        whole, cross = settings.hidden == "token", settings.decoder == "cross"
        if whole:  # the encoder's mask token; its name is in checkpoints, and seeds its initial value
            self.stand_in = nn.Parameter(torch.zeros(1, 1, backbone.dim))
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
        """Initial values that are not drawn: the decoder's position embedding (zeros for a class token, sin-cos)."""
        dim, backbone = self.settings.decoder_dim, self.backbone
        grid = sincos_positions(dim, *backbone.grid)
        return {"decoder_pos_embed": torch.cat([torch.zeros(backbone.num_prefix, dim), grid])[None]}

    def compile_draws(self) -> None:
        """Compile the draw of masks: the same bits in 2 to 12 kernels and its sorts instead of 107 to 257 kernels."""
        self.draw_masks = torch.compile(masks.draw)

    def mask(self, batch: Batch) -> Mask:
        """The masks of a batch, a pure function of (seed, epochs, ids)."""
        grid = self.backbone.grid_of(batch.images)
        num_visible = patch_counts(self.settings, grid).visible
        return self.draw_masks(self.settings.masking, self.seed, batch.epochs, batch.ids, grid, num_visible)

    def predicted(self, mask: Mask) -> Int[Tensor, "b p"]:
        """Positions of the masked patches that are predicted: all, or a random share `mae.predict` of them."""
        return mask.masked[:, : round(int(mask.masked.shape[1]) * self.settings.predict)]

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """The decoder's position embedding of a grid, computed for another than the backbone's."""
        if grid == self.backbone.grid:
            return self.decoder_pos_embed
        return fixed_positions(self.settings.decoder_dim, grid, self.decoder_pos_embed.device)

    def forward(self, batch: Batch) -> Output:
        """Each sample's mean squared error over its predicted patches, and the predictions (b, predicted, ppc)."""
        mask = self.mask(batch)
        prediction = single(self.predict(batch.images, mask))
        return Output(self.errors(batch, mask, prediction).mean((1, 2)), prediction)

    def errors(
        self, batch: Batch, mask: Mask, prediction: Float[Tensor, "b p ppc"]
    ) -> Float[Tensor, "b p ppc"]:  # fmt: skip
        """The squared error of each number of the predicted patches."""
        target = take(patchify(batch.images, self.backbone.patch), self.predicted(mask))
        if self.settings.norm_pix:
            target = normalise_patches(target)
        return F.mse_loss(prediction, target, reduction="none")

    def predict(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b p ppc"]:
        """Predicted pixels of the patches that `predicted` lists, normalised if `mae.norm_pix`."""
        encoder_mask_token = self.stand_in if self.settings.hidden == "token" else None
        latent = self.backbone.encode(images, mask.visible, encoder_mask_token=encoder_mask_token)
        predict_idx, table = self.predicted(mask), self.positions(self.backbone.grid_of(images))
        if self.settings.decoder == "cross":
            x = self._decode_cross(latent, predict_idx, table)
        elif encoder_mask_token is not None:
            x = self._decode_simmim(latent, predict_idx, table)
        else:
            x = self._decode_full(latent, mask.visible, predict_idx, table)
        return self.decoder_pred(self.decoder_norm(x))

    def _decode_cross(
        self, latent: Float[Tensor, "b n d"], predict_idx: Int[Tensor, "b p"], table: Float[Tensor, "1 m dd"]
    ) -> Float[Tensor, "b p dd"]:
        x = self.mask_token + F.embedding(predict_idx, table[0, self.backbone.num_prefix :])
        for block in self.decoder_blocks:
            x = block(x, latent)
        return x

    def _decode_simmim(
        self, latent: Float[Tensor, "b n d"], predict_idx: Int[Tensor, "b p"], table: Float[Tensor, "1 n dd"]
    ) -> Float[Tensor, "b p dd"]:
        x = self.decoder_embed(latent) + table
        for block in self.decoder_blocks:
            x = block(x)
        return take(x[:, self.backbone.num_prefix :], predict_idx)

    def _decode_full(
        self, latent: Float[Tensor, "b n d"], visible: Int[Tensor, "b v"], predict_idx: Int[Tensor, "b p"],
        table: Float[Tensor, "1 m dd"],
    ) -> Float[Tensor, "b p dd"]:  # fmt: skip
        positions, prefix = torch.cat([visible, predict_idx], 1), self.backbone.num_prefix
        places = F.pad(positions + prefix, (prefix, 0))  # a class token is at place 0
        queries = self.mask_token.expand(*predict_idx.shape, -1)
        x = torch.cat([self.decoder_embed(latent), queries], 1) + F.embedding(places, table[0])
        for block in self.decoder_blocks[:-1]:
            x = block(x, None, positions)
        return self.decoder_blocks[-1](x, None, positions, predict_idx.shape[1])

    @torch.no_grad()
    def pictures(self, batch: Batch, prediction: Float[Tensor, "b p ppc"]) -> list[Float[Tensor, "b c h w"]]:
        """[originals, masked, reconstructed] for a figure, each (b, c, h, w) and normalised like the batch.

        Hidden patches are 0 (the mean colour) in the masked images, and in the reconstructed ones where they were not
        predicted. With `norm_pix`, predictions are scaled back with the true mean and variance of each patch, which the
        model does not know: the structure in a patch is predicted, its brightness and contrast are not.
        """
        mask, patches = self.mask(batch), patchify(batch.images, self.backbone.patch)
        predict_idx = self.predicted(mask)
        if self.settings.norm_pix:
            true = take(patches, predict_idx)
            prediction = prediction * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        hidden = patches.scatter(1, repeat(mask.masked, "b m -> b m d", d=patches.shape[2]), 0.0)
        filled = hidden.scatter(
            1, repeat(predict_idx, "b p -> b p d", d=patches.shape[2]), prediction.to(patches.dtype)
        )
        rows = self.backbone.grid_of(batch.images)[0]
        return [batch.images] + [unpatchify(p, self.backbone.patch, rows) for p in (hidden, filled)]
