"""Our own file: a folder with model.safetensors in our names, all settings as metadata, and a model card to read.

It holds everything that a run's checkpoint has below `model.`, but for the heads of a probe board, so that importing it
is exporting it undone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from mae_dist import __version__
from mae_dist import config as configuration
from mae_dist.weights.checks import brief, checked
from mae_dist.weights.files import one_line
from mae_dist.weights.identify import Given, Model, Reading, shown

MARK = "mae_dist"
SUFFIXES = ()


def reading(tensors: dict[str, Tensor], metadata: dict[str, Any], origin: str, given: Given) -> Reading:
    """The model as it was exported, except for what is given."""
    try:
        plain = yaml.safe_load(metadata["config"])
        verb, step, fingerprint = metadata["verb"], int(metadata["step"]), metadata["data_fingerprint"]
        if not isinstance(plain, dict):
            raise ValueError(f"settings are {brief(plain)}")
    except (KeyError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{origin}: its metadata are not those that mae-dist wrote ({one_line(error)})") from error
    config = configuration.from_dict(verb, plain, f"{origin}: metadata")
    if not hasattr(config, "mae"):
        given.refuse_decoder(origin)
    for section, names in (("data", ("mean", "std")), ("mae", ("norm_pix", "decoder_heads"))):
        told = {name: value for name in names if (value := getattr(given, name)) is not None}
        if told:
            changed = dataclasses.replace(getattr(config, section), **told)
            config = dataclasses.replace(config, **{section: changed})
    for name in ("mean", "std"):
        if (value := getattr(config.data, name)) is not None:
            checked(name, value, f"{origin}: metadata: data.{name}", f"; --{name} overrules it")
    try:
        configuration.check(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)))
    except ValueError as error:
        raise ValueError(f"{origin}: metadata: {error}") from error
    found = [f"the {verb} run {config.out} at step {step}, with all its settings"]
    return Reading("safetensors", Model(verb, config, tensors, step, fingerprint), found)


def theirs(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """All of it."""
    return dict(model.state), []


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """The folder."""
    path.mkdir()
    metadata = {
        "format": "pt", MARK: __version__, "verb": model.verb, "step": str(model.step),
        "data_fingerprint": model.data_fingerprint, "config": configuration.dump(model.config),
    }  # fmt: skip
    save_file(tensors, path / "model.safetensors", metadata)
    (path / "README.md").write_text(card(model), encoding="utf-8")


def card(model: Model) -> str:
    """The model card: what it is, how images enter, how it was trained, how it is loaded."""
    config, size = model.config, sum(tensor.numel() for tensor in model.state.values())
    backbone = sum(tensor.numel() for name, tensor in model.state.items() if name.startswith("backbone."))
    side = config.model.image_size
    rows = {
        "backbone": f"{config.model.name}, {', '.join(f'{k} {v}' for k, v in model.sizes.items())}",
        "feature": "class token" if model.pool == "cls" else "mean of the patch tokens",
        "parameters": f"{size:,}, of which {backbone:,} in the backbone",
        "images": f"RGB, {side} x {side} px, scaled to 0..1, then (x - mean) / std",
        "mean": shown(config.data.mean),
        "std": shown(config.data.std),
    }
    if model.has_decoder:
        mae = config.mae
        target = "pixels normalised per patch (norm_pix)" if mae.norm_pix else "pixels (no norm_pix)"
        rows["decoder"] = f"{mae.decoder}, {mae.decoder_dim} wide, {mae.decoder_depth} blocks; predicts {target}"
    if model.num_classes:
        rows["head"] = f"linear, {model.num_classes} classes"
    rows |= {"made by": f"`mae-dist {model.verb}`, run {config.out}, step {model.step:,}, mae_dist {__version__}"}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {config.model.name}, {model.verb}\n\n| | |\n|---|---|\n{table}\n\n"
        f"`mae-dist import FOLDER --out RUN` makes a run of it, `init_from=RUN` starts from that. Names below "
        f"`backbone.` are timm's.\n\n## The recipe\n\n```yaml\n{configuration.dump(config)}```\n"
    )


def usage(_: Model, path: Path) -> str:
    """What to type."""
    return f"mae-dist import {path} --out RUN"
