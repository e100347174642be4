"""`mae-dist models [NAME ...]`: parameters, multiply-adds and activation memory of models, counted without weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

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
params: of the backbone, without a head. GFLOPs: 10^9 multiply-adds of the forward pass of one image, as in the papers'
tables; a training step takes about three times as many. MB: 10^6 bytes that the forward pass of one image in fp32 keeps
for the backward pass, without activation checkpointing (in 16 bits about half). Weights, gradients and moments take
another 16 bytes a parameter."""


def main(argv: list[str]) -> int:
    """Run `mae-dist models ARGV`: print the table and return the exit status."""
    parser = Parser(prog="mae-dist models", description="Cost of models in pretraining and in fine-tuning.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="models (default: all), and settings like mae.predict=0.5"
    )
    parser.add_argument(
        "--image-size", type=_size, metavar="N|HxW", help="pixels (default: 32 for patches up to 4, else 224)"
    )
    options = parser.parse_intermixed_args(argv)
    names = [name for name in options.names if "=" not in name]
    settings = mae_settings([name for name in options.names if "=" in name])
    size = {} if options.image_size is None else {"image_size": options.image_size}
    table = Table("model", "px", "params M", "GFLOPs\npretrain", "GFLOPs\nfine-tune", "MB\npretrain", "MB\nfine-tune")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    unsuitable = []
    for name in names or models.BACKBONES:
        try:
            table.add_row(*row(name, settings, size))
        except ValueError:
            if names:
                raise
            unsuitable.append(name)
    if not table.rows:
        raise ValueError(
            f"--image-size {options.image_size}: no model can be pretrained on such images with these settings"
        )
    console = Console()
    console.print(table)
    hidden = f"{settings.mask_ratio:.0%} hidden ({settings.hidden}), {settings.predict:.0%} of it decoded"
    decoder = f"decoder {settings.decoder_dim} wide and {settings.decoder_depth} deep ({settings.decoder})"
    print(f"pretrain: {hidden}; {decoder}.\n{LEGEND}")
    if unsuitable:
        print(f"Not possible with these images and settings: {', '.join(unsuitable)}.")
    return 0


def mae_settings(overrides: list[str]) -> MaeConfig:
    """The section `mae` with overrides `mae.field=value` applied. Raises ValueError for other settings."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name in ("image_size", "model.image_size"):
            raise ValueError(f"{override}: the image size is an option of this command; use --image-size {value}")
        if not override.startswith("mae."):
            raise ValueError(
                f"{override}: this table depends only on --image-size and on settings of mae, for example "
                "mae.decoder_depth=4"
            )
    return config.load("pretrain", None, ["data.path=.", "out=.", "model.name=.", *overrides]).mae


def row(name: str, settings: MaeConfig, size: dict[str, Any]) -> list[str]:
    """Cells of one model's row. Raises ValueError when it cannot be built or pretrained with these settings."""
    pretrain, finetune = pretraining(name, settings, **size), finetuning(name, **size)
    with torch.device("meta"):
        backbone = models.build(name, **size)
    counts = [pretrain.multiply_adds / 1e9, finetune.multiply_adds / 1e9]
    memory = [pretrain.activations / 1e6, finetune.activations / 1e6]
    pixels, parameters = (
        " x ".join(map(str, dict.fromkeys(backbone.image_size))),
        f"{cost.num_parameters(backbone) / 1e6:.2f}",
    )
    return [name, pixels, parameters, *(f"{n:.3g}" if n < 100 else f"{n:.0f}" for n in counts + memory)]


def _size(text: str) -> int | tuple[int, int]:
    """96x160 as (96, 160), 224 as a number."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: expected a number of pixels, or HEIGHTxWIDTH like 96x160")
    height, width = map(int, (sides * 2)[:2])
    return height if height == width else (height, width)


def finetuning(name: str, **overrides: Any) -> Cost:
    """Cost of a forward pass of all patches through the backbone."""

    def measure(depth: int) -> Cost:
        backbone = models.build(name, depth=depth, pool="avg", **overrides)
        return cost.count(backbone, one(backbone).images)

    with torch.device("meta"):
        return cost.of_depths(measure, models.build(name, **overrides).depth)


def pretraining(name: str, settings: MaeConfig, **overrides: Any) -> Cost:
    """Cost of a forward pass of masked autoencoding with its decoder."""

    def measure(depth: int, decoder_depth: int) -> Cost:
        backbone = models.build(name, depth=depth, **overrides)
        return cost.count(MAE(backbone, replace(settings, decoder_depth=decoder_depth), seed=0), one(backbone))

    with torch.device("meta"):
        return cost.of_depths(measure, models.build(name, **overrides).depth, settings.decoder_depth)


def one(backbone: Backbone) -> Batch:
    """A batch of one image. Its id is on the CPU: drawing masks, in many small operations, is faster there."""
    number = torch.zeros(1, dtype=torch.int64, device="cpu")
    images = torch.zeros(1, backbone.channels, *backbone.image_size)
    return Batch(images, number, number, number, number.bool())
