"""`mae-dist replay RUN --step N [--rank R]`: a past step again: its samples, crops and masks, losses and gradient.

Everything but the weights follows from the settings, so only those are loaded: of the newest checkpoint before the
step. When that is the very step before, loss and gradient are those of the run; else they are approximate, and it says
how much older the weights are (checkpoint.keep_every keeps some). Writes a picture and a table into the run's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, image_grid, parallel
from mae_dist.batch import Batch
from mae_dist.cli import VERBS, Parser
from mae_dist.data.order import num_micro, share
from mae_dist.data.views import denormalise
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Probe
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run import checkpoint, tracker
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of, write_text
from mae_dist.stages.setup import Setup, build_setup

SHOWN = 16
"""Samples in the picture and in the printed table: those with the largest loss."""


def main(argv: list[str]) -> int:
    """Run `mae-dist replay ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist replay", description="Compute a past step of a run again, and show what was in it.")
    parser.add_argument("folder", metavar="RUN", help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="which step, 1 for the first")
    parser.add_argument("--rank", type=int, help="only the share of this rank (default: the whole global batch)")
    parser.add_argument("--data", help="where the data lie now, if they were moved")
    parser.add_argument("--out", type=Path, help="folder for picture and table (default: RUN/replay/step-N)")
    arguments = parser.parse_args(argv)
    run = RunDir.existing(arguments.folder, "RUN")
    verb, data_fingerprint, settings = run.settings()
    data_fingerprint = run.started(arguments.step).get("data_fingerprint", data_fingerprint)
    setup = reopen(run, verb, settings, data_fingerprint, arguments.data)
    last = config.total_steps(settings.train, len(setup.train_split))
    if not 1 <= arguments.step <= last:
        raise ValueError(f"--step {arguments.step}: the run has steps 1 to {last}")
    part = share_of(run, arguments.step, arguments.rank)
    objective = importlib.import_module(VERBS[verb].module).build(setup)
    weights = load_weights(run, setup, objective, arguments.step)
    found = again(setup, objective, arguments.step, part)
    whose = "" if arguments.rank is None else f"-rank-{arguments.rank}"
    out = arguments.out or run.path / "replay" / f"step-{arguments.step:09d}{whose}"
    show(run, setup, objective, arguments, weights, part, found, out)
    return 0


def reopen(run: RunDir, verb: str, settings: Any, data_fingerprint: str, path: str | None) -> Setup:
    """The run's data and model, on one process (ValueError when the data are not those of the run)."""
    if verb == "knn":
        raise ValueError(f"RUN={run.path}: a knn run has no steps")
    machine = dataclasses.replace(settings.machine, processes=1, strategy="ddp", workers=0)
    data = dataclasses.replace(settings.data, path=path or settings.data.path)
    if not data.path.endswith(".tar") and not Path(data.path).is_dir():
        raise ValueError(f"data.path={data.path}: no such folder; say with --data where the data of the run lie now")
    setup = build_setup(
        verb, dataclasses.replace(settings, machine=machine, data=data, out=str(run.path)), verb != "pretrain"
    )
    if setup.data_fingerprint != data_fingerprint:
        raise ValueError(
            f"data.path={data.path}: these are not the data that this step of {run.path} was trained on "
            f"(fingerprint {setup.data_fingerprint}, not {data_fingerprint}); say with --data where those lie"
        )
    return setup


def share_of(run: RunDir, step: int, rank: int | None) -> tuple[int, int]:
    """(rank, world) of what is to be computed: a rank as the run had it at that step, or everything as (0, 1)."""
    if rank is None:
        return 0, 1
    world = run.started(step).get("world", 1)
    if not 0 <= rank < world:
        raise ValueError(f"--rank {rank}: step {step} was computed by ranks 0 to {world - 1}")
    return rank, world


def load_weights(run: RunDir, setup: Setup, objective: Objective, step: int) -> int:
    """Fill the objective from the newest whole checkpoint before the step; give the step of these weights."""
    objective.to(setup.device).train()
    for path in reversed(run.checkpoints()):
        if step_of(path) < step and checkpoint.verify(path) is None:
            checkpoint.load(path, {f"model.{name}": tensor for name, tensor in objective.state_dict().items()})
            return step_of(path)
    setup.load_initial_weights(objective.backbone)
    return 0


@dataclasses.dataclass(frozen=True)
class Again:
    """A step computed again: its samples, their losses, the loss as the run records it, and the gradient's norm."""

    batch: Batch
    prediction: torch.Tensor
    losses: list[float]
    loss: float
    grad_norm: float


def again(setup: Setup, objective: Objective, step: int, part: tuple[int, int]) -> Again:
    """Forward and backward of the step's samples, or of one rank's."""
    settings, source = setup.config, setup.source(setup.train_split, training=True)
    group = config.group(settings)
    first, last = share(settings.train.global_batch, *part, group)
    micro = 1 if settings.machine.micro_batch == "auto" else num_micro(last - first, 1, setup.micro_batch, group)
    if isinstance(objective, Probe | ProbeHeads):
        micro = 1  # its batch norm sees the whole batch
    batches, outputs = [], []
    for batch in setup.training_batches(source, micro, range(step - 1, step), setup.left_out(), part):
        with parallel.autocast(settings.train.precision, setup.device):
            output = objective(batch)
        (output.loss.sum() / settings.train.global_batch).backward()
        batches.append(batch)
        outputs.append((output.loss.detach().float(), output.prediction.detach()))
    losses, predictions = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    norm = parallel.gradient_norm([p for p in objective.parameters() if p.requires_grad])
    whole = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    return Again(whole, predictions, losses.tolist(), float(losses.double().mean()), float(norm))


def show(
    run: RunDir, setup: Setup, objective: Objective, arguments: argparse.Namespace, weights: int,
    part: tuple[int, int], found: Again, out: Path,
) -> None:  # fmt: skip
    """Print and write what was found."""
    step, batch = arguments.step, found.batch
    rows = [
        {"id": id_, "epoch": epoch, "key": setup.train_split.describe(id_), "label": label, "loss": loss}
        for id_, epoch, label, loss in zip(
            batch.ids.tolist(), batch.epochs.tolist(), batch.labels.tolist(), found.losses, strict=True
        )
    ]
    worst = np.argsort([-loss if np.isfinite(loss) else -np.inf for loss in found.losses], kind="stable")[:SHOWN]
    recorded = next((r for r in tracker.read(run.path / "metrics.jsonl") if r["step"] == step and "lr" in r), {})
    numbers = {
        "step": step, "rank": arguments.rank, "world": part[1], "weights_of_step": weights, "loss": found.loss,
        "grad_norm": found.grad_norm, "recorded_loss": recorded.get("loss"),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    masks = {"visible": objective.mask(batch).visible.tolist()} if isinstance(objective, MAE) else {}
    write_text(out / "replay.json", json.dumps(numbers | {"samples": rows} | masks, indent=1) + "\n")
    sheet(setup, objective, found, worst.tolist()).save(out / "replay.png")

    table = Table("sample", "id", "epoch", "label", "loss", title=f"the largest losses of {len(rows)} samples")
    for i in worst:
        row = rows[i]
        table.add_row(row["key"], str(row["id"]), str(row["epoch"]), str(row["label"]), f"{row['loss']:.6f}")
    Console().print(table)
    age = step - 1 - weights
    with_ = (
        "the weights it had"
        if age == 0
        else (
            f"the weights of step {weights}, {age} older (APPROXIMATE: no checkpoint nearer; see checkpoint.keep_every)"
        )
    )
    print(f"step {step} with {with_}")
    whose = "" if part[1] == 1 else f" of the {len(rows)} samples of rank {part[0]}, of {part[1]}"
    print(f"computed now{whose}: mean loss {found.loss:.8f}  gradient norm {found.grad_norm:.6f}")
    if part[1] == 1 and "loss" in recorded:
        print(f"recorded by the run: mean loss {recorded['loss']:.8f}  gradient norm {recorded.get('grad_norm', '?')}")
    print(f"{out} holds replay.json (ids, keys, losses, masks) and replay.png")


def sheet(setup: Setup, objective: Objective, found: Again, chosen: list[int]) -> Any:
    """The chosen samples as the model saw them; for MAE also what was hidden and what it made of it."""
    batch = Batch(*(part[chosen] for part in found.batch))
    data = setup.config.data
    looks = [batch.images]
    if isinstance(objective, MAE):
        looks = objective.pictures(batch, found.prediction[chosen].float())
    return image_grid.sheet(
        [list(denormalise(look, data.mean, data.std)) for look in looks], [str(i) for i in batch.ids.tolist()]
    )
