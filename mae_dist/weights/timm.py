"""State dicts of timm's VisionTransformer and MlpMixer, .pth or .safetensors. mae_dist's backbones use their names.

`timm.create_model(..., checkpoint_path=...)` loads files written here with strict=True. Mean and std are in timm's
`pretrained_cfg`: in safetensors' metadata, beside the state dict, or in a hub folder's config.json.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae_dist import small_files
from mae_dist.weights import card, files
from mae_dist.weights.checks import brief
from mae_dist.weights.identify import HALF, Decoded, Model
from mae_dist.weights.names import join_attention

SIZES = {"ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
"""Size in a name of mae_dist -> size in a name of timm."""
PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}
"""Patch sizes of timm's named ViTs at 224 px; another size needs patch_size=."""
MIXERS = ("s16", "s32", "b16", "b32", "l16", "l32")
"""Sizes of timm's named Mixers, whose patch size is fixed."""
SUFFIXES = (".pth", ".safetensors", "")


def decode_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of timm or of the official MAE code to mae_dist's names; `q`, `k` and `v` (or `q_proj`, ...)
    become one matrix.
    """
    outside = ("decoder_", "mask_token", "head.")
    own = {n if n.startswith(outside) else f"backbone.{n}": t for n, t in tensors.items()}
    return join_attention({re.sub(r"\.attn\.([qkv])_proj\.", r".attn.\1.", name): t for name, t in own.items()})


def training_arguments(extras: dict[str, Any], names: dict[str, str]) -> dict[str, tuple[str, Any]]:
    """Look up the arguments of a training that a file keeps as "args", for `Decoded.metadata`.

    ``names``: mae_dist's name of a value -> its name in args.
    """
    args = extras.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    return {own: (f"args.{name}", args.get(name)) for own, name in names.items()}


def decode(tensors: dict[str, Tensor], extras: dict[str, Any], origin: str) -> Decoded:
    """Convert a timm state dict to mae_dist's names; size and crop are those of pretrained_cfg, mean and std too,
    else of args.

    Raises ValueError if pretrained_cfg is not an object.
    """
    cfg = extras.get("pretrained_cfg")
    if isinstance(cfg, str):
        cfg = small_files.parse_json(cfg, f"{origin}: pretrained_cfg")
    if not isinstance(cfg, dict | None):
        raise ValueError(f"{origin}: pretrained_cfg={brief(cfg)}: must be an object with mean and std, or left out")
    metadata = training_arguments(extras, {"mean": "mean", "std": "std"})
    metadata |= {name: (f"pretrained_cfg.{name}", cfg[name]) for name in metadata if cfg and cfg.get(name) is not None}
    size = (cfg or {}).get("input_size")  # channels, height, width
    metadata["image_size"] = ("pretrained_cfg.input_size", size[1:] if isinstance(size, list | tuple) else size)
    metadata["test_crop"] = ("pretrained_cfg.crop_pct", (cfg or {}).get("crop_pct"))
    return Decoded("timm", origin, decode_tensors(tensors), HALF, metadata)


def encode(model: Model, decoder: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a model to (timm's state dict, sentences on what is left out); `decoder` keeps MAE's decoder of RGB."""
    kept, left_out = model.portable(decoder, only_rgb=True)
    left_out += [model.crop_elsewhere] if model.crop_elsewhere and not decoder else []
    return {name.removeprefix("backbone."): tensor for name, tensor in kept.items()}, left_out


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """Write the state dict, with the name of the architecture and how its images are made beside it; as a path without
    suffix the folder of a hub. Raises ValueError for a Mixer in a folder, if timm has no named model of its sizes.
    """
    name, options = architecture(model)
    cfg = {key: list(value) if isinstance(value, tuple) else value for key, value in images(model).items()}
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", "architecture": name, "pretrained_cfg": json.dumps(cfg)}
        save_file(tensors, path, metadata | {files.DIGEST: files.digest(tensors)})
    elif path.suffix:
        torch.save({"state_dict": tensors, "arch": name, "pretrained_cfg": cfg}, path)
    else:
        if name == "MlpMixer":
            raise ValueError(
                "--to timm: no named model of timm has these sizes; try --out FILE.pth instead of a folder"
            )
        config = {"architecture": name, "num_classes": options.pop("num_classes"), "num_features": model.sizes["dim"]}
        config |= {"pretrained_cfg": cfg, "model_args": options}
        config |= {"label_names": model.labels} if model.num_classes else {}
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt", files.DIGEST: files.digest(tensors)})
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (path / card.NAME).write_text(card.card(model, "timm", usage(model, Path("FOLDER"))), encoding="utf-8")


def images(model: Model) -> dict[str, Any]:
    """How a model's images are made, as timm's pretrained_cfg: size, crop, resizing, mean and std."""
    data, side, resized = model.config.data, min(model.image_size), model.resized_side
    share = side / resized if math.floor(side / (side / resized)) == resized else math.nextafter(side / resized, 0)
    return {
        "input_size": (data.channels, *model.image_size), "fixed_input_size": True,
        "crop_pct": share, "crop_mode": "center", "interpolation": "bicubic",
        "mean": tuple(data.mean), "std": tuple(data.std),
    }  # fmt: skip


def architecture(model: Model) -> tuple[str, dict[str, Any]]:
    """Return (timm's model, or its class if no named model takes such sizes; the arguments that it needs)."""
    sizes, image_size = model.sizes, model.config.model.image_size
    kind, _, named = model.config.model.name.partition("_")
    options: dict[str, Any] = {} if image_size == 224 else {"img_size": image_size}
    options |= {} if model.config.data.channels == 3 else {"in_chans": model.config.data.channels}
    if kind == "mixer":
        options["num_classes"] = model.num_classes
        if named in MIXERS:
            return f"mixer_{named}_224", options
        return "MlpMixer", options | {
            "patch_size": sizes["patch"], "embed_dim": sizes["dim"], "num_blocks": sizes["depth"]
        }  # fmt: skip
    size = SIZES.get(named.rstrip("0123456789"))
    patches = PATCHES[size or "tiny"]
    nearest = next((patch for patch in (sizes["patch"], 16) if patch in patches), patches[0])
    if nearest != sizes["patch"]:
        options["patch_size"] = sizes["patch"]
    if size is None:
        options |= {"embed_dim": sizes["dim"], "depth": sizes["depth"], "num_heads": sizes["num_heads"]}
    if model.pool == "avg":
        options["global_pool"] = "avg"
    return f"vit_{size or 'tiny'}_patch{nearest}_224", options | {"num_classes": model.num_classes}


def usage(model: Model, path: Path) -> str:
    """Return the Python line that loads the file or folder at `path` with timm, and how its images are made."""
    name, options = architecture(model)
    listed = ", ".join(f"{key}={value!r}" for key, value in options.items())
    if name == "MlpMixer":
        loading = f"timm.models.load_checkpoint(model, '{path}')"
        return f"model = timm.models.MlpMixer({listed}); {loading}; model.pretrained_cfg = {images(model)!r}"
    if not path.suffix:
        return f"timm.create_model('local-dir:{path}', pretrained=True)"
    return f"timm.create_model('{name}', {listed}, checkpoint_path='{path}', pretrained_cfg_overlay={images(model)!r})"
