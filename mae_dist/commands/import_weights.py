"""`mae-dist import FILE --out RUN`: a checkpoint of another house becomes a run that `init_from=RUN` and `export` take.

What the file says, what had to be assumed and what was left out is printed, and kept in RUN/result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shlex
from pathlib import Path

import torch

from mae_dist import dist, models, weights
from mae_dist.cli import Parser
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.run.directory import RunDir
from mae_dist.weights import Given, Model, Reading, files
from mae_dist.weights.checks import checked
from mae_dist.weights.identify import NORMS

SHOWN = 3
"""Names that a sentence lists."""


def main(argv: list[str]) -> int:
    """Run `mae-dist import ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist import", description="Make a run of a checkpoint of another house.")
    parser.add_argument("file", type=Path, metavar="FILE", help=".pth, .safetensors, .npz, or a folder with them")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run's folder")
    parser.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, help="what the decoder predicts")
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=f"data.{name}, in 0..1")
    parser.add_argument("--decoder-heads", type=int, help="attention heads of the decoder")
    arguments = parser.parse_args(argv)
    refuse_impossible(arguments)
    files.refuse_existing(arguments.out, "--out")
    mean, std = (tuple(values) if values else None for values in (arguments.mean, arguments.std))
    reading = read(arguments.file, Given(arguments.norm_pix, mean, std, arguments.decoder_heads))
    make_run(reading, arguments.file, arguments.out)
    config = reading.model.config
    print(f"{arguments.out}: a {reading.model.verb} run from {arguments.file} ({reading.house})")
    for title, sentences in said(reading).items():
        for sentence in sentences:
            print(f"  {title + ':':9s} {sentence}")
    names = f"model.name={config.model.name} model.image_size={config.model.image_size} model.pool={reading.model.pool}"
    start, out = (shlex.quote(f"{name}={arguments.out}{more}") for name, more in (("init_from", ""), ("out", "-knn")))
    print(
        f"next: mae-dist knn {names} {start} {out} data.path=DATA  (a folder of `mae-dist data`; needs no config file)"
    )
    return 0


def refuse_impossible(arguments: argparse.Namespace) -> None:
    """Numbers that can be neither statistics nor a count (ValueError)."""
    for name in ("mean", "std", "decoder_heads"):
        if (value := getattr(arguments, name)) is not None:
            checked(name, value, f"--{name.replace('_', '-')}")


def said(reading: Reading) -> dict[str, list[str]]:
    """The sentences of a reading by title."""
    return {"found": reading.found, "assumed": reading.assumed, "left out": reading.left_out}


def read(path: Path, given: Given) -> Reading:
    """What `path` holds; ValueError, one sentence, unless it is a whole model of ours."""
    reading = weights.read(path, given)
    build(reading.model, str(path))
    return reading


def build(model: Model, origin: str) -> Objective:
    """The objective with these settings and tensors, for a forward pass.

    Raises ValueError when tensors are missing, of another shape, not finite, or more than the model has a place for;
    only a final norm that belongs to the other pooling may lie beside.
    """
    config, state = model.config, model.state
    try:
        with torch.device("meta"):
            objective = empty(model)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    expected, faults = objective.state_dict(), []
    unknown = [name for name in state if name not in expected and not name.startswith(NORMS)]
    for names, what in (([n for n in expected if n not in state], "lacks"), (unknown, "holds, unknown here,")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            faults.append(f"{what} {', '.join(names[:SHOWN])}{more}")
    if faults:
        raise ValueError(f"{origin}: as {config.model.name} it {' and '.join(faults)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, and {config.model.name} has {tuple(tensor.shape)}"
            raise ValueError(f"{origin}: {name} is {shapes}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{origin}: {name} holds NaN or inf, with which nothing can be computed; try another file")
    objective.load_state_dict({name: state[name] for name in expected}, assign=True)
    return objective.eval()


def empty(model: Model) -> Objective:
    """The objective with these settings, untrained. ValueError for settings that make none."""
    config, state = model.config, model.state
    chosen = {name: value for name in ("pool", "position") if (value := getattr(config.model, name)) is not None}
    backbone = models.build(config.model.name, image_size=config.model.image_size, **chosen)
    if model.has_decoder:
        return MAE(backbone, dataclasses.replace(config.mae, predict=1.0), config.train.seed)
    if "head.bias" not in state:
        return Objective(backbone, config.train.seed)
    if model.verb == "probe":
        return Probe(backbone, len(state["head.bias"]), chunk=1, seed=config.train.seed)
    return Finetune(backbone, len(state["head.bias"]), drop_path=0.0, label_smoothing=0.0, seed=0)


def make_run(reading: Reading, source: Path, out: Path) -> None:
    """Write the run's folder, whole or not at all: settings, one checkpoint, and where it comes from."""
    model, device = reading.model, dist.setup()
    config = dataclasses.replace(model.config, out=str(out))
    with weights.locate(source)[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    origin = {"from": str(source), "format": reading.house, "sha256": digest} | said(reading)
    with files.whole(out, "--out") as temporary:
        run = RunDir(temporary)
        run.open(model.verb, config, model.data_fingerprint)
        run.save(model.step, {f"model.{name}": tensor for name, tensor in model.state.items()}, keep=1)
        run.record_launch(model.step, device)
        run.finish({"verb": model.verb, "imported": origin})
