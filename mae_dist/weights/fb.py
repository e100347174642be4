"""Checkpoints of the official MAE code (github.com/facebookresearch/mae): {"model": state dict, "args": ...}, .pth.

Its names are ours: the backbone's are timm's, the decoder's stand beside them; fine-tuned ones have fc_norm and head.
The released files say nothing of normalisation or norm_pix; `args` of a training run says norm_pix_loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dist.weights import timm
from mae_dist.weights.identify import IMAGENET, Found, Model


def looks_like(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bool:
    """A decoder, or the key "model", which timm's own training does not write."""
    return facts.get("key") == "model" or any(name.startswith("decoder_") for name in tensors)


ARGUMENTS = {
    "mean": "mean", "std": "std", "decoder_heads": "decoder_num_heads", "norm_pix": "norm_pix_loss",
    "mask_ratio": "mask_ratio",
}  # fmt: skip
"""Our word -> theirs."""
WRAPPED = ": taken for the official MAE code's file since its weights lie below the key model, timm's have 0.5"
"""Names of an encoder alone are timm's too."""


def found(tensors: dict[str, Tensor], facts: dict[str, Any], _: str) -> Found:
    """Theirs in our words. All the paper's decoders are 512 wide and have 16 heads."""
    said = timm.arguments(facts, ARGUMENTS)
    if "decoder_embed.weight" in tensors and tensors["decoder_embed.weight"].shape[:1] == (512,):
        said = {"decoder_heads": ("the paper", 16)} | {name: pair for name, pair in said.items() if pair[1] is not None}
    told = any(name.startswith("decoder_") for name in tensors)
    return Found("fb", timm.ours(tensors), IMAGENET, said, why_usual="" if told else WRAPPED)


def theirs(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """(Their state dict, what is left out). ValueError for a Mixer."""
    if not model.is_vit:
        raise ValueError("--to fb: the official MAE code has no Mixer; try --to timm, npz or safetensors")
    kept, left_out = model.portable(decoder=True)
    return {name.removeprefix("backbone."): tensor for name, tensor in kept.items()}, left_out


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """`args` is a plain dict, since torch.load no longer takes an argparse.Namespace from strangers."""
    config = model.config
    args: dict[str, Any] = {"input_size": config.model.image_size, "mean": config.data.mean, "std": config.data.std}
    if "decoder_pred.weight" in tensors:
        args |= {"norm_pix_loss": config.mae.norm_pix, "mask_ratio": config.mae.mask_ratio}
        args |= {"decoder_num_heads": config.mae.decoder_heads}
    torch.save({"model": tensors, "args": args}, path)


SUFFIXES = (".pth",)


def usage(model: Model, path: Path) -> str:
    """What to type over there."""
    sizes, config = model.sizes, model.config.model
    words = [f"img_size={config.image_size}", f"patch_size={sizes['patch']}", f"embed_dim={sizes['dim']}"]
    words += [f"depth={sizes['depth']}", f"num_heads={sizes['num_heads']}"]
    if "decoder_pred.weight" in theirs(model)[0]:
        mae = model.config.mae
        words += [f"decoder_embed_dim={mae.decoder_dim}", f"decoder_depth={mae.decoder_depth}"]
        words += [f"decoder_num_heads={mae.decoder_heads}", f"norm_pix_loss={mae.norm_pix}"]
        kind = "models_mae.MaskedAutoencoderViT"
    else:
        words += [f"num_classes={model.num_classes}", f"global_pool={model.pool == 'avg'}", "qkv_bias=True"]
        kind = "models_vit.VisionTransformer"
    made = f"{kind}({', '.join(words)}, mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6))"
    return f"{made}.load_state_dict(torch.load('{path}', weights_only=True)['model'])"
