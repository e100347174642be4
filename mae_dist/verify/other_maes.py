"""Other people's masked autoencoders, to measure against: transformers' ViTMAE, and timm's blocks put together plainly.

Both compute what the paper's code computes: all patches are embedded and then shuffled, and every block of the decoder
and the prediction cover all patches. They draw their masks from torch's global generator.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from mae_dist.model_sizes import sides, size_of
from mae_dist.models.backbone import patchify, take
from mae_dist.models.layers import EPS
from mae_dist.models.vit import class_and_grid
from mae_dist.objectives.mae import normalise_patches
from mae_dist.schema import MaeConfig


class TimmMAE(nn.Module):
    """A ViT of timm's blocks under MAE (He et al. 2022), as one would write it without this package."""

    def __init__(self, size: dict[str, Any], image_size: tuple[int, int], channels: int, mae: MaeConfig):
        from timm.layers import PatchEmbed  # pyright: ignore[reportMissingImports]
        from timm.models.vision_transformer import Block

        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        block = partial(Block, mlp_ratio=4, qkv_bias=True, norm_layer=norm)
        dim, width, self.patch, self.mae = size["dim"], mae.decoder_dim, size["patch"], mae
        grid = (image_size[0] // self.patch, image_size[1] // self.patch)
        self.patch_embed = PatchEmbed(image_size, self.patch, channels, dim)  # pyright: ignore[reportArgumentType]
        self.cls_token, self.mask_token = (nn.Parameter(0.02 * torch.randn(1, 1, d)) for d in (dim, width))
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(class_and_grid(d, grid), False) for d in (dim, width))
        self.blocks = nn.Sequential(*(block(dim, size["num_heads"]) for _ in range(size["depth"])))
        self.norm, self.decoder_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.decoder_embed = nn.Linear(dim, width)
        self.decoder_blocks = nn.Sequential(*(block(width, mae.decoder_heads) for _ in range(mae.decoder_depth)))
        self.decoder_pred = nn.Linear(width, self.patch**2 * channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """The loss: the mean squared error over the hidden patches."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        places, num_visible = order.argsort(1), int(x.shape[1] * (1 - self.mae.mask_ratio))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = self.norm(self.blocks(torch.cat([cls, take(x, order[:, :num_visible])], 1)))
        cls, x = self.decoder_embed(x).split([1, num_visible], 1)
        hidden = repeat(self.mask_token.to(x.dtype), "1 1 d -> b n d", b=len(x), n=order.shape[1] - num_visible)
        x = torch.cat([cls, take(torch.cat([x, hidden], 1), places)], 1) + self.decoder_pos_embed
        prediction = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = patchify(images, self.patch)
        if self.mae.norm_pix:
            target = normalise_patches(target)
        mask = (places >= num_visible).float()
        return ((prediction - target).square().mean(2) * mask).sum() / mask.sum()


def transformers_mae(size: dict[str, Any], image_size: tuple[int, int], channels: int, mae: MaeConfig) -> nn.Module:
    """transformers' ViTMAEForPreTraining of these sizes, with torch's attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config: Any = ViTMAEConfig
    settings = config(
        hidden_size=size["dim"], num_hidden_layers=size["depth"], num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["dim"], image_size=image_size[0], patch_size=size["patch"], num_channels=channels,
        mask_ratio=mae.mask_ratio, norm_pix_loss=mae.norm_pix, decoder_num_attention_heads=mae.decoder_heads,
        decoder_hidden_size=mae.decoder_dim, decoder_num_hidden_layers=mae.decoder_depth,
        decoder_intermediate_size=4 * mae.decoder_dim, layer_norm_eps=EPS, attn_implementation="sdpa",
    )  # fmt: skip
    return ViTMAEForPreTraining(settings)


def others(settings: Any) -> Iterator[tuple[str, nn.Module, Callable[[Tensor], Tensor]]]:
    """(Name, module, its loss of images) of each that has the sizes of a run's model; none where it computes something
    else than these do. transformers is left out where it is not installed, and where images are no squares.
    """
    model, mae, (height, width) = settings.model, settings.mae, sides(settings.model.image_size)
    if not model.name.startswith("vit_") or (mae.hidden, mae.decoder, mae.predict) != ("drop", "full", 1.0):
        return
    sizes = size_of(model.name), (height, width), settings.data.channels or 3, mae
    timm_mae = TimmMAE(*sizes)
    yield "timm's blocks", timm_mae, timm_mae
    if height == width:
        try:
            theirs: Any = transformers_mae(*sizes)
        except ImportError:
            return
        yield "transformers' ViTMAE", theirs, lambda images: theirs(images).loss
