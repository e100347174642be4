"""`mae-dist models [NAME ...]`: parameters, multiply-adds and activation memory of models, in closed form."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from mae_dist import config, cost, model_sizes
from mae_dist.cli import Parser
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
    table = Table("model", "px", "params M", "GFLOPs\npretrain", "GFLOPs\nfine-tune", "MB\npretrain", "MB\nfine-tune")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    unsuitable = []
    for name in names or model_sizes.SIZES:
        try:
            table.add_row(*row(name, settings, options.image_size))
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


def row(name: str, settings: MaeConfig, image_size: int | tuple[int, int] | None) -> list[str]:
    """Cells of one model's row. Raises ValueError when it cannot be built or pretrained with these settings."""
    size = image_size or model_sizes.default_image_size(model_sizes.size_of(name)["patch"])
    pixels = " x ".join(map(str, dict.fromkeys(model_sizes.sides(size))))
    pretrain, finetune = cost.pretraining(name, settings, size), cost.finetuning(name, size)
    if pretrain is None or finetune is None:
        return [name, pixels, *["unknown"] * 5]
    counts = [pretrain.forward / 1e9, finetune.forward / 1e9]
    memory = [pretrain.activations / 1e6, finetune.activations / 1e6]
    parameters = f"{model_sizes.num_parameters(name, size) / 1e6:.2f}"
    return [name, pixels, parameters, *(f"{n:.3g}" if n < 100 else f"{n:.0f}" for n in counts + memory)]


def _size(text: str) -> int | tuple[int, int]:
    """96x160 as (96, 160), 224 as a number."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: expected a number of pixels, or HEIGHTxWIDTH like 96x160")
    height, width = map(int, (sides * 2)[:2])
    return height if height == width else (height, width)
