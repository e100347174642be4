"""`mae-dist models [NAME ...]`: parameters, multiply-adds and activation memory of models, counted on empty ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, models
from mae_dist.batch import Batch
from mae_dist.cli import Parser
from mae_dist.models import cost
from mae_dist.models.backbone import Backbone
from mae_dist.models.cost import Cost
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig

LEGEND = """\
params: the backbone's, without a head. GFLOPs: 10^9 multiply-adds of one forward pass of one image, as the papers'
tables count them; a training step is about three times as many. MB: 10^6 bytes that one image's forward pass in fp32
keeps for the backward pass, nothing recomputed (in 16 bits about half); weights, gradients and moments are 16 bytes a
parameter beside them."""


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = Parser(
        prog="mae-dist models", description="What models cost: pretraining, and fine-tuning of all patches."
    )
    parser.add_argument(
        "words", nargs="*", metavar="NAME", help="models (default: all), and settings like mae.predict=0.5"
    )
    parser.add_argument("--image-size", type=int, help="pixels a side (default: 32 for patches up to 4, else 224)")
    options = parser.parse_intermixed_args(argv)
    names = [word for word in options.words if "=" not in word]
    settings = mae_settings([word for word in options.words if "=" in word])
    size = {} if options.image_size is None else {"image_size": options.image_size}
    table = Table("model", "px", "params M", "GFLOPs\npretrain", "GFLOPs\nfine-tune", "MB\npretrain", "MB\nfine-tune")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    without = []
    for name in names or models.BACKBONES:
        try:
            table.add_row(*row(name, settings, size))
        except ValueError:
            if names:
                raise
            without.append(name)
    if not table.rows:
        raise ValueError(
            f"--image-size {options.image_size}: no model can be pretrained on such images with these settings"
        )
    console = Console()
    console.print(table)
    hidden = f"{settings.mask_ratio:.0%} hidden ({settings.hidden}), {settings.predict:.0%} of it decoded"
    decoder = f"decoder {settings.decoder_dim} wide and {settings.decoder_depth} deep ({settings.decoder})"
    print(f"pretrain: {hidden}; {decoder}.\n{LEGEND}")
    if without:
        print(f"Not for these images and settings: {', '.join(without)}.")
    return 0


def mae_settings(words: list[str]) -> MaeConfig:
    """The section `mae` with `mae.field=value` words applied (ValueError for others)."""
    for word in words:
        name, _, value = word.partition("=")
        if name in ("image_size", "model.image_size"):
            raise ValueError(f"{word}: pixels a side are an option here; write --image-size {value}")
        if not word.startswith("mae."):
            raise ValueError(
                f"{word}: of the settings only those of mae change this table, for example mae.decoder_depth=4; "
                "--image-size does too"
            )
    return config.load("pretrain", None, ["data.path=.", "out=.", "model.name=.", *words]).mae


def row(name: str, settings: MaeConfig, size: dict[str, int]) -> list[str]:
    """The cells of one model (ValueError when it cannot be made or pretrained so)."""
    pretrain, finetune = pretraining(name, settings, **size), finetuning(name, **size)
    with torch.device("meta"):
        backbone = models.build(name, **size)
    counts = [pretrain.multiply_adds / 1e9, finetune.multiply_adds / 1e9]
    memory = [pretrain.activations / 1e6, finetune.activations / 1e6]
    pixels, parameters = f"{backbone.image_size[0]}", f"{cost.num_parameters(backbone) / 1e6:.2f}"
    return [name, pixels, parameters, *(f"{n:.3g}" if n < 100 else f"{n:.0f}" for n in counts + memory)]


def finetuning(name: str, **overrides: int) -> Cost:
    """A forward pass of the whole image through the backbone."""

    def measure(depth: int) -> Cost:
        backbone = models.build(name, depth=depth, pool="avg", **overrides)
        return cost.count(backbone, one(backbone).images)

    with torch.device("meta"):
        return cost.of_depths(measure, models.build(name, **overrides).depth)


def pretraining(name: str, settings: MaeConfig, **overrides: int) -> Cost:
    """A forward pass of masked autoencoding."""

    def measure(depth: int, decoder_depth: int) -> Cost:
        backbone = models.build(name, depth=depth, **overrides)
        return cost.count(MAE(backbone, replace(settings, decoder_depth=decoder_depth), seed=0), one(backbone))

    with torch.device("meta"):
        return cost.of_depths(measure, models.build(name, **overrides).depth, settings.decoder_depth)


def one(backbone: Backbone) -> Batch:
    """A batch of one image. Its id is a real number, for masks are drawn in many small steps that are quicker so."""
    number = torch.zeros(1, dtype=torch.int64, device="cpu")
    images = torch.zeros(1, backbone.channels, *backbone.image_size)
    return Batch(images, number, number, number, number.bool())
