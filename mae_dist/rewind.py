"""What a run does about steps that are not finite, beyond skipping them: go back, try again, leave out, explain.

After `checkpoint.rewind_after` such steps in a row the run goes back to its last checkpoint. First their batches are
computed again with the weights at hand. Samples whose loss is not finite again are to blame, and are left out from
there on; the next sample of their shard takes their place. If none is, the fault was the machine's and the same steps
are tried as they were; should they fail once more, all their samples are left out. A line in rewinds.jsonl and a
folder in forensics/ say what was found. Knows no loop: `train` calls it and goes on where it says.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mae_dist import dist, image_grid, parallel
from mae_dist.batch import Batch
from mae_dist.objectives import Objective
from mae_dist.run import tracker
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of, write_text
from mae_dist.schema import RunConfig

log = logging.getLogger(__name__)

FILE = "rewinds.jsonl"
SHOWN = 32
"""Samples in the picture of a bundle."""


class Evidence(NamedTuple):
    """A step computed again, all ranks' samples in the order of the global batch."""

    ids: Int[Tensor, " b"]
    epochs: Int[Tensor, " b"]
    loss: Float[Tensor, " b"]
    images: Float[Tensor, "shown c h w"]


def in_a_row(steps: list[int], count: int) -> list[int]:
    """The first run of at least `count` consecutive numbers in an ascending list; none: []."""
    run: list[int] = []
    for step in steps:
        if run and step != run[-1] + 1 and len(run) < count:
            run = []
        if run and step != run[-1] + 1:
            break
        run.append(step)
    return run if len(run) >= count else []


def read(path: Path) -> list[dict[str, Any]]:
    """The rewinds of a run, oldest first."""
    return tracker.read(path / FILE)


def left_out(path: Path, global_batch: int) -> dict[int, int]:
    """Sample id -> position of the stream from which on it is left out."""
    places: dict[int, int] = {}
    for rewind in read(path):
        places |= {id_: rewind["to"] * global_batch for id_ in rewind["left_out"] if id_ not in places}
    return places


def refuse_too_many(path: Path, skipped: int, budget: int) -> None:
    """End the run when more steps than `budget` were not finite, those that were done again included (ValueError)."""
    total = skipped + sum(len(rewind["nonfinite"]) for rewind in read(path))
    if total > budget:
        raise ValueError(
            f"{total} steps were not finite, more than checkpoint.max_skipped={budget} allows: lower optim.base_lr, "
            f"set train.clip_grad=1, or use train.precision=fp32; {path}/forensics shows their samples"
        )


@torch.no_grad()
def examine(objective: Objective, batches: Iterable[Batch], config: RunConfig, device: torch.device) -> Evidence:
    """Losses of a step's samples with the weights at hand; called by all ranks together."""
    ids, epochs, losses, images = [], [], [], []
    for batch in batches:
        with parallel.autocast(config.train.precision, device):
            losses.append(objective(batch).loss.float())
        ids.append(batch.ids)
        epochs.append(batch.epochs)
        images.append(batch.images)
    shown = torch.cat(images)[:SHOWN].float()
    found = [dist.gather(torch.cat(part)) for part in (ids, epochs, losses)]
    return Evidence(found[0], found[1], found[2], dist.gather(shown)[:SHOWN])


def go_back(
    *, run: RunDir, config: RunConfig, objective: Objective, nonfinite: list[int], step: int,
    batches: Callable[[range], Iterator[Batch]], describe: Callable[[int], str], device: torch.device,
) -> None:  # fmt: skip
    """Find out about the steps that were not finite, and write down where the run goes back to and without whom.

    Raises ValueError when there is no checkpoint to go back to.
    """
    newest = dist.run_on_rank0(lambda: run.newest(before=nonfinite[0]))
    if newest is None:
        raise ValueError(
            f"steps {nonfinite[0]} to {nonfinite[-1]} were not finite and there is no checkpoint yet to go back to: "
            f"lower optim.base_lr, set train.clip_grad=1, or use train.precision=fp32"
        )
    evidence = [examine(objective, batches(range(s - 1, s)), config, device) for s in nonfinite]
    ids, losses = torch.cat([e.ids for e in evidence]), torch.cat([e.loss for e in evidence])
    offenders = ids[~losses.isfinite()].unique().tolist()

    def write() -> None:
        run.forget(nonfinite[0])  # a stop within these steps may have saved
        again = any(set(rewind["nonfinite"]) & set(nonfinite) for rewind in read(run.path))
        blamed = offenders or (ids.unique().tolist() if again else [])
        bundle = run.path / "forensics" / f"step-{nonfinite[0]:09d}"
        bundle.mkdir(parents=True, exist_ok=True)
        for number, found in zip(nonfinite, evidence, strict=True):
            write_bundle(bundle, number, found, describe)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "to": step_of(newest), "nonfinite": nonfinite,
            "left_out": blamed,
        }  # fmt: skip
        with (run.path / FILE).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        what = f"without {len(blamed)} samples" if blamed else "with the same samples, whose losses are finite now"
        log.warning(
            "steps %d to %d were not finite: back to step %d, %s; %s tells more",
            nonfinite[0], nonfinite[-1], step_of(newest), what, bundle,
        )  # fmt: skip

    dist.run_on_rank0(write)


def write_bundle(folder: Path, step: int, evidence: Evidence, describe: Callable[[int], str]) -> None:
    """step-N.json (each sample's id, epoch, key, loss) and step-N.png (the first samples as the model saw them)."""
    rows = [
        {"id": id_, "epoch": epoch, "key": describe(id_), "loss": loss if torch.tensor(loss).isfinite() else str(loss)}
        for id_, epoch, loss in zip(*(part.tolist() for part in evidence[:3]), strict=True)
    ]
    statistics = {
        "mean": float(evidence.images.mean()), "std": float(evidence.images.std()),
        "finite": bool(evidence.images.isfinite().all()),
    }  # fmt: skip
    text = json.dumps({"step": step, "images": statistics, "samples": rows}, indent=1)
    write_text(folder / f"step-{step:09d}.json", text + "\n")
    image_grid.sheet(as_rows(evidence.images)).save(folder / f"step-{step:09d}.png")


def as_rows(images: Float[Tensor, "b c h w"], columns: int = 8) -> list[list[Any]]:
    """Normalised images as 8-bit pixels, each stretched to its own range, in rows for `image_grid.sheet`."""
    low, high = images.nan_to_num().amin((1, 2, 3), True), images.nan_to_num().amax((1, 2, 3), True)
    pixels = ((images.nan_to_num() - low) / (high - low).clamp(min=1e-6) * 255).byte()
    shown = list(rearrange(pixels, "b c h w -> b h w c").cpu().numpy())
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]
