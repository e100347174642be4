"""Checkpoints of the official MAE code (github.com/facebookresearch/mae): {"model": state dict, "args": ...}, .pth.

Its backbone has timm's names, as mae_dist's has, and the decoder's names stand beside them; fine-tuned models have
fc_norm and head. The released files do not record image statistics or norm_pix; `args` of a training run has
norm_pix_loss.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dist.weights import timm
from mae_dist.weights.identify import IMAGENET, Decoded, Model

ARGUMENTS = {
    "mean": "mean", "std": "std", "image_size": "input_size", "decoder_heads": "decoder_num_heads",
    "norm_pix": "norm_pix_loss", "mask_ratio": "mask_ratio",
}  # fmt: skip
"""mae_dist's name of a value -> its name in `args`."""
GUESSED = ": taken for a file of the official MAE code, because its weights are under the key model; timm's have 0.5"
"""An encoder alone has the same names in both codebases."""
SUFFIXES = (".pth",)


def recognises(tensors: dict[str, Tensor], extras: dict[str, Any]) -> bool:
    """Whether a file has a decoder, or keeps its weights under the key "model", which timm's training does not use."""
    return extras.get("key") == "model" or any(name.startswith("decoder_") for name in tensors)


def decode(tensors: dict[str, Tensor], extras: dict[str, Any], origin: str) -> Decoded:
    """Convert an official MAE state dict to mae_dist's names. A decoder 512 wide has 16 heads, as all in the paper."""
    metadata = timm.training_arguments(extras, ARGUMENTS)
    embed = tensors.get("decoder_embed.weight")
    if embed is not None and embed.shape[:1] == (512,) and metadata["decoder_heads"][1] is None:
        metadata["decoder_heads"] = ("the paper", 16)
    guess = "" if any(name.startswith("decoder_") for name in tensors) else GUESSED
    return Decoded("fb", origin, timm.decode_tensors(tensors), IMAGENET, metadata, guess=guess)


def encode(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a model to (the official code's state dict, sentences on what is left out). ValueError for a Mixer."""
    if not model.is_vit:
        raise ValueError("--to fb: the official MAE code has no Mixer; try --to timm, npz or safetensors")
    return timm.encode(model, decoder=True)


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """Write the .pth file. `args` is a dict, since torch.load(weights_only=True) refuses an argparse.Namespace."""
    config = model.config
    args: dict[str, Any] = {"input_size": config.model.image_size, "mean": config.data.mean, "std": config.data.std}
    if "decoder_pred.weight" in tensors:
        args |= {"norm_pix_loss": config.mae.norm_pix, "mask_ratio": config.mae.mask_ratio}
        args |= {"decoder_num_heads": config.mae.decoder_heads}
    torch.save({"model": tensors, "args": args}, path)


def usage(model: Model, path: Path) -> str:
    """Return the Python line that loads the file at `path` with the official MAE code."""
    sizes, config = model.sizes, model.config.model
    channels = model.config.data.channels
    options = [
        f"img_size={config.image_size}",
        *([] if channels == 3 else [f"in_chans={channels}"]),
        f"patch_size={sizes['patch']}",
        f"embed_dim={sizes['dim']}",
    ]
    options += [f"depth={sizes['depth']}", f"num_heads={sizes['num_heads']}"]
    if "decoder_pred.weight" in encode(model)[0]:
        mae = model.config.mae
        options += [f"decoder_embed_dim={mae.decoder_dim}", f"decoder_depth={mae.decoder_depth}"]
        options += [f"decoder_num_heads={mae.decoder_heads}", f"norm_pix_loss={mae.norm_pix}"]
        kind = "models_mae.MaskedAutoencoderViT"
    else:
        options += [f"num_classes={model.num_classes}", f"global_pool={model.pool == 'avg'}", "qkv_bias=True"]
        kind = "models_vit.VisionTransformer"
    made = f"{kind}({', '.join(options)}, mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6))"
    return f"{made}.load_state_dict(torch.load('{path}', weights_only=True)['model'])"
