"""mae_dist's own format: a folder with model.safetensors, all settings as its metadata, and a model card.

It has every tensor that a run's checkpoint has under `model.`, except several probe heads, so that an import restores
what was exported.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from mae_dist import __version__, small_files
from mae_dist import config as configuration
from mae_dist.weights import card
from mae_dist.weights.checks import brief, checked, class_names
from mae_dist.weights.files import DIGEST, digest, first_line
from mae_dist.weights.identify import Model, Notes, Overrides, Reading

MARK = "mae_dist"
"""Key in the metadata that only this format has; its value is the version that wrote the file."""
SUFFIXES = ()


def decode(tensors: dict[str, Tensor], metadata: dict[str, Any], origin: str, overrides: Overrides) -> Reading:
    """Restore a model as it was exported, with the user's `overrides`. ValueError for invalid metadata."""
    try:
        small_files.check_yaml(origin, metadata["config"])
        plain = yaml.safe_load(metadata["config"])
        verb, step, fingerprint = metadata["verb"], int(metadata["step"]), metadata["data_fingerprint"]
        if not isinstance(plain, dict):
            raise ValueError(f"settings are {brief(plain)}")
    except (KeyError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{origin}: its metadata was not written by mae-dist ({first_line(error)})") from error
    config = configuration.from_dict(verb, plain, f"{origin}: metadata", fingerprint)
    if not hasattr(config, "mae"):
        overrides.refuse_decoder(origin)
    for section, names in (
        ("data", ("mean", "std")),
        ("model", ("image_size",)),
        ("mae", ("norm_pix", "decoder_heads")),
    ):
        given = {name: value for name in names if (value := getattr(overrides, name)) is not None}
        if given:
            changed = dataclasses.replace(getattr(config, section), **given)
            config = dataclasses.replace(config, **{section: changed})
    for name in ("mean", "std"):
        if (value := getattr(config.data, name)) is not None:
            checked(name, value, f"{origin}: metadata: data.{name}", f"; --{name} overrides it")
    try:
        configuration.check(config)
    except ValueError as error:
        raise ValueError(f"{origin}: metadata: {error}") from error
    classes = class_names(small_files.parse_json(f'{{"names": {metadata.get("classes", "[]")}}}', origin)["names"])
    notes = Notes(found=[f"the {verb} run {config.out} at step {step}, with all its settings"])
    return Reading("safetensors", Model(verb, config, tensors, step, fingerprint, classes), notes)


def encode(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Return (all tensors of a model, no sentences): nothing is renamed or left out."""
    return dict(model.state), []


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """Write the folder: model.safetensors and README.md."""
    path.mkdir()
    metadata = {
        "format": "pt", MARK: __version__, "verb": model.verb, "step": str(model.step),
        "data_fingerprint": model.data_fingerprint, "config": configuration.dump(model.config),
        "classes": json.dumps(model.classes), DIGEST: digest(tensors),
    }  # fmt: skip
    save_file(tensors, path / "model.safetensors", metadata)
    (path / card.NAME).write_text(card.card(model, "mae_dist", usage(model, Path("FOLDER"))), encoding="utf-8")


def usage(_: Model, path: Path) -> str:
    """Return the command that imports the folder at `path`."""
    return f"mae-dist import {path} --out RUN"
