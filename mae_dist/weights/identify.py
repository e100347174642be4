"""What a checkpoint of any house is in our words, and which of our models it is."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae_dist import models, schema
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.models.vit import class_and_grid
from mae_dist.weights.checks import Channels, checked

IMAGENET: tuple[Channels, Channels] = (IMAGENET_MEAN, IMAGENET_STD)
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMS = ("backbone.norm.", "backbone.fc_norm.")
NDIM = {
    "backbone.patch_embed.proj.weight": 4, "backbone.stem.proj.weight": 4, "backbone.pos_embed": 3,
    "backbone.blocks.0.mlp_tokens.fc1.weight": 2, "decoder_embed.weight": 2, "head.bias": 1,
}  # fmt: skip
"""Dimensions of the tensors that tell what a model is."""
FOREIGN = {"reg_token": "registers", "register_tokens": "registers", "ls1.gamma": "LayerScale"}
"""Tensor -> the part of a ViT that it belongs to, and that ours do not have."""
SPARE = ("head", "pre_logits", "pooler")
"""What stands behind the features and may be left out."""


@dataclass(frozen=True)
class Found:
    """A file's tensors in our names, and what it says of itself.

    ``usual`` are the image statistics of that house; ``said``: our word -> (field of the file, unchecked value, None
    being nothing), see `said.RULES`; ``assumed`` sentences of what its settings mean here; ``why_usual``: how the house
    was told, where that is a guess.
    """

    house: str
    state: dict[str, Tensor]
    usual: tuple[Channels, Channels]
    said: dict[str, tuple[str, Any]]
    assumed: tuple[str, ...] = ()
    why_usual: str = ""

    def says(self, name: str, origin: str) -> Any:
        """What it says of `name`, or None. ValueError, naming file and field, where it is not what it must be."""
        field, value = self.said.get(name, ("", None))
        hint = f"; --{name.replace('_', '-')} overrules it" if name in Given.__dataclass_fields__ else ""
        return None if value is None else checked(name, value, f"{origin}: {field}", hint)


@dataclass(frozen=True)
class Given:
    """What the user says of a file; it overrules the file."""

    norm_pix: bool | None = None
    mean: Channels | None = None
    std: Channels | None = None
    decoder_heads: int | None = None

    def refuse_decoder(self, origin: str) -> None:
        """What is said of a decoder is refused where there is none (ValueError)."""
        if self.norm_pix is not None or self.decoder_heads is not None:
            raise ValueError(f"{origin}: has no decoder; leave out --norm-pix, --no-norm-pix and --decoder-heads")


@dataclass(frozen=True)
class Model:
    """A trained model: the verb that makes such, its settings, and its tensors as a checkpoint has them below `model.`.

    ``step`` and ``data_fingerprint`` are those of the run it comes from.
    """

    verb: str
    config: Any
    state: dict[str, Tensor]
    step: int = 0
    data_fingerprint: str = "imported"

    @property
    def is_vit(self) -> bool:
        return "backbone.pos_embed" in self.state

    @property
    def pool(self) -> str:
        return self.config.model.pool or ("cls" if self.is_vit else "avg")

    @property
    def sizes(self) -> dict[str, int]:
        """patch, dim, depth, and num_heads or token_hidden and channel_hidden, from the table of names."""
        named = models.BACKBONES[self.config.model.name].keywords
        return {key: value for key, value in named.items() if key != "image_size"}

    @property
    def has_decoder(self) -> bool:
        return "decoder_pred.weight" in self.state

    @property
    def num_classes(self) -> int:
        """Outputs of a linear head that stands directly on the features; 0: there is none."""
        return len(self.state["head.bias"]) if "head.bias" in self.state and self.verb != "probe" else 0

    def portable(self, decoder: bool) -> tuple[dict[str, Tensor], list[str]]:
        """(The tensors that other houses have a place for, sentences of what is left out.)

        ``decoder``: whether the house has a place for a decoder.
        """
        absent = NORMS[self.pool == "cls"] if self.is_vit else NORMS[1]
        kept = {n: t for n, t in self.state.items() if n.startswith("backbone.") and not n.startswith(absent)}
        left_out = []
        if self.num_classes:
            kept |= {n: t for n, t in self.state.items() if n.startswith("head.")}
        elif "head.bias" in self.state:
            left_out.append("the probe's head, since a batch norm stands before it")
        if self.has_decoder:
            reason = self._only_ours() if decoder else "this format has no decoder"
            if reason is None:
                kept |= {n: t for n, t in self.state.items() if n.startswith(("decoder_", "mask_token"))}
            else:
                left_out.append(f"the decoder ({reason}; --to safetensors keeps it)")
        return kept, left_out

    def _only_ours(self) -> str | None:
        """Why no other house's MAE can hold this decoder; None where it can."""
        mae = self.config.mae
        if not self.is_vit:
            return "other houses have none for a Mixer"
        if mae.decoder == "cross":
            return "mae.decoder=cross, which other houses do not have"
        if mae.hidden == "token":
            return "mae.hidden=token, which other houses do not have"
        return "model.pool=avg: it reads tokens without the last norm" if self.pool == "avg" else None


@dataclass(frozen=True)
class Reading:
    """A model and how it was read: sentences of what the file says, what had to be assumed, what was left out."""

    house: str
    model: Model
    found: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def identify(what: Found, origin: str, given: Given) -> Reading:
    """Which of our models this is. ``config.out`` stays to be filled in.

    Raises ValueError, one sentence that begins with `origin`, when it is none of them.
    """
    state = {name: tensor.float() for name, tensor in what.state.items()}
    assumed, left_out = list(what.assumed), []
    if kinds := sorted({str(t.dtype).removeprefix("torch.") for t in what.state.values()} - {"float32"}):
        assumed.append(f"weights as float32 (the file has {', '.join(kinds)})")
    has_decoder = any(name.startswith("decoder_") for name in state)
    if not has_decoder:
        given.refuse_decoder(origin)
    for name, ndim in NDIM.items():
        if name in state and state[name].ndim != ndim:
            shape = tuple(state[name].shape)
            raise ValueError(f"{origin}: {name.removeprefix('backbone.')} is {shape}, and must be {ndim}-dimensional")
    name, image_size = architecture(state, what.says("num_heads", origin), origin)
    state, dropped = without_spare(state, has_decoder)
    if dropped:
        left_out.append(f"{', '.join(dropped)} (backbones here end with the features)")
    vit = "backbone.pos_embed" in state
    pool, position = None, None
    if vit:
        pool = "avg" if any(n.startswith(NORMS[1]) for n in state) else "cls"
        position = "sincos" if is_sincos(state["backbone.pos_embed"]) else "learned"
    model = schema.ModelConfig(name=name, image_size=image_size, pool=pool, position=position)
    data, said, guessed = statistics(what, given, origin)
    found = [f"{name} at {image_size} px" + (f", pool={pool}, {position} positions" if vit else ""), *said]
    assumed += guessed
    steps = schema.TrainConfig(steps=0)
    if "head.bias" in state:
        found.append(
            f"a head of {len(state['head.bias'])} classes (export keeps it; init_from= starts from the backbone)"
        )
        config: Any = schema.FinetuneConfig(data=data, model=model, train=steps, init_from=origin)
        return Reading(what.house, Model("finetune", config, state), found, assumed, left_out)
    mae = schema.MaeConfig()
    if has_decoder:
        mae, said, guessed = decoder(what, state, given, origin)
        found, assumed = found + said, assumed + guessed
    else:
        left_out.append("no decoder in the file: the run is a start for others, and predicts no pixels")
    config = schema.PretrainConfig(data=data, model=model, mae=mae, train=steps)
    return Reading(what.house, Model("pretrain", config, state), found, assumed, left_out)


def architecture(state: dict[str, Tensor], num_heads: int | None, origin: str) -> tuple[str, int]:
    """(name in models.BACKBONES, image size in pixels). ValueError when there is none."""
    family = {f"backbone.{stem}.proj.weight": kind for stem, kind in (("patch_embed", "vit"), ("stem", "mixer"))}
    there = [name for name in family if name in state]
    if not there:
        raise ValueError(f"{origin}: holds neither a ViT (patch_embed.proj.weight) nor a Mixer (stem.proj.weight)")
    kind, (dim, channels, patch, width) = family[there[0]], state[there[0]].shape
    if kind == "vit" and "backbone.cls_token" not in state:
        raise ValueError(f"{origin}: a ViT without class token (cls_token), and ViTs here need one; try another model")
    depth = num_blocks("backbone.blocks", state)
    if kind == "vit":
        refuse_foreign_parts(state, origin)
    names = [
        name
        for name, make in models.BACKBONES.items()
        if name.startswith(kind) and [make.keywords[key] for key in ("dim", "depth", "patch")] == [dim, depth, patch]
        if num_heads in (None, make.keywords.get("num_heads"))
    ]
    if not names or channels != 3 or patch != width:
        heads = f", {num_heads} heads" if num_heads else ""
        sizes = f"width {dim}, {depth} blocks{heads}, patches of {patch} x {width} pixels, {channels} channels"
        raise ValueError(f"{origin}: no model here is a {kind} of {sizes}; `mae-dist models` lists what there is")
    positions = "backbone.pos_embed" if kind == "vit" else "backbone.blocks.0.mlp_tokens.fc1.weight"
    if positions not in state:
        raise ValueError(f"{origin}: lacks {positions.removeprefix('backbone.')}, which tells the size of its images")
    num = state[positions].shape[1] - (kind == "vit")
    side = math.isqrt(max(num, 0))
    if side * side != num or not num:
        if kind == "vit" and num > 0 and (grid := math.isqrt(num + 1)) ** 2 == num + 1:
            raise ValueError(
                f"{origin}: a ViT without position for its class token (no_embed_class: pos_embed has {num + 1} for "
                f"{grid} x {grid} patches), and ViTs here have one; try another model"
            )
        which = f"{num} positions beside the class token's" if kind == "vit" else f"{num} positions"
        raise ValueError(f"{origin}: {which} make no square, so the size of its images cannot be told")
    return names[0], side * patch


def refuse_foreign_parts(state: dict[str, Tensor], origin: str) -> None:
    """Parts of other ViTs (DeiT III, DINOv2) are refused by what they are called (ValueError)."""
    parts = [f"{what} ({part})" for part, what in FOREIGN.items() if any(name.endswith(f".{part}") for name in state)]
    if parts:
        raise ValueError(f"{origin}: a ViT with {' and '.join(parts)}, which ViTs here do not have; try another model")


def num_blocks(stack: str, state: dict[str, Tensor]) -> int:
    """One more than the highest number of a block. What has no number is no block, and is refused as unknown later."""
    numbers = (re.match(rf"{re.escape(stack)}\.([0-9]{{1,3}})\.", name) for name in state)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def without_spare(state: dict[str, Tensor], has_decoder: bool) -> tuple[dict[str, Tensor], list[str]]:
    """(The state without what stands behind the features, except for a plain head; the names that went.)"""
    names = {name: name.removeprefix("backbone.") for name in state}
    plain = {"head.weight", "head.bias"} <= names.keys() and not has_decoder
    plain &= not any(name.startswith("pre_logits") for name in names.values())
    spare = {
        name for name, bare in names.items()
        if (bare.startswith(SPARE) and not (plain and name in ("head.weight", "head.bias")))
        or (bare == "mask_token" and not has_decoder)
    }  # fmt: skip
    return {n: t for n, t in state.items() if n not in spare}, sorted(names[n] for n in spare)


def is_sincos(positions: Tensor) -> bool:
    """Whether position embeddings (1, 1 + n, dim) are the fixed ones, up to rounding."""
    side, dim = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    return dim % 4 == 0 and torch.allclose(positions, class_and_grid(dim, (side, side)), rtol=0, atol=1e-5)


def statistics(what: Found, given: Given, origin: str) -> tuple[schema.DataConfig, list[str], list[str]]:
    """(data section, what the file says, what is assumed) of mean and std."""
    found, assumed, values = [], [], {}
    for name, usual in zip(("mean", "std"), what.usual, strict=True):
        told = getattr(given, name)
        said = None if told else what.says(name, origin)
        values[name] = told or said or usual
        if told or said:
            found.append(f"data.{name} {shown(values[name])}{' (given)' * bool(told)}")
        else:
            assumed.append(f"data.{name} {shown(usual)}, as usual there{what.why_usual} (--{name} says otherwise)")
    return schema.DataConfig(path="(imported)", **values), found, assumed


def decoder(
    what: Found, state: dict[str, Tensor], given: Given, origin: str
) -> tuple[schema.MaeConfig, list[str], list[str]]:
    """(mae section, what the file says, what is assumed) of a decoder."""
    found, assumed = [], []
    if "decoder_embed.weight" not in state:
        raise ValueError(f"{origin}: has a decoder, but lacks its decoder_embed.weight")
    dim = len(state["decoder_embed.weight"])
    depth = num_blocks("decoder_blocks", state)
    heads = given.decoder_heads or what.says("decoder_heads", origin)
    if heads is None:
        heads = 16 if dim == 512 else max(1, dim // 32)
        assumed.append(f"mae.decoder_heads={heads}, 32 numbers a head as in the paper (--decoder-heads says otherwise)")
    if dim % heads or dim % 4:
        raise ValueError(f"{origin}: a decoder {dim} wide has no {heads} heads; give --decoder-heads")
    norm_pix = given.norm_pix
    if norm_pix is not None:
        found.append(f"mae.norm_pix={str(norm_pix).lower()} (given)")
    elif (norm_pix := what.says("norm_pix", origin)) is None:
        norm_pix = True
        assumed.append("mae.norm_pix=true, which the file does not say (--no-norm-pix says otherwise)")
    else:
        found.append(f"mae.norm_pix={str(norm_pix).lower()}")
    mae = schema.MaeConfig(norm_pix=norm_pix, decoder_dim=dim, decoder_depth=depth, decoder_heads=heads)
    if (mask_ratio := what.says("mask_ratio", origin)) is not None:
        mae = dataclasses.replace(mae, mask_ratio=mask_ratio)
    return mae, [f"a decoder {dim} wide of {depth} blocks", *found], assumed


def shown(values: Channels) -> str:
    """Three numbers as a command line has them."""
    return " ".join(f"{value:g}" for value in values)
