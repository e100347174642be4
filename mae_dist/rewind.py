"""What a run does about consecutive non-finite steps, beyond skipping them: rewind, try again, leave samples out.

After `checkpoint.rewind_after` non-finite steps in a row the run goes back to its last checkpoint. First the batches of
those steps are computed again with the present weights. Samples whose loss is non-finite again are left out from there
on, and the next sample of their shard takes their place. If there is none, the fault was the machine's, and the steps
are tried again with the same samples; if they fail once more, all their samples are left out. An event `rewind` and a
folder in forensics/ record what was found. Knows no loop: `train` calls it.
"""

import json
import logging
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
from mae_dist.run import events, jsonl
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of

log = logging.getLogger(__name__)

SHOWN = 32
"""Samples in the picture of a step in forensics/."""


class Evidence(NamedTuple):
    """A step computed again: all ranks' samples in the order of the global batch, and the first `SHOWN` images."""

    ids: Int[Tensor, " b"]
    epochs: Int[Tensor, " b"]
    loss: Float[Tensor, " b"]
    images: Float[Tensor, "shown c h w"]


def consecutive(steps: list[int], count: int) -> list[int]:
    """The first run of at least `count` consecutive numbers in an ascending list; [] where there is none."""
    run: list[int] = []
    for step in steps:
        if run and step != run[-1] + 1 and len(run) < count:
            run = []
        if run and step != run[-1] + 1:
            break
        run.append(step)
    return run if len(run) >= count else []


def left_out(path: Path, global_batch: int) -> dict[int, int]:
    """Sample id -> position in the stream from which on the run in the folder `path` leaves this sample out."""
    positions: dict[int, int] = {}
    for event in events.of(path, "rewind"):
        positions |= {id_: event["to"] * global_batch for id_ in event["left_out"] if id_ not in positions}
    return positions


def refuse_too_many(path: Path, skipped: int, budget: int) -> None:
    """Raise ValueError when more than `budget` steps were non-finite: the `skipped` and the rewound ones."""
    total = skipped + sum(len(event["nonfinite"]) for event in events.of(path, "rewind"))
    if total > budget:
        raise ValueError(
            f"{total} steps were not finite, more than checkpoint.max_skipped={budget} allows: lower optim.base_lr, "
            f"set train.clip_grad=1, or use train.precision=fp32; {path}/forensics shows samples of rewound steps"
        )


def rewind(
    run: RunDir, objective: Objective, nonfinite: list[int], step: int, precision: str,
    batches: Callable[[range], Iterator[Batch]], sample_name: Callable[[int], str],
) -> None:  # fmt: skip
    """Examine the `nonfinite` steps and record the checkpoint that the run, now after `step`, must restore, and the
    samples that it must leave out. Called by all ranks together.

    Raises ValueError when there is no checkpoint before those steps.
    """
    target = dist.run_on_rank0(lambda: str(run.newest(before=nonfinite[0]) or ""))
    if not target:
        raise ValueError(
            f"steps {nonfinite[0]} to {nonfinite[-1]} were not finite and there is no checkpoint yet to go back to: "
            f"lower optim.base_lr, set train.clip_grad=1, or use train.precision=fp32"
        )
    evidence = [examine(objective, batches(range(number - 1, number)), precision) for number in nonfinite]
    dist.run_on_rank0(
        lambda: record(run, step, step_of(Path(target)), dict(zip(nonfinite, evidence, strict=True)), sample_name)
    )


@torch.no_grad()
def examine(objective: Objective, batches: Iterable[Batch], precision: str) -> Evidence:
    """Losses of a step's samples with the present weights; called by all ranks together."""
    ids, epochs, losses, images = [], [], [], []
    for batch in batches:
        with parallel.autocast(precision, batch.images.device):
            losses.append(objective(batch).loss.float())
        ids.append(batch.ids)
        epochs.append(batch.epochs)
        images.append(batch.images)
    shown = torch.cat(images)[:SHOWN].float()
    found = [dist.gather(torch.cat(part)) for part in (ids, epochs, losses)]
    return Evidence(found[0], found[1], found[2], dist.gather(shown)[:SHOWN])


def record(run: RunDir, step: int, to: int, evidence: dict[int, Evidence], sample_name: Callable[[int], str]) -> None:
    """Write forensics/ and the event of a rewind from `step` to the checkpoint of step `to`, and decide which samples
    to leave out: those with a non-finite loss, or all of steps that fail for the second time.
    """
    first, last = min(evidence), max(evidence)
    ids, losses = (torch.cat([getattr(found, name) for found in evidence.values()]) for name in ("ids", "loss"))
    offenders = ids[~losses.isfinite()].unique().tolist()
    again = any(set(event["nonfinite"]) & set(evidence) for event in events.of(run.path, "rewind"))
    excluded = offenders or (ids.unique().tolist() if again else [])
    run.forget(first)  # a stop within these steps may have saved
    bundle = run.path / "forensics" / f"step-{first:09d}"
    bundle.mkdir(parents=True, exist_ok=True)
    for number, found in evidence.items():
        write_bundle(bundle, number, found, sample_name)
    events.append(run.path, "rewind", step=step, to=to, nonfinite=list(evidence), left_out=excluded)
    what = f"without {len(excluded)} samples" if excluded else "with the same samples, whose losses are finite now"
    log.warning("steps %d to %d were not finite: back to step %d, %s; see %s", first, last, to, what, bundle)


def write_bundle(folder: Path, step: int, evidence: Evidence, sample_name: Callable[[int], str]) -> None:
    """Write step-N.json (id, epoch, name and loss of each sample) and step-N.png (the first images as the model got
    them).
    """
    rows = [
        {"id": id_, "epoch": epoch, "key": sample_name(id_), "loss": loss if finite else str(loss)}
        for id_, epoch, loss, finite in zip(
            *(part.tolist() for part in evidence[:3]), evidence.loss.isfinite().tolist(), strict=True
        )
    ]
    statistics = {
        "mean": float(evidence.images.mean()), "std": float(evidence.images.std()),
        "finite": bool(evidence.images.isfinite().all()),
    }  # fmt: skip
    text = json.dumps({"step": step, "images": statistics, "samples": rows}, indent=1)
    jsonl.write_atomic(folder / f"step-{step:09d}.json", text + "\n")
    image_grid.sheet(as_rows(evidence.images)).save(folder / f"step-{step:09d}.png")


def as_rows(images: Float[Tensor, "b c h w"], columns: int = 8) -> list[list[Any]]:
    """Normalised images as 8-bit pixels, each stretched to its own range, in rows for `image_grid.sheet`."""
    low, high = images.nan_to_num().amin((1, 2, 3), True), images.nan_to_num().amax((1, 2, 3), True)
    pixels = ((images.nan_to_num() - low) / (high - low).clamp(min=1e-6) * 255).byte()
    shown = list(rearrange(pixels, "b c h w -> b h w c").cpu().numpy())
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]
