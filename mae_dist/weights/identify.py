"""Which model of mae_dist a decoded checkpoint is, and what had to be assumed to say so."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae_dist import models, schema
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.model_sizes import sides
from mae_dist.models.vit import class_and_grid
from mae_dist.weights.checks import Channels, brief, checked, format_channels, listed

Statistics = tuple[Channels, Channels]
IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMS = ("backbone.norm.", "backbone.fc_norm.")
NDIM = {
    "backbone.patch_embed.proj.weight": 4, "backbone.stem.proj.weight": 4, "backbone.pos_embed": 3,
    "backbone.blocks.0.mlp_tokens.fc1.weight": 2, "decoder_embed.weight": 2, "head.bias": 1,
}  # fmt: skip
"""Number of dimensions of the tensors from whose shapes a model is identified."""
UNSUPPORTED = {
    "reg_token": "registers", "register_tokens": "registers", "ls1.gamma": "LayerScale", "gamma_1": "LayerScale",
    "relative_position_bias_table": "relative positions", "dist_token": "a distillation token",
    "q_norm.weight": "norms of queries and keys", "q_bias": "attention without a bias of its keys",
    "norm_pre.weight": "a norm before the blocks",
}  # fmt: skip
"""Tensor -> the part of other ViTs that it belongs to, which ViTs here do not have."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = (".weight", ".bias", "_embed", "_token")
"""How the names of parameters end."""
IGNORED = ("head", "pre_logits", "pooler")
"""Modules that only read the features and may be left out."""


@dataclass(frozen=True)
class Overrides:
    """Values from the user that replace what a file records; None: not given."""

    norm_pix: bool | None = None
    mean: Channels | None = None
    std: Channels | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, int] | None = None

    def refuse_decoder(self, origin: str) -> None:
        """Raise ValueError if there are values for a decoder; called for a model that has none."""
        if self.norm_pix is not None or self.decoder_heads is not None:
            raise ValueError(f"{origin}: has no decoder; leave out --norm-pix, --no-norm-pix and --decoder-heads")


@dataclass(frozen=True)
class Decoded:
    """The tensors of a file in mae_dist's names, and what the file records of its model.

    ``usual`` are the image statistics (mean, std) that the format uses by default. ``metadata`` maps a name in
    `checks.RULES` to (field of the file, unchecked value, None if not recorded). ``assumed`` are sentences on what its
    settings mean here. ``guess`` is a clause on how the format was recognised, if that is uncertain.
    """

    format: str
    origin: str
    state: dict[str, Tensor]
    usual: Statistics
    metadata: dict[str, tuple[str, Any]]
    assumed: tuple[str, ...] = ()
    guess: str = ""

    def value(self, name: str, overrides: Overrides) -> tuple[Any, str]:
        """Return (the value of `name` or None, " (given)" if it is the user's). ValueError if the file's is invalid."""
        if (given := getattr(overrides, name, None)) is not None:
            return given, " (given)"
        field, recorded = self.metadata.get(name, ("", None))
        hint = f"; --{name.replace('_', '-')} overrides it" if hasattr(overrides, name) else ""
        return None if recorded is None else checked(name, recorded, f"{self.origin}: {field}", hint), ""


@dataclass(frozen=True)
class Notes:
    """Sentences on how a file was read: what it records, what had to be assumed, what was left out."""

    found: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def by_title(self) -> dict[str, list[str]]:
        """Return the sentences under the titles that `mae-dist import` prints."""
        return {"found": self.found, "assumed": self.assumed, "left out": self.left_out}


@dataclass(frozen=True)
class Model:
    """A trained model: the verb that trains such a model, its settings, and its tensors, named as in a checkpoint but
    without the prefix `model.`. ``step`` and ``data_fingerprint`` are those of the run that trained it; ``classes``
    are the names of its head's classes, where they are known.
    """

    verb: str
    config: Any
    state: dict[str, Tensor]
    step: int = 0
    data_fingerprint: str = schema.IMPORTED
    classes: tuple[str, ...] = ()

    @property
    def is_vit(self) -> bool:
        return "backbone.pos_embed" in self.state

    @property
    def pool(self) -> str:
        return self.config.model.pool or ("cls" if self.is_vit else "avg")

    @property
    def sizes(self) -> dict[str, int]:
        """The backbone's patch, dim, depth, and num_heads (ViT) or token_hidden and channel_hidden (Mixer)."""
        named = models.BACKBONES[self.config.model.name].keywords
        return {key: value for key, value in named.items() if key != "image_size"}

    @property
    def has_decoder(self) -> bool:
        return "decoder_pred.weight" in self.state

    @property
    def num_classes(self) -> int:
        """Outputs of a linear head that reads the features directly; 0 if there is none."""
        return len(self.state["head.bias"]) if "head.bias" in self.state and self.verb != "probe" else 0

    @property
    def labels(self) -> list[str]:
        """The name of each output of the head: LABEL_n where names are unknown."""
        known = len(self.classes) == self.num_classes
        return list(self.classes) if known else [f"LABEL_{number}" for number in range(self.num_classes)]

    @property
    def resized_side(self) -> int:
        """Pixels to which clients resize an image's shorter side before they crop its centre, as the test view does."""
        return round(min(self.image_size) / self.config.view.test_crop)

    @property
    def crop_elsewhere(self) -> str | None:
        """How clients, which crop whole pixels, crop otherwise than the test view; None where they do not."""
        share, side = self.config.view.test_crop, min(self.image_size)
        if math.isclose(side / self.resized_side, share):
            return None
        return (
            f"view.test_crop={share:g}: timm and transformers crop {side} of {self.resized_side} whole pixels, which "
            f"is {side / self.resized_side:.4g} of the image, so a few answers may differ"
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's input in pixels."""
        return sides(self.config.model.image_size)

    def portable(self, decoder: bool, only_rgb: bool = False) -> tuple[dict[str, Tensor], list[str]]:
        """Return (the tensors that other formats have a place for, sentences on what is left out).

        ``decoder``: whether the format has a place for a decoder, `only_rgb` for one of three channels only.
        """
        absent = NORMS[self.pool == "cls"] if self.is_vit else NORMS[1]
        kept = {n: t for n, t in self.state.items() if n.startswith("backbone.") and not n.startswith(absent)}
        white = self.config.data.white
        left_out = [] if white is None else [f"data.white={white:g}: give it to runs of the imported model"]
        if self.num_classes:
            kept |= {n: t for n, t in self.state.items() if n.startswith("head.")}
        if self.has_decoder:
            reason = self._why_not_portable(only_rgb) if decoder else "this format has no decoder"
            if reason is None:
                kept |= {n: t for n, t in self.state.items() if n.startswith(("decoder_", "mask_token"))}
            else:
                left_out.append(f"the decoder ({reason}; --to safetensors keeps it)")
        return kept, left_out

    def _why_not_portable(self, only_rgb: bool) -> str | None:
        """Why the MAE of no other codebase can hold this decoder; None if it can."""
        mae = self.config.mae
        if not self.is_vit:
            return "other codebases have no decoder for a Mixer"
        if len({*self.image_size}) > 1:
            return "in other codebases decoders are for square images"
        if only_rgb and self.config.data.channels != 3:
            return "in this format decoders are for 3 channels"
        if mae.decoder == "cross":
            return "mae.decoder=cross, which other codebases do not have"
        if mae.hidden == "token":
            return "mae.hidden=token, which other codebases do not have"
        return "with model.pool=avg it reads tokens without the final norm" if self.pool == "avg" else None


@dataclass(frozen=True)
class Reading:
    """A model that was read from a file, the format of the file, and sentences on how it was read."""

    format: str
    model: Model
    notes: Notes


def identify(decoded: Decoded, overrides: Overrides) -> Reading:
    """Find the model of mae_dist that a decoded file holds, with all its settings except `config.out`.

    Raises ValueError, one sentence that begins with the file's name, if no model here has these tensors.
    """
    origin, notes = decoded.origin, Notes(assumed=list(decoded.assumed))
    state = floats(decoded, notes)
    has_decoder = any(name.startswith("decoder_") for name in state)
    if not has_decoder:
        overrides.refuse_decoder(origin)
    for name, ndim in NDIM.items():
        if name in state and state[name].ndim != ndim:
            shape = tuple(state[name].shape)
            raise ValueError(f"{origin}: {name.removeprefix('backbone.')} is {shape}, and must be {ndim}-dimensional")
    recorded, _ = decoded.value("image_size", overrides)
    name, image_size = architecture(state, decoded.value("num_heads", overrides)[0], origin, recorded)
    channels = embedding_of(state, origin)[1].shape[1]
    if overrides.image_size is not None and sides(image_size) != overrides.image_size:
        raise ValueError(f"{origin}: has positions for {image_size} pixels, not for --image-size {recorded}")
    state, dropped = without_ignored(state, has_decoder)
    if dropped:
        notes.left_out.append(f"{', '.join(dropped)} (backbones here end with the features)")
    pool, position = None, None
    if "backbone.pos_embed" in state:
        pool = "avg" if any(n.startswith(NORMS[1]) for n in state) else "cls"
        patch = models.BACKBONES[name].keywords["patch"]
        height, width = (side // patch for side in sides(image_size))
        position = "sincos" if is_sincos(state["backbone.pos_embed"], (height, width)) else "learned"
    shown = image_size if isinstance(image_size, int) else f"{image_size[0]} x {image_size[1]}"
    of = "" if channels == 3 else f" of {channels} channels"
    notes.found.append(f"{name} at {shown} px{of}" + (f", pool={pool}, {position} positions" if pool else ""))
    model = schema.ModelConfig(name=name, image_size=image_size, pool=pool, position=position)
    data = statistics(decoded, overrides, channels, notes)
    crop, _ = decoded.value("test_crop", overrides)
    if crop is not None:
        notes.found.append(f"view.test_crop {crop:g}")
    if "head.bias" in state:
        num_classes = len(state["head.bias"])
        notes.found.append(f"a head of {num_classes} classes (export keeps it; init_from= starts from the backbone)")
        config: Any = schema.FinetuneConfig(data=data, model=model, init_from=origin)
        return Reading(decoded.format, Model("finetune", with_crop(config, crop), state), notes)
    mae = decoder(decoded, state, overrides, notes) if has_decoder else schema.MaeConfig()
    if not has_decoder:
        notes.left_out.append("no decoder in the file: the run predicts no pixels, but other runs can start from it")
    config = schema.PretrainConfig(data=data, model=model, mae=mae)
    return Reading(decoded.format, Model("pretrain", with_crop(config, crop), state), notes)


def floats(decoded: Decoded, notes: Notes) -> dict[str, Tensor]:
    """The tensors of a file as float32; adds to `notes`. ValueError for weights that are whole numbers or missing."""
    for name, tensor in decoded.state.items():
        what = f"{decoded.origin}: {listed([name.removeprefix('backbone.')])}"
        if name.endswith(WEIGHTS) and tensor.dtype not in FLOATS:
            raise ValueError(f"{what} is of {tensor.dtype}, so its weights are quantised; use a file of plain floats")
        if not tensor.numel():
            raise ValueError(f"{what} has no values, as in ZeRO-3, whose zero_to_fp32.py makes a whole file")
    if kinds := sorted({str(t.dtype).removeprefix("torch.") for t in decoded.state.values()} - {"float32"}):
        notes.assumed.append(f"weights converted to float32 (the file has {', '.join(kinds)})")
    return {name: tensor.float() for name, tensor in decoded.state.items()}


def with_crop(config: Any, crop: float | None) -> Any:
    """The settings with this share of an image as the test crop, where it is known."""
    view = config.view if crop is None else dataclasses.replace(config.view, test_crop=crop)
    return dataclasses.replace(config, view=view)


def embedding_of(state: dict[str, Tensor], origin: str) -> tuple[str, Tensor]:
    """Return ("vit" or "mixer", the weight of the patch embedding). ValueError if it is neither."""
    for module, kind in (("patch_embed", "vit"), ("stem", "mixer")):
        if (weight := state.get(f"backbone.{module}.proj.weight")) is not None:
            return kind, weight
    names = listed([name.removeprefix("backbone.") for name in state])
    wanted = "neither a ViT (patch_embed.proj.weight) nor a Mixer (stem.proj.weight)"
    raise ValueError(f"{origin}: holds {wanted}, but {names}; rename its tensors as timm does")


def architecture(
    state: dict[str, Tensor], num_heads: int | None, origin: str, recorded: int | tuple[int, int] | None = None
) -> tuple[str, int | tuple[int, int]]:
    """Return (name in models.BACKBONES, image size in pixels) of a state dict; ``recorded`` is the size that the file
    records, which counts if it has as many patches. ValueError if no backbone matches.
    """
    kind, weight = embedding_of(state, origin)
    dim, channels, patch, width = weight.shape
    depth = num_blocks("backbone.blocks", state)
    if not depth:
        raise ValueError(f"{origin}: has a patch embedding, but no blocks.0, so it is no ViT or Mixer (perhaps a Swin)")
    if kind == "vit" and "backbone.cls_token" not in state:
        raise ValueError(f"{origin}: a ViT without class token (cls_token), and ViTs here need one; try another model")
    if kind == "vit":
        refuse_unsupported_parts(state, origin)
    names = [
        name
        for name, make in models.BACKBONES.items()
        if name.startswith(kind) and [make.keywords[key] for key in ("dim", "depth", "patch")] == [dim, depth, patch]
        if num_heads in (None, make.keywords.get("num_heads"))
    ]
    if not names or patch != width:
        heads = f", {num_heads} heads" if num_heads else ""
        sizes = f"width {dim}, {depth} blocks{heads}, patches of {patch} x {width} pixels, {channels} channels"
        raise ValueError(f"{origin}: no model here is a {kind} of {sizes}; `mae-dist models` lists the models")
    positions = "backbone.pos_embed" if kind == "vit" else "backbone.blocks.0.mlp_tokens.fc1.weight"
    if positions not in state:
        raise ValueError(f"{origin}: lacks {positions.removeprefix('backbone.')}, so its image size is unknown")
    num = state[positions].shape[1] - (kind == "vit")
    if recorded is not None and math.prod(side // patch for side in sides(recorded)) == num:
        return names[0], recorded if len({*sides(recorded)}) > 1 else sides(recorded)[0]
    side = math.isqrt(max(num, 0))
    if side * side != num or not num:
        if kind == "vit" and num > 0 and (grid := math.isqrt(num + 1)) ** 2 == num + 1:
            raise ValueError(
                f"{origin}: a ViT without position for its class token (no_embed_class: pos_embed has {num + 1} for "
                f"{grid} x {grid} patches), and ViTs here have one; try another model"
            )
        which = f"{num} positions beside the class token's" if kind == "vit" else f"{num} positions"
        raise ValueError(f"{origin}: {which} do not form a square; give --image-size HEIGHT WIDTH")
    return names[0], side * patch


def refuse_unsupported_parts(state: dict[str, Tensor], origin: str) -> None:
    """Raise ValueError that names the parts of other ViTs (BEiT, DeiT, DINOv2) in a state dict, if there are any."""
    parts = [f"{what} ({part})" for part, what in UNSUPPORTED.items() if any(n.endswith(f".{part}") for n in state)]
    if parts:
        raise ValueError(f"{origin}: a ViT with {' and '.join(parts)}, which ViTs here do not have; try another model")


def num_blocks(stack: str, state: dict[str, Tensor]) -> int:
    """Return one more than the highest number of a block of `stack`. Names without a number are refused later."""
    numbers = (re.match(rf"{re.escape(stack)}\.([0-9]{{1,3}})\.", name) for name in state)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def without_ignored(state: dict[str, Tensor], has_decoder: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return (the state without modules that only read the features, except a linear head; the names left out)."""
    names = {name: name.removeprefix("backbone.") for name in state}
    plain = {"head.weight", "head.bias"} <= names.keys() and not has_decoder
    plain &= not any(name.startswith("pre_logits") for name in names.values())
    ignored = {
        name for name, bare in names.items()
        if (bare.startswith(IGNORED) and not (plain and name in ("head.weight", "head.bias")))
        or (bare == "mask_token" and not has_decoder)
    }  # fmt: skip
    return {n: t for n, t in state.items() if n not in ignored}, sorted(names[n] for n in ignored)


def is_sincos(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Whether position embeddings (1, 1 + n, dim) are the fixed sin-cos ones of a grid, up to rounding."""
    dim = positions.shape[2]
    return dim % 4 == 0 and torch.allclose(positions, class_and_grid(dim, grid), rtol=0, atol=1e-5)


def statistics(decoded: Decoded, overrides: Overrides, channels: int, notes: Notes) -> schema.DataConfig:
    """Return the data section, with mean and std as given, recorded or usual in the format (for other than 3 channels
    the average of these); adds to `notes`. ValueError if they are those of another number of channels.
    """
    values = {}
    for name, usual in zip(("mean", "std"), decoded.usual, strict=True):
        value, source = decoded.value(name, overrides)
        if value and len(value) != channels:
            field = f"--{name}" if source else decoded.metadata[name][0]
            need = f"must be {channels} numbers, one for each channel of the patch embedding; --{name} overrides it"
            raise ValueError(f"{decoded.origin}: {field}={brief(list(value))}: {need}")
        values[name] = value or (usual if channels == 3 else (sum(usual) / 3,) * channels)
        text = f"data.{name} {format_channels(values[name])}"
        if value:
            notes.found.append(text + source)
        else:
            notes.assumed.append(f"{text}, the format's usual values{decoded.guess} (--{name} overrides it)")
    return schema.DataConfig(path="(imported)", channels=channels, **values)


def decoder(decoded: Decoded, state: dict[str, Tensor], overrides: Overrides, notes: Notes) -> schema.MaeConfig:
    """Return the mae section of a model with a decoder; adds to `notes`. ValueError if its heads do not fit."""
    origin = decoded.origin
    if "decoder_embed.weight" not in state:
        raise ValueError(f"{origin}: has a decoder, but lacks its decoder_embed.weight")
    dim, depth = len(state["decoder_embed.weight"]), num_blocks("decoder_blocks", state)
    notes.found.append(f"a decoder {dim} wide of {depth} blocks")
    heads, _ = decoded.value("decoder_heads", overrides)
    if heads is None:
        heads = 16 if dim == 512 else max(1, dim // 32)
        notes.assumed.append(f"mae.decoder_heads={heads}, heads 32 wide as in the paper (--decoder-heads overrides it)")
    if dim % heads or dim % 4:
        raise ValueError(f"{origin}: a decoder {dim} wide cannot have {heads} heads; give --decoder-heads")
    norm_pix, source = decoded.value("norm_pix", overrides)
    if norm_pix is None:
        norm_pix = True
        notes.assumed.append("mae.norm_pix=true, which the file does not record (--no-norm-pix overrides it)")
    else:
        notes.found.append(f"mae.norm_pix={str(norm_pix).lower()}{source}")
    mae = schema.MaeConfig(norm_pix=norm_pix, decoder_dim=dim, decoder_depth=depth, decoder_heads=heads)
    mask_ratio, _ = decoded.value("mask_ratio", overrides)
    return mae if mask_ratio is None else dataclasses.replace(mae, mask_ratio=mask_ratio)
