"""The model card, README.md, of every folder that is exported: a YAML header for the hub, then what the model is."""

from typing import Any

import yaml

from mae_dist import __version__
from mae_dist import config as configuration
from mae_dist.weights.checks import format_channels
from mae_dist.weights.identify import Model

NAME = "README.md"


def card(model: Model, library: str, usage: str) -> str:
    """The card in Markdown: sizes, normalisation and crop of images, decoder, recipe, and the line that loads it with a
    ``library``.
    """
    config = model.config
    header = {
        "library_name": library,
        "pipeline_tag": "image-classification" if model.num_classes else "image-feature-extraction",
        "tags": ["mae", "masked-autoencoder", *(["vit"] if model.is_vit else ["mixer"])],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows(model).items())
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {config.model.name}, {model.verb}\n\n"
        f"| | |\n|---|---|\n{table}\n\n```\n{usage}\n```\n\n"
        f"`mae-dist import FOLDER --out RUN` makes a run of it, and `init_from=RUN` starts from that run.\n\n"
        f"## The recipe\n\n```yaml\n{configuration.dump(config)}```\n"
    )


def rows(model: Model) -> dict[str, Any]:
    """What a reader asks first -> the answer."""
    config, size = model.config, sum(tensor.numel() for tensor in model.state.values())
    backbone = sum(tensor.numel() for name, tensor in model.state.items() if name.startswith("backbone."))
    height, width = model.image_size
    colours = {1: "grey", 3: "RGB"}.get(config.data.channels, f"{config.data.channels} channels")
    found = {
        "backbone": f"{config.model.name}, {', '.join(f'{k} {v}' for k, v in model.sizes.items())}",
        "feature": "class token" if model.pool == "cls" else "mean of the patch tokens",
        "parameters": f"{size:,}, of which {backbone:,} in the backbone",
        "images": f"{colours}, {height} x {width} px, scaled to 0..1, then (x - mean) / std",
        "crop": f"the central {config.view.test_crop:g} of the image, in the shape of the input, bicubic"
        + (f" ({model.crop_elsewhere})" if model.crop_elsewhere else ""),
        "mean": format_channels(config.data.mean),
        "std": format_channels(config.data.std),
    }
    if model.has_decoder:
        mae = config.mae
        target = "pixels normalised per patch (norm_pix)" if mae.norm_pix else "pixels (no norm_pix)"
        found["decoder"] = f"{mae.decoder}, {mae.decoder_dim} wide, {mae.decoder_depth} blocks; predicts {target}"
    if model.num_classes:
        found["head"] = f"linear, {model.num_classes} classes"
    return found | {
        "made by": f"`mae-dist {model.verb}`, run {config.out}, step {model.step:,}, mae_dist {__version__}"
    }
