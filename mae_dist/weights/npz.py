"""Arrays of Flax models: google-research/vision_transformer's ViT and Mixer, .npz, as timm reads them too.

Kernels are transposed there, (in, out); attention has a kernel (width, heads, width of a head) for each of query, key
and value. Names of big_vision, which numbers modules differently, are read too. The format has no place for image
statistics, which are 0.5 there, nor for fc_norm. Flax's GELU is the tanh approximation; timm's and mae_dist's is exact.
"""

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from mae_dist.weights.identify import HALF, Decoded, Model
from mae_dist.weights.names import convert_name, join_attention, name_table, split_attention

SUFFIXES = (".npz",)
ATTENTION = "MultiHeadDotProductAttention_1/"
TABLE = name_table(
    {
        "backbone.cls_token": "cls",
        "backbone.pos_embed": "Transformer/posembed_input/pos_embedding",
        "backbone.patch_embed.proj": "embedding",
        "backbone.norm": "Transformer/encoder_norm",
        "head": "head",
    },
    {"backbone.blocks.{}.": "Transformer/encoderblock_{}/"},
    {
        "norm1": "LayerNorm_0",
        "attn.q": f"{ATTENTION}query",
        "attn.k": f"{ATTENTION}key",
        "attn.v": f"{ATTENTION}value",
        "attn.proj": f"{ATTENTION}out",
        "norm2": "LayerNorm_2",
        "mlp.fc1": "MlpBlock_3/Dense_0",
        "mlp.fc2": "MlpBlock_3/Dense_1",
    },
)
MIXER_TABLE = name_table(
    {"backbone.stem.proj": "stem", "backbone.norm": "pre_head_layer_norm", "head": "head"},
    {"backbone.blocks.{}.": "MixerBlock_{}/"},
    {
        "norm1": "LayerNorm_0",
        "mlp_tokens.fc1": "token_mixing/Dense_0",
        "mlp_tokens.fc2": "token_mixing/Dense_1",
        "norm2": "LayerNorm_1",
        "mlp_channels.fc1": "channel_mixing/Dense_0",
        "mlp_channels.fc2": "channel_mixing/Dense_1",
    },
)
OTHER_SPELLINGS = (
    (r"^(opt/target/|params/img/|params/)", ""),
    (r"^pos_embedding$", "Transformer/posembed_input/pos_embedding"),
    (r"/MultiHeadDotProductAttention_0/", f"/{ATTENTION}"),
    (r"/MlpBlock_0/", "/MlpBlock_3/"),
)


def decode_tensors(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert Flax arrays to mae_dist's names and shapes; arrays with unknown names keep both."""
    if any(name.startswith("opt/target/") for name in arrays):  # a whole training state, with the optimizer's moments
        arrays = {name: array for name, array in arrays.items() if name.startswith("opt/target/")}
    renamed = {}
    for name, array in arrays.items():
        for pattern, released in OTHER_SPELLINGS:
            name = re.sub(pattern, released, name)
        renamed[name] = array
    nested = not any(name.endswith("/LayerNorm_2/scale") for name in renamed)  # big_vision
    mixer = "stem/kernel" in renamed
    reverse_table = {other: own for own, other in (MIXER_TABLE if mixer else TABLE).items()}
    state = {}
    for name, array in renamed.items():
        if nested and not mixer:
            name = re.sub(r"(encoderblock_\d+)/LayerNorm_1/", r"\1/LayerNorm_2/", name)
        module, leaf = convert_name(name, reverse_table, "/") or (name.replace("/", "."), "")
        if not leaf:
            state[module] = array
        elif leaf == "kernel":
            state[f"{module}.weight"] = weight(array, module)
        else:
            state[f"{module}.{leaf.replace('scale', 'weight')}"] = array.flatten()
    return join_attention(state)


def weight(kernel: Tensor, module: str) -> Tensor:
    """Convert a Flax kernel to the PyTorch weight of `module` (a name of mae_dist)."""
    if kernel.ndim == 4:  # (height, width, in, out)
        return kernel.permute(3, 2, 0, 1).contiguous()
    if kernel.ndim == 3:  # (heads, head, out) of the projection, (in, heads, head) of the others
        kernel = kernel.flatten(0, 1) if module.endswith(".proj") else kernel.flatten(1)
    return kernel.T.contiguous() if kernel.ndim == 2 else kernel


def kernel(weight: Tensor, module: str, num_heads: int) -> Tensor:
    """Convert the PyTorch weight of `module` (a name of mae_dist) to a Flax kernel."""
    if weight.ndim == 4:
        return weight.permute(2, 3, 1, 0)
    if module.endswith(".attn.proj"):
        return weight.T.unflatten(0, (num_heads, -1))
    return weight.T.unflatten(1, (num_heads, -1)) if ".attn." in module else weight.T


def decode(arrays: dict[str, Tensor], origin: str) -> Decoded:
    """Convert Flax arrays to mae_dist's names; the number of heads is in the shape of a query kernel."""
    heads = next((a.shape[1] for n, a in arrays.items() if n.endswith("/query/kernel") and a.ndim == 3), None)
    return Decoded("npz", origin, decode_tensors(arrays), HALF, {"num_heads": ("query/kernel", heads)})


def encode(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a model to (Flax arrays, sentences on what is left out). ValueError for a ViT with mean pooling."""
    if model.is_vit and model.pool == "avg":
        raise ValueError("--to npz: has no fc_norm, but this run has model.pool=avg; try --to timm, fb or safetensors")
    if model.config.data.channels not in (1, 3):
        raise ValueError("--to npz: timm reads these files for 1 or 3 channels only; try --to timm or safetensors")
    kept, left_out = model.portable(decoder=False)
    table, num_heads = (TABLE if model.is_vit else MIXER_TABLE), model.sizes.get("num_heads", 1)
    arrays = {}
    for name, tensor in split_attention(kept).items():
        converted = convert_name(name, table, ".")
        assert converted is not None, name
        module, leaf = converted
        if not leaf:
            arrays[module] = tensor
        elif leaf == "weight" and tensor.ndim > 1:
            arrays[f"{module}/kernel"] = kernel(tensor, name.removesuffix(".weight"), num_heads).contiguous()
        elif leaf == "weight":
            arrays[f"{module}/scale"] = tensor
        else:
            split = module.endswith(("/query", "/key", "/value"))
            arrays[f"{module}/bias"] = tensor.unflatten(0, (num_heads, -1)) if split else tensor
    data = model.config.data
    if {*data.mean, *data.std} != {0.5}:
        left_out.append(f"data.mean {list(data.mean)} and data.std {list(data.std)}, which you must pass on yourself")
    return arrays, left_out


def write(tensors: dict[str, Tensor], _: Model, path: Path) -> None:
    """Write the .npz archive."""
    with path.open("wb") as stream:
        np.savez(stream, **{name: tensor.numpy() for name, tensor in tensors.items()})  # pyright: ignore


def usage(model: Model, path: Path) -> str:
    """Return the Python line that loads the file at `path`: timm's for a ViT, vision_transformer's for a Mixer."""
    if not model.is_vit:
        sizes = model.sizes
        options = f"ml_collections.ConfigDict({{'size': ({sizes['patch']}, {sizes['patch']})}}), "
        options += f"num_classes={model.num_classes}, num_blocks={sizes['depth']}, hidden_dim={sizes['dim']}, "
        options += f"tokens_mlp_dim={sizes['token_hidden']}, channels_mlp_dim={sizes['channel_hidden']}"
        params = f"{{'params': vit_jax.checkpoint.load('{path}')}}"
        return f"vit_jax.models_mixer.MlpMixer({options}).apply({params}, images, train=False)"
    from mae_dist.weights import timm

    return timm.usage(model, path)
