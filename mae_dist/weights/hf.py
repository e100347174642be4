"""Folders of Hugging Face's transformers: config.json, model.safetensors, preprocessor_config.json; no import of them.

In: ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification. Out: the first for a run with a decoder, the
last for a fine-tuned one, ViTModel else. Attention is three matrices there. Names are those that transformers 4 and 5
save and load; 5 calls modules otherwise in memory and has saved decoders under a third name, which are read too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mae_dist.models.layers import EPS
from mae_dist.weights.checks import checked
from mae_dist.weights.identify import HALF, IMAGENET, Found, Model
from mae_dist.weights.names import dictionary, join_attention, lookup, split_attention

KINDS = {"vit_mae": IMAGENET, "vit": HALF}
"""model_type -> the statistics of its image processor unless it says otherwise."""
SETTINGS: dict[str, tuple[str, Any]] = {
    "num_heads": ("num_attention_heads", 12), "decoder_heads": ("decoder_num_attention_heads", None),
    "norm_pix": ("norm_pix_loss", False), "mask_ratio": ("mask_ratio", None),
}  # fmt: skip
"""Our word -> (theirs, what it is unless config.json says otherwise)."""
PROCESSOR = "preprocessor_config.json"
SUFFIXES = ()
TABLE = dictionary(
    {
        "backbone.cls_token": "vit.embeddings.cls_token",
        "backbone.pos_embed": "vit.embeddings.position_embeddings",
        "backbone.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "backbone.norm": "vit.layernorm",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_embed": "decoder.decoder_embed",
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
        "head": "classifier",
    },
    {"backbone.blocks.{}.": "vit.encoder.layer.{}.", "decoder_blocks.{}.": "decoder.decoder_layers.{}."},
    {
        "norm1": "layernorm_before",
        "attn.q": "attention.attention.query",
        "attn.k": "attention.attention.key",
        "attn.v": "attention.attention.value",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
)
BACK = {theirs: ours for ours, theirs in TABLE.items()}
OTHER_SPELLINGS = (
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^(vit\.)?layers\.", "encoder.layer."),
    (r"^(vit\.)?(embeddings|encoder|layernorm)\.", r"vit.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def looks_like(tensors: dict[str, Tensor]) -> bool:
    """Whether these are transformers' names."""
    return any("embeddings.patch_embeddings." in name for name in tensors)


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs, in any spelling, in our names; what has none keeps its own."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, saved in OTHER_SPELLINGS:
            name = re.sub(pattern, saved, name)
        found = lookup(name, BACK, ".")
        renamed[".".join(filter(None, found)) if found else name] = tensor
    return join_attention(renamed)


def found(tensors: dict[str, Tensor], config: dict[str, Any], processor: dict[str, Any], origin: str) -> Found:
    """Theirs in our words. ValueError for a config of what our blocks do not compute."""
    for key, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(key, needed) != needed:
            raise ValueError(f"{origin}: config.json has {key}={config[key]}, and models here have {needed}")
    eps = checked("eps", config.get("layer_norm_eps", 1e-12), f"{origin}: config.json: layer_norm_eps")
    other = f"layer norms with epsilon {EPS:g}, the papers' (config.json says {eps:g})"
    said = {ours: (f"config.json: {name}", config.get(name, usual)) for ours, (name, usual) in SETTINGS.items()}
    said |= {name: (f"{PROCESSOR}: image_{name}", processor.get(f"image_{name}")) for name in ("mean", "std")}
    return Found("hf", ours(tensors), KINDS[config["model_type"]], said, () if eps == EPS else (other,))


def theirs(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """(Their tensors, what is left out). ValueError for a model that transformers has not."""
    if not model.is_vit:
        raise ValueError("--to hf: transformers has no Mixer; try --to timm, npz or safetensors")
    if model.pool == "avg":
        raise ValueError("--to hf: its ViT gives the class token, and this run has model.pool=avg; try --to timm or fb")
    kept, left_out = model.portable(decoder=True)
    renamed = {}
    for name, tensor in split_attention(kept).items():
        new = lookup(name, TABLE, ".")
        assert new is not None, name
        renamed[".".join(filter(None, new))] = tensor
    if architecture(renamed) == "ViTModel":
        renamed = {name.removeprefix("vit."): tensor for name, tensor in renamed.items()}
    return renamed, left_out


def architecture(tensors: dict[str, Tensor]) -> str:
    """The class that has these tensors."""
    if "decoder.mask_token" in tensors:
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if "classifier.bias" in tensors else "ViTModel"


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """The folder."""
    sizes, config, kind = model.sizes, model.config, architecture(tensors)
    settings: dict[str, Any] = {
        "architectures": [kind], "model_type": "vit", "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["depth"], "num_attention_heads": sizes["num_heads"],
        "intermediate_size": 4 * sizes["dim"], "hidden_act": "gelu", "layer_norm_eps": EPS, "qkv_bias": True,
        "image_size": config.model.image_size, "patch_size": sizes["patch"], "num_channels": 3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dtype": "float32",
    }  # fmt: skip
    if kind == "ViTMAEForPreTraining":
        mae = config.mae
        settings |= {
            "model_type": "vit_mae", "decoder_hidden_size": mae.decoder_dim, "mask_ratio": mae.mask_ratio,
            "decoder_num_hidden_layers": mae.decoder_depth, "decoder_num_attention_heads": mae.decoder_heads,
            "decoder_intermediate_size": 4 * mae.decoder_dim, "norm_pix_loss": mae.norm_pix,
        }  # fmt: skip
    if model.num_classes:
        names = [f"LABEL_{number}" for number in range(model.num_classes)]
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    side = config.model.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(config.data.mean), "image_std": list(config.data.std),
    }  # fmt: skip
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", settings), (PROCESSOR, processor)):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")


def usage(model: Model, path: Path) -> str:
    """What to type over there."""
    kind = architecture(theirs(model)[0])
    return f"transformers.{kind}.from_pretrained('{path}'{', add_pooling_layer=False' * (kind == 'ViTModel')})"
