"""`mae-dist replay RUN --step N [--rank R]`: recompute a past step: its samples, crops, masks, losses and gradient.

Everything but the weights follows from the settings. The weights come from the newest checkpoint before the step. If
that is of the step just before, loss and gradient equal those of the run; otherwise they are approximate, and the age
of the weights is printed (checkpoint.keep_every keeps more checkpoints). Writes replay.json and replay.png.
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
from mae_dist.run import checkpoint, jsonl
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of
from mae_dist.stages.setup import Setup, build_setup

SHOWN = 16
"""Number of samples in the picture and in the printed table: those with the largest loss."""


def main(argv: list[str]) -> int:
    """Run `mae-dist replay ARGV` and return its exit status."""
    parser = Parser(prog="mae-dist replay", description="Recompute a past step of a run and show its samples.")
    parser.add_argument("folder", metavar="RUN", help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="the step, 1 for the first")
    parser.add_argument(
        "--rank", type=int, help="only this rank's share of the batch (default: the whole global batch)"
    )
    parser.add_argument("--data", help="folder of the data now, if they were moved")
    parser.add_argument("--out", type=Path, help="folder for replay.json and replay.png (default: RUN/replay/step-N)")
    arguments = parser.parse_args(argv)
    run = RunDir.existing(arguments.folder, "RUN")
    verb, data_fingerprint, settings = run.settings()
    data_fingerprint = run.launch_before(arguments.step).get("data_fingerprint", data_fingerprint)
    setup = reopen(run, verb, settings, data_fingerprint, arguments.data)
    last = config.total_steps(settings.train, len(setup.train_split))
    if not 1 <= arguments.step <= last:
        raise ValueError(f"--step {arguments.step}: the run has steps 1 to {last}")
    part = share_of(run, arguments.step, arguments.rank)
    objective = importlib.import_module(VERBS[verb].module).build(setup)
    weights = load_weights(run, setup, objective, arguments.step)
    found = recompute(setup, objective, arguments.step, part)
    suffix = "" if arguments.rank is None else f"-rank-{arguments.rank}"
    out = arguments.out or run.path / "replay" / f"step-{arguments.step:09d}{suffix}"
    show(run, setup, objective, arguments, weights, part, found, out)
    return 0


def reopen(run: RunDir, verb: str, settings: Any, data_fingerprint: str, path: str | None) -> Setup:
    """The run's setup in one process. Raises ValueError when the data are not those of the run."""
    if verb == "knn":
        raise ValueError(f"RUN={run.path}: a knn run has no steps")
    machine = dataclasses.replace(settings.machine, processes=1, strategy="ddp", workers=0)
    data = dataclasses.replace(settings.data, path=path or settings.data.path)
    setup = build_setup(
        verb, dataclasses.replace(settings, machine=machine, data=data, out=str(run.path)), verb != "pretrain"
    )
    if setup.data_fingerprint != data_fingerprint:
        raise ValueError(
            f"data.path={data.path}: not the data that this step of {run.path} was trained on (fingerprint "
            f"{setup.data_fingerprint}, not {data_fingerprint}); pass --data with the folder of those"
        )
    return setup


def share_of(run: RunDir, step: int, rank: int | None) -> tuple[int, int]:
    """(rank, world) of the share to recompute: a rank of the run at that step, or (0, 1) for the whole batch."""
    if rank is None:
        return 0, 1
    world = run.launch_before(step).get("ranks", 1)
    if not 0 <= rank < world:
        raise ValueError(f"--rank {rank}: step {step} was computed by ranks 0 to {world - 1}")
    return rank, world


def load_weights(run: RunDir, setup: Setup, objective: Objective, step: int) -> int:
    """Load the newest intact checkpoint before the step into the objective; return the step of its weights."""
    objective.to(setup.device).train()
    for path in reversed(run.checkpoints()):
        if step_of(path) < step and checkpoint.verify(path) is None:
            checkpoint.load(path, {f"model.{name}": tensor for name, tensor in objective.state_dict().items()})
            return step_of(path)
    setup.load_initial_weights(objective)
    return 0


@dataclasses.dataclass(frozen=True)
class Replay:
    """A recomputed step: samples, predictions, each sample's loss, the mean loss, and the norm of the gradient."""

    batch: Batch
    prediction: torch.Tensor
    losses: list[float]
    loss: float
    grad_norm: float


def recompute(setup: Setup, objective: Objective, step: int, part: tuple[int, int]) -> Replay:
    """Forward and backward pass of the step's samples, or of one rank's share of them."""
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
    return Replay(whole, predictions, losses.tolist(), float(losses.double().mean()), float(norm))


def show(
    run: RunDir, setup: Setup, objective: Objective, arguments: argparse.Namespace, weights: int,
    part: tuple[int, int], found: Replay, out: Path,
) -> None:  # fmt: skip
    """Print the table and write replay.json and replay.png."""
    step, batch = arguments.step, found.batch
    rows = [
        {"id": id_, "epoch": epoch, "key": setup.train_split.sample_name(id_), "label": label, "loss": loss}
        for id_, epoch, label, loss in zip(
            batch.ids.tolist(), batch.epochs.tolist(), batch.labels.tolist(), found.losses, strict=True
        )
    ]
    worst = np.argsort([-loss if np.isfinite(loss) else -np.inf for loss in found.losses], kind="stable")[:SHOWN]
    recorded = next((r for r in jsonl.steps(run.path / "metrics.jsonl") if r["step"] == step), {})
    numbers = {
        "step": step, "rank": arguments.rank, "world": part[1], "weights_of_step": weights, "loss": found.loss,
        "grad_norm": found.grad_norm, "recorded_loss": recorded.get("loss"),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    masks = {"visible": objective.mask(batch).visible.tolist()} if isinstance(objective, MAE) else {}
    jsonl.write_atomic(out / "replay.json", json.dumps(numbers | {"samples": rows} | masks, indent=1) + "\n")
    sheet(setup, objective, found, worst.tolist()).save(out / "replay.png")

    table = Table("sample", "id", "epoch", "label", "loss", title=f"the largest losses of {len(rows)} samples")
    for i in worst:
        row = rows[i]
        table.add_row(row["key"], str(row["id"]), str(row["epoch"]), str(row["label"]), f"{row['loss']:.6f}")
    Console().print(table)
    age = step - 1 - weights
    approximate = f"weights of step {weights}, {age} steps older (APPROXIMATE: see checkpoint.keep_every)"
    print(f"step {step} with {approximate if age else 'the weights that the run had'}")
    scope = "" if part[1] == 1 else f" for the {len(rows)} samples of rank {part[0]} of {part[1]}"
    print(f"recomputed{scope}: mean loss {found.loss:.8f}  gradient norm {found.grad_norm:.6f}")
    if part[1] == 1 and "loss" in recorded:
        print(f"recorded by the run: mean loss {recorded['loss']:.8f}  gradient norm {recorded.get('grad_norm', '?')}")
    print(f"wrote replay.json (ids, keys, losses, masks) and replay.png to {out}")


def sheet(setup: Setup, objective: Objective, found: Replay, chosen: list[int]) -> Any:
    """An image grid of the chosen samples as the model saw them; for MAE also masked and reconstructed."""
    batch = Batch(*(part[chosen] for part in found.batch))
    data = setup.config.data
    rows = [batch.images]
    if isinstance(objective, MAE):
        rows = objective.pictures(batch, found.prediction[chosen].float())
    return image_grid.sheet(
        [list(denormalise(images, data.mean, data.std)) for images in rows], [str(i) for i in batch.ids.tolist()]
    )
