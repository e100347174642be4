"""`mae-dist import FILE --out RUN`: convert another codebase's checkpoint to a run for `init_from=RUN` and `export`.

What the file records, what had to be assumed and what was left out is printed, and kept in RUN/result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from mae_dist import dist, weights
from mae_dist.checksum import sha256
from mae_dist.cli import Parser
from mae_dist.hints import given
from mae_dist.restore import read
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.weights import Overrides, Reading, files
from mae_dist.weights.checks import checked


def main(argv: list[str]) -> int:
    """Run `mae-dist import ARGV` and return the exit status."""
    parser = Parser(prog="mae-dist import", description="Convert a checkpoint of another codebase to a run.")
    parser.add_argument("file", type=Path, metavar="FILE", help=".pth, .safetensors, .npz, or a folder with them")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run's folder")
    parser.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, help="mae.norm_pix of the decoder")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X", help=f"data.{name} of each channel, in 0..1"
        )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="model.image_size of images that are not square",
    )
    parser.add_argument("--decoder-heads", type=int, help="attention heads of the decoder")
    parser.add_argument("--key", help="where in a file with several models: teacher, or a prefix of names")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    files.refuse_existing(arguments.out, "--out")
    lists = (tuple(values) if values else None for values in (arguments.mean, arguments.std, arguments.image_size))
    mean, std, size = lists
    overrides = Overrides(arguments.norm_pix, mean, std, arguments.decoder_heads, size)
    reading = read(arguments.file, overrides, arguments.key)
    make_run(reading, arguments.file, arguments.out)
    config = reading.model.config
    print(f"{arguments.out}: a {reading.model.verb} run from {arguments.file} ({reading.format})")
    for title, sentences in reading.notes.by_title().items():
        for sentence in sentences:
            print(f"  {title + ':':9s} {sentence}")
    names = f"model.name={config.model.name} model.pool={reading.model.pool} " + shlex.join(
        [given("model.image_size", config.model.image_size).replace(" ", "")]
        + [f"data.channels={config.data.channels}"] * (config.data.channels != 3)
    )
    start, out = (shlex.quote(f"{name}={arguments.out}{more}") for name, more in (("init_from", ""), ("out", "-knn")))
    print(
        f"next: mae-dist knn {names} {start} {out} data.path=DATA  (a folder of `mae-dist data`; needs no config file)"
    )
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for numbers that cannot be image statistics or a number of heads."""
    for name in ("mean", "std", "decoder_heads", "image_size"):
        if (value := getattr(arguments, name)) is not None:
            checked(name, value, f"--{name.replace('_', '-')}")


def make_run(reading: Reading, source: Path, out: Path) -> None:
    """Write the run's folder atomically: settings, one checkpoint, and in result.json the source file with its hash."""
    model, device = reading.model, dist.setup(use_gpu=False)
    config = dataclasses.replace(model.config, out=str(out))
    digest = sha256(*weights.locate(source)[0])
    origin = {"from": str(source), "format": reading.format, "sha256": digest} | reading.notes.by_title()
    origin |= {"classes": list(model.classes)} if model.classes else {}
    with files.atomic_output(out, "--out") as temporary:
        run = RunDir(temporary)
        run.open(model.verb, config, model.data_fingerprint, model.step)
        state = {f"{checkpoint.MODEL}{name}": tensor for name, tensor in model.state.items()}
        run.save(model.step, checkpoint.share(state), keep=1)
        run.record_launch(model.step, device)
        run.finish({"verb": model.verb, "imported": origin})
