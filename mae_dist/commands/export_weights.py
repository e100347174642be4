"""`mae-dist export RUN --to timm|hf|fb|npz|safetensors --out PATH`: a run's newest checkpoint as another house's file.

What was written is read again as `import` would read it; both models are given the same images, and unless they agree
to the last bit nothing is left at PATH.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mae_dist import dist
from mae_dist.batch import Batch
from mae_dist.cli import Parser
from mae_dist.commands.import_weights import build, read
from mae_dist.objectives import Objective
from mae_dist.objectives.mae import MAE
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of
from mae_dist.schema import RANDOM
from mae_dist.weights import HOUSES, Given, Model, files

log = logging.getLogger(__name__)

NUM_IMAGES = 4
"""Images of noise that both models are given."""


def main(argv: list[str]) -> int:
    """Run `mae-dist export ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist export", description="Write a run's newest checkpoint for another house.")
    parser.add_argument("folder", metavar="RUN", help="folder of the run")
    parser.add_argument("--to", choices=HOUSES, required=True, help="whose format")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the new file; hf, safetensors: folder")
    arguments = parser.parse_args(argv)
    house, path = HOUSES[arguments.to], arguments.out
    if house.SUFFIXES and path.suffix not in house.SUFFIXES:
        raise ValueError(f"--out {path}: a file of {arguments.to} ends in {' or '.join(house.SUFFIXES)}")
    if not house.SUFFIXES and path.suffix in files.SUFFIXES:
        of_files = " or ".join(name for name in HOUSES if HOUSES[name].SUFFIXES)
        raise ValueError(
            f"--out {path}: {arguments.to} is a folder, whose name does not end in {path.suffix}; try --out "
            f"{path.with_suffix('')}, or --to {of_files} for one file"
        )
    files.refuse_existing(path, "--out")
    dist.setup()
    model, heads = without_board(load(RunDir.existing(arguments.folder, "RUN")))
    ours = build(model, arguments.folder)
    tensors, left_out = house.theirs(model)
    with files.whole(path, "--out") as temporary:
        try:
            house.write(tensors, model, temporary)
        except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own
            raise ValueError(f"--out {path}: could not be written (disk full?): {files.one_line(error)}") from error
        again = read(temporary, Given())
        lost = numbers(tensors) - numbers(again.model.state)
        if lost:
            raise ValueError(f"--out {path}: read again it has lost {lost:,} numbers; nothing is left of it")
        gaps = differences(ours, build(again.model, str(path)))
        if any(gap != 0 for gap in gaps.values()):
            raise ValueError(f"--out {path}: read again it differs ({told(gaps)}); nothing is left of it")
    print(f"{path}: step {model.step:,} of {arguments.folder} for {arguments.to}, {len(tensors)} tensors")
    for sentence in heads + left_out:
        print(f"  left out: {sentence}")
    print(f"  read again, largest difference on {NUM_IMAGES} images: {told(gaps)}")
    print(f"  use it:   {house.usage(model, path)}")
    return 0


def load(run: RunDir) -> Model:
    """The model in a run's newest checkpoint, with its averaged weights where it has them."""
    verb, fingerprint, config = run.settings()
    if verb == "knn":
        trained = "one that trains" if config.init_from == RANDOM else f"its init_from={config.init_from}"
        raise ValueError(f"RUN={run.path}: a knn run trains nothing; export {trained} instead")
    newest = run.newest()
    if newest is None:
        raise ValueError(f"RUN={run.path}: has no checkpoint yet; wait for its first, or give its {verb} command again")
    if run.result() is None:
        log.warning("RUN=%s: this run is not finished; exporting its checkpoint %s", run.path, newest.name)
    shapes = checkpoint.names_in(newest)
    names = [name.removeprefix("model.") for name in shapes if name.startswith("model.")]
    stored = {name: checkpoint.trained(shapes, name) for name in names}
    state = {name: torch.empty(shapes[name]) for name in stored.values()}
    checkpoint.load(newest, state)
    named = {name: state[where] for name, where in stored.items()}
    return Model(verb, config, named, step_of(newest), fingerprint)


def without_board(model: Model) -> tuple[Model, list[str]]:
    """(The model, of a probe board the backbone alone, since no house has a place for many heads; what is left out.)"""
    if model.verb != "probe" or not model.config.heads.active:
        return model, []
    backbone = {name: tensor for name, tensor in model.state.items() if name.startswith("backbone.")}
    num_heads = sum(name.startswith("linears.") and name.endswith(".bias") for name in model.state)
    methods = [method for method in ("lars", "sgd", "adamw") if getattr(model.config.heads, method)]
    heads = f"the probe board's heads, {num_heads} in all ({', '.join(methods)}), which stay in the run"
    return dataclasses.replace(model, state=backbone), [heads] if num_heads else []


@torch.no_grad()
def differences(first: Objective, second: Objective) -> dict[str, float]:
    """Largest absolute difference of what both give for the same images: features, and logits or pixels."""
    size, zeros = first.backbone.image_size, torch.zeros(NUM_IMAGES, dtype=torch.int64)
    images = torch.randn(NUM_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, zeros, torch.arange(NUM_IMAGES), zeros, zeros.bool())
    pairs = {"features": [objective.backbone(images) for objective in (first, second)]}
    if type(first) is type(second) and type(first) is not Objective:
        if isinstance(first, MAE) and isinstance(second, MAE):
            mask = first.mask(batch)
            pairs["pixel predictions"] = [objective.predict(images, mask) for objective in (first, second)]
        else:
            pairs["logits"] = [objective(batch).prediction for objective in (first, second)]
    return {what: (a - b).abs().max().item() for what, (a, b) in pairs.items()}


def numbers(state: dict[str, Tensor]) -> int:
    """How many, in all tensors together: a change of names and shapes keeps them all."""
    return sum(tensor.numel() for tensor in state.values())


def told(gaps: dict[str, float]) -> str:
    """The differences in words."""
    return ", ".join(f"{what} {gap:g}" for what, gap in gaps.items())
