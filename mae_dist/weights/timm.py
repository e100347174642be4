"""State dicts of timm's VisionTransformer and MlpMixer, .pth or .safetensors. Their names are our backbones' names.

`timm.create_model(..., checkpoint_path=...)` loads what is written here with strict=True. Mean and std are kept in
`pretrained_cfg`, as timm calls it: in safetensors' metadata, beside the state dict, or in a hub folder's config.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae_dist.weights import files
from mae_dist.weights.checks import brief
from mae_dist.weights.identify import HALF, Found, Model

SIZES = {"ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
"""Our word for a size -> timm's."""
PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}
"""Patch sizes that timm has a ViT of at 224 px; others are asked for with patch_size=."""
MIXERS = ("s16", "s32", "b16", "b32", "l16", "l32")
"""Sizes of timm's Mixers; their patches cannot be changed."""
SUFFIXES = (".pth", ".safetensors")


def unwrap(content: Any, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(State dict, facts beside it) of what torch.save wrote: bare, or below a key; averaged weights first, as timm.

    ValueError when there are no tensors.
    """
    facts: dict[str, Any] = {}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            facts = {name: value for name, value in content.items() if name != key} | {"key": key}
            content = content[key]
            break
    state = content if isinstance(content, dict) else {}
    tensors = {str(name).removeprefix("module."): t for name, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise ValueError(f"{origin}: holds no state dict, neither bare nor below the key model or state_dict")
    for name, t in tensors.items():
        if t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_complex():
            raise ValueError(f"{origin}: {name} is sparse, quantised, complex or empty; ask for a file of plain floats")
    return tensors, facts


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs, or the official MAE code's, in our names."""
    outside = ("decoder_", "mask_token", "head.")
    return {n if n.startswith(outside) else f"backbone.{n}": t for n, t in tensors.items()}


def arguments(facts: dict[str, Any], names: dict[str, str]) -> dict[str, tuple[str, Any]]:
    """What a training's arguments, where they are kept, say of our `names` -> theirs (see `Found.said`)."""
    args = facts.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    return {ours: (f"args.{theirs}", args.get(theirs)) for ours, theirs in names.items()}


def found(tensors: dict[str, Tensor], facts: dict[str, Any], origin: str) -> Found:
    """Theirs in our words; statistics from pretrained_cfg, or from the arguments of timm's training.

    Raises ValueError for a pretrained_cfg without fields.
    """
    cfg = facts.get("pretrained_cfg")
    if isinstance(cfg, str):
        cfg = files.json_object(cfg, f"{origin}: pretrained_cfg")
    if not isinstance(cfg, dict | None):
        raise ValueError(f"{origin}: pretrained_cfg={brief(cfg)}: must be an object with mean and std, or left out")
    said = arguments(facts, {"mean": "mean", "std": "std"})
    said |= {name: (f"pretrained_cfg.{name}", cfg[name]) for name in said if cfg and cfg.get(name) is not None}
    return Found("timm", ours(tensors), HALF, said)


def theirs(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """(Their state dict, what is left out)."""
    kept, left_out = model.portable(decoder=False)
    return {name.removeprefix("backbone."): tensor for name, tensor in kept.items()}, left_out


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """The state dict, with name, mean and std beside it."""
    data, name = model.config.data, architecture(model)[0]
    cfg = {"mean": list(data.mean), "std": list(data.std)}
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt", "architecture": name, "pretrained_cfg": json.dumps(cfg)})
    else:
        torch.save({"state_dict": tensors, "arch": name, "pretrained_cfg": cfg}, path)


def architecture(model: Model) -> tuple[str, dict[str, Any]]:
    """(Name of timm's model, or of the class where no name takes such sizes, and what has to be said besides)."""
    sizes, image_size = model.sizes, model.config.model.image_size
    kind, _, named = model.config.model.name.partition("_")
    words: dict[str, Any] = {} if image_size == 224 else {"img_size": image_size}
    if kind == "mixer":
        words["num_classes"] = model.num_classes
        if named in MIXERS:
            return f"mixer_{named}_224", words
        return "MlpMixer", words | {
            "patch_size": sizes["patch"], "embed_dim": sizes["dim"], "num_blocks": sizes["depth"]
        }  # fmt: skip
    size = SIZES.get(named.rstrip("0123456789"))
    there = PATCHES[size or "tiny"]
    nearest = next((patch for patch in (sizes["patch"], 16) if patch in there), there[0])
    if nearest != sizes["patch"]:
        words["patch_size"] = sizes["patch"]
    if size is None:
        words |= {"embed_dim": sizes["dim"], "depth": sizes["depth"], "num_heads": sizes["num_heads"]}
    if model.pool == "avg":
        words["global_pool"] = "avg"
    return f"vit_{size or 'tiny'}_patch{nearest}_224", words | {"num_classes": model.num_classes}


def usage(model: Model, path: Path) -> str:
    """What to type over there."""
    name, words = architecture(model)
    listed = ", ".join(f"{key}={value!r}" for key, value in words.items())
    if name == "MlpMixer":
        return f"model = timm.models.MlpMixer({listed}); timm.models.load_checkpoint(model, '{path}')"
    return f"timm.create_model('{name}', {listed}, checkpoint_path='{path}')"
