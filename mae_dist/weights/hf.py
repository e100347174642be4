"""Folders of Hugging Face's transformers: config.json, model.safetensors, preprocessor_config.json.

The package transformers is not imported. Read: ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification.
Written: the first for a run with a decoder, the last for a fine-tuned one, ViTModel otherwise. Attention is three
matrices there. Names are those that transformers 4 and 5 save and load; version 5 has other names in memory and has
saved decoders under a third name, and both are read too.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mae_dist.models.layers import EPS
from mae_dist.weights import card, files
from mae_dist.weights.checks import checked
from mae_dist.weights.identify import HALF, IMAGENET, Decoded, Model
from mae_dist.weights.names import convert_name, join_attention, name_table, split_attention

STATISTICS = {"vit_mae": IMAGENET, "vit": HALF}
"""model_type -> default mean and std of its image processor."""
SETTINGS: dict[str, tuple[str, Any]] = {
    "num_heads": ("num_attention_heads", 12), "decoder_heads": ("decoder_num_attention_heads", None),
    "norm_pix": ("norm_pix_loss", False), "mask_ratio": ("mask_ratio", None), "image_size": ("image_size", None),
}  # fmt: skip
"""mae_dist's name of a value -> (its name in config.json, its default)."""
PROCESSOR = "preprocessor_config.json"
SUFFIXES = ()
TABLE = name_table(
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
REVERSE_TABLE = {other: own for own, other in TABLE.items()}
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


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have names of transformers."""
    return any("embeddings.patch_embeddings." in name for name in tensors)


def decode_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of transformers, in any of its spellings, to mae_dist's names; unknown names are kept."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, saved in OTHER_SPELLINGS:
            name = re.sub(pattern, saved, name)
        converted = convert_name(name, REVERSE_TABLE, ".")
        renamed[".".join(filter(None, converted)) if converted else name] = tensor
    return join_attention(renamed)


def decode(tensors: dict[str, Tensor], config: dict[str, Any], processor: dict[str, Any], origin: str) -> Decoded:
    """Convert a model of transformers to mae_dist's names. ValueError if `config` asks for what no block here computes.

    ``config``, ``processor``: content of config.json and preprocessor_config.json.
    """
    for key, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(key, needed) != needed:
            raise ValueError(f"{origin}: config.json has {key}={config[key]}, and models here have {needed}")
    eps = checked("eps", config.get("layer_norm_eps", 1e-12), f"{origin}: config.json: layer_norm_eps")
    assumed = () if eps == EPS else (f"layer norms with epsilon {EPS:g}, as in the papers (config.json has {eps:g})",)
    metadata = {own: (f"config.json: {name}", config.get(name, usual)) for own, (name, usual) in SETTINGS.items()}
    metadata |= {name: (f"{PROCESSOR}: image_{name}", processor.get(f"image_{name}")) for name in ("mean", "std")}
    return Decoded("hf", origin, decode_tensors(tensors), STATISTICS[config["model_type"]], metadata, assumed)


def encode(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a model to (transformers' tensors, sentences on what is left out). ValueError if it has no such model."""
    if not model.is_vit:
        raise ValueError("--to hf: transformers has no Mixer; try --to timm, npz or safetensors")
    if model.pool == "avg":
        raise ValueError("--to hf: its ViT uses the class token, but this run has model.pool=avg; try --to timm or fb")
    kept, left_out = model.portable(decoder=True)
    if len({*model.image_size}) > 1:
        left_out.append("the crop to the shape of the input: transformers' processor squeezes the whole image to it")
    elif model.crop_elsewhere:
        left_out.append(model.crop_elsewhere)
    renamed = {}
    for name, tensor in split_attention(kept).items():
        converted = convert_name(name, TABLE, ".")
        assert converted is not None, name
        renamed[".".join(filter(None, converted))] = tensor
    if architecture(renamed) == "ViTModel":
        renamed = {name.removeprefix("vit."): tensor for name, tensor in renamed.items()}
    return renamed, left_out


def architecture(tensors: dict[str, Tensor]) -> str:
    """Return the name of the transformers class that has these tensors."""
    if "decoder.mask_token" in tensors:
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if "classifier.bias" in tensors else "ViTModel"


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """Write the folder: config.json, model.safetensors, preprocessor_config.json, the model card."""
    sizes, config, kind = model.sizes, model.config, architecture(tensors)
    settings: dict[str, Any] = {
        "architectures": [kind], "model_type": "vit", "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["depth"], "num_attention_heads": sizes["num_heads"],
        "intermediate_size": 4 * sizes["dim"], "hidden_act": "gelu", "layer_norm_eps": EPS, "qkv_bias": True,
        "image_size": config.model.image_size, "patch_size": sizes["patch"], "num_channels": config.data.channels,
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
        names = model.labels
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt", files.DIGEST: files.digest(tensors)})
    for name, content in (("config.json", settings), (PROCESSOR, processor(model))):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    (path / card.NAME).write_text(card.card(model, "transformers", usage(model, Path("FOLDER"))), encoding="utf-8")


def processor(model: Model) -> dict[str, Any]:
    """What transformers' image processor does to an image: the test crop of this model. A rectangle has no such crop
    there, so that the whole image is squeezed to it.
    """
    data, (height, width) = model.config.data, model.image_size
    size = {"height": height, "width": width}
    square = {
        "image_processor_type": "BitImageProcessor", "do_center_crop": True, "crop_size": size,
        "size": {"shortest_edge": model.resized_side},
    }  # fmt: skip
    resize = square if height == width else {"image_processor_type": "ViTImageProcessor", "size": size}
    return resize | {
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(data.mean), "image_std": list(data.std), "do_convert_rgb": data.channels == 3,
    }  # fmt: skip


def usage(model: Model, path: Path) -> str:
    """Return the Python expression that loads the folder at `path` with transformers."""
    kind = architecture(encode(model)[0])
    return f"transformers.{kind}.from_pretrained('{path}'{', add_pooling_layer=False' * (kind == 'ViTModel')})"
