"""`mae-dist recipe DATA`: settings to begin with for the data at hand, each with its reason.

From half a million images on, values follow He et al. 2022 (table 8 and table 9). Below, where papers are silent, they
are rules of thumb: more epochs for fewer images, a smaller model, a batch that leaves an epoch some fifty steps.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import median

import yaml

from mae_dist.cli import Parser
from mae_dist.data.decode import stored_size
from mae_dist.data.index import ShardIndex, open_split

SAMPLES = 64
"""Images whose size is looked at, spread over the data."""
MANY, SOME = 500_000, 50_000
"""Images from which on a ViT-B, or a ViT-S, is proposed."""
SEEN = 80_000_000
"""Images that a small model should see in pretraining, an image counted each time: 1600 epochs of 50,000."""
DECODERS = {"ti": (192, 4, 3), "s": (256, 4, 4), "b": (512, 8, 16)}
"""Size -> width, depth and heads of the decoder."""

Lines = Iterator[tuple[str, object, str]]


def main(argv: list[str]) -> int:
    """Run `mae-dist recipe ARGV`: print a config file and return the exit status."""
    parser = Parser(
        prog="mae-dist recipe",
        description="Print settings to begin with for a data set, line by line with reasons; `> FILE.yaml` keeps them.",
    )
    parser.add_argument("data", help="as data.path: a folder with a dataset.json, or indexed tars")
    parser.add_argument("--split", default="train", help="split to train on (default train)")
    parser.add_argument("--finetune", action="store_true", help="fine-tuning of such a pretraining")
    options = parser.parse_args(argv)
    split = open_split(options.data, options.split)
    side, verb = shorter_side(split), "finetune" if options.finetune else "pretrain"
    origin = " init_from=runs/PRETRAINED" * options.finetune
    print(f"# {verb} on {len(split):,} images, shorter side about {side} px: rules of thumb, not measured.\n#")
    print(f"#   mae-dist {verb} THIS.yaml {shlex.quote(f'data.path={options.data}')} out=runs/mine{origin}\n#")
    print(as_yaml((finetuning if options.finetune else pretraining)(len(split), side)), end="")
    return 0


def shorter_side(split: ShardIndex) -> int:
    """The median shorter side of some images, in pixels. Raises ValueError when none of them can be read."""
    if split.dataset.image_size is not None:
        return min(split.dataset.image_size)
    count = min(SAMPLES, len(split))
    sizes = [stored_size(split.read(number * len(split) // count)) for number in range(count)]
    known = [min(size) for size in sizes if size is not None]
    if not known:
        raise ValueError(f"{split.tars[0]}: none of {count} images can be read; `mae-dist data check` tells more")
    return int(median(known))


def model_for(num_images: int, side: int) -> tuple[str, str, int]:
    """(Size, model, image size in pixels) for so many images with such a shorter side."""
    size = "b" if num_images >= MANY else "s" if num_images >= SOME else "ti"
    for largest, patch, pixels in ((48, 2, 32), (96, 4, 64), (180, 16, 112)):
        if side <= largest:
            return size, f"vit_{size}{patch}", pixels
    return size, f"vit_{size}16", 224


def pretraining(num_images: int, side: int) -> Lines:
    """(Setting, value, reason) of a masked autoencoding."""
    size, name, pixels = model_for(num_images, side)
    width, depth, heads = DECODERS[size]
    many = num_images >= MANY
    epochs = 800 if many else min(max(round(SEEN / num_images, -2), 400), 1600)
    yield (
        "model.name",
        name,
        "ViT-Ti below 50,000 images, ViT-S below 500,000, else ViT-B",
    )
    yield "model.image_size", pixels, "near the images' own size; half the side is four times as fast"
    yield "view.crop", "resized", "a random part of the image: with the flip, all that MAE needs"
    yield "view.scale", [0.2, 1.0], "share of the area that the part has (table 8)"
    yield "mae.mask_ratio", 0.75, "three patches of four are hidden (figure 5)"
    yield "mae.norm_pix", True, "hidden patches are predicted with mean 0 and deviation 1 (table 1d)"
    yield "mae.decoder_dim", width, "a decoder narrower than the encoder is enough"
    yield "mae.decoder_depth", depth, "the paper's 8 blocks for ViT-B; fewer for less"
    yield "mae.decoder_heads", heads, "64 numbers a head, or 32"
    yield (
        "train.epochs",
        int(epochs),
        f"{num_images * epochs / 1e6:.3g} million images are seen; few images need many epochs",
    )
    batch = batch_for(num_images)
    yield "train.global_batch", batch, f"an epoch has {num_images / batch:.3g} steps; the paper's 4096 for ImageNet"
    yield "train.precision", "auto", "bf16, half the time of fp32, where the device has instructions for it, else fp32"
    if many:
        lr, why = 1.5e-4, "the paper's"
    elif pixels <= 64:
        lr, why = 1.5e-3, "as for ViT-Ti at 32 px"
    else:
        lr, why = 5e-4, "between ViT-B's and a tiny model's"
    yield "optim.base_lr", lr, f"for 256 images: {why}; try a third and three times"
    yield "optim.weight_decay", 0.05, "table 8"
    yield "optim.warmup_epochs", max(10, int(epochs) // 40), "a fortieth of all epochs, as 40 of 1600"
    yield "track.evaluate_every", max(10, int(epochs) // 40), "epochs between losses on test images, if there are any"


def finetuning(num_images: int, side: int) -> Lines:
    """(Setting, value, reason) of a fine-tuning."""
    size, name, pixels = model_for(num_images, side)
    yield "model.name", name, "that of the pretraining"
    yield "model.image_size", pixels, "that of the pretraining, or larger"
    yield "model.pool", "avg", "the mean of the patches, as in the official code"
    yield "model.drop_path", 0.1, "skips blocks at random; 0.2 or 0.3 for larger models (table 9)"
    small = pixels <= 64
    yield "view.crop", "pad" if small else "resized", "small shifts" if small else "a random part of the image"
    yield "view.randaugment", "rand-m9-mstd0.5-inc1", "colours and shapes change at random (table 9)"
    yield "view.random_erasing", 0.25, "a rectangle is covered, in one image of four"
    yield "mix.mixup", 0.8, "two images and their labels are blended (table 9)"
    yield "mix.cutmix", 1.0, "or a part of one is put into the other"
    yield "train.label_smoothing", 0.1, "table 9"
    yield "train.epochs", 100 if num_images >= SOME else 200, "the paper's 100 for ViT-B; fewer images, more epochs"
    yield "train.global_batch", batch_for(num_images), "as in pretraining"
    yield "train.precision", "auto", "as in pretraining, where the device has instructions for it, else fp32"
    yield "optim.base_lr", 5e-4 if size == "b" else 1e-3, "for 256 images, scaled by the batch; try half and twice"
    yield "optim.layer_decay", 0.65 if size == "b" else 0.75, "earlier blocks, already good, learn less (table 9)"
    yield "optim.weight_decay", 0.05, "table 9"
    yield "optim.warmup_epochs", 5, "table 9"


def batch_for(num_images: int) -> int:
    """A power of two near a fiftieth of the images, from 64 to 1024, but no more than there are, and even, as mixing
    takes pairs; 4096 for half a million and more.
    """
    pairs = max(1, num_images // 2)
    return 4096 if num_images >= MANY else min(2 ** min(max((num_images // 50).bit_length() - 1, 6), 10), 2 * pairs)


def as_yaml(lines: Lines) -> str:
    """The text of a config file with a comment behind each setting."""
    text, section = "", ""
    for name, value, why in lines:
        head, _, key = name.partition(".")
        if head != section:
            text, section = f"{text}{head}:\n", head
        written = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        text += f"{f'  {key}: {written}':<40}# {why}\n"
    return text
