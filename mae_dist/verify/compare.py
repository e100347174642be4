"""Comparison of two runs by their folders: losses, gradient norms, samples, and the tensors of the last checkpoint.

`certify`, `chaos` and the SLURM tests stand on this. Starts no process and prints nothing. Steps are counted from 1:
step n takes the samples from position (n - 1) * global_batch up to n * global_batch of the stream.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mae_dist.data.index import open_split
from mae_dist.data.order import Order, mixed
from mae_dist.run import checkpoint, jsonl, tracker
from mae_dist.run.layout import checkpoints
from mae_dist.schema import RunConfig

Samples = list[tuple[int, int]]
"""(epoch, sample id) pairs in the order of the global batch."""
KEY_BIAS = "attn.qkv.bias"


@dataclass(frozen=True)
class Evidence:
    """A run so far: by step its loss, gradient norm and samples; by name the tensors of its last checkpoint.

    A loss is NaN where a step is recorded twice, or was skipped although no loss scale explains it. Gradient norms that
    are not finite (fp16 may overflow) are absent. `state` is {} if there is no checkpoint or the last one is damaged.
    """

    losses: dict[int, float]
    grad_norms: dict[int, float]
    samples: dict[int, Samples]
    state: dict[str, Tensor]


def read_evidence(run: Path) -> Evidence:
    """Read metrics.jsonl, ids.jsonl and the last checkpoint of a run's folder, finished or not."""
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    for record in jsonl.steps(run / "metrics.jsonl"):
        step, broken = record["step"], tracker.is_fault(record) or record["step"] in losses
        losses[step] = math.nan if broken else record.get("loss", math.nan)
        if "grad_norm" in record:
            norms[step] = record["grad_norm"]
    samples: dict[int, Samples] = {}
    for line in jsonl.read(run / "ids.jsonl"):
        samples.setdefault(line["step"], []).extend(zip(line["epochs"], line["ids"], strict=True))
    return Evidence(losses, norms, samples, last_state(run))


def last_state(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint, whatever ranks wrote it; {} if there is none or it is damaged."""
    paths = checkpoints(run)
    if not paths or checkpoint.verify(paths[-1]) is not None:
        return {}
    state = {name: torch.full(shape, torch.nan) for name, shape in checkpoint.names_in(paths[-1]).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there may be no process group
        checkpoint.load(paths[-1], state)
    return state


def planned_order(config: RunConfig) -> Order:
    """The order of samples that follows from a run's settings and data."""
    data = config.data
    parts = open_split(data.path, data.split, allow_outside=data.allow_outside).counts_of_parts
    return mixed(config.train.seed, parts, data.weights, data.shuffle_window, repeats=data.aug_repeats)


def planned_samples(order: Order, global_batch: int, steps: Iterable[int]) -> dict[int, Samples]:
    """The samples that each of these steps must take."""
    planned: dict[int, Samples] = {}
    for step in steps:
        epochs, ids = order.at((step - 1) * global_batch, step * global_batch)
        planned[step] = list(zip(epochs.tolist(), ids.tolist(), strict=True))
    return planned


@dataclass(frozen=True)
class SampleErrors:
    """How many samples were left out, taken too often, or taken in another order than planned."""

    lost: int
    repeated: int
    moved: int


def count_sample_errors(found: dict[int, Samples], planned: dict[int, Samples], steps: range) -> SampleErrors:
    """Compare the samples of these steps with the plan.

    A lost or repeated sample shifts all later ones, so `moved` is counted only if none was lost or repeated.
    """
    wanted = [sample for step in steps for sample in planned[step]]
    taken = [sample for step, samples in found.items() if step in steps for sample in samples]
    lost = (Counter(wanted) - Counter(taken)).total()
    repeated = (Counter(taken) - Counter(wanted)).total()
    complete = not lost and not repeated
    return SampleErrors(lost, repeated, sum(a != b for a, b in zip(wanted, taken, strict=True)) if complete else 0)


def largest_difference(
    run: dict[int, float], reference: dict[int, float], steps: Iterable[int], relative: bool = False
) -> float:
    """The largest difference over these steps; `relative`: divided by the reference's absolute value, unless it is 0.

    Infinite if either run lacks one of the steps or has no finite number there; 0 without steps.
    """
    largest = 0.0
    for step in steps:
        wanted = reference.get(step, math.nan)
        difference = abs(run.get(step, math.nan) - wanted) / ((abs(wanted) or 1.0) if relative else 1.0)
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def state_difference(
    run: dict[str, Tensor], reference: dict[str, Tensor], prefix: tuple[str, ...] = ("",), key_biases: bool = True
) -> float:
    """The largest absolute difference of two states' tensors whose names start with `prefix`.

    Infinite if the states hold other tensors, other shapes or something not finite, or nothing at all. Without
    `key_biases` the key part of attention biases is left out: softmax does not depend on it, so its gradient is only
    rounding, which AdamW scales up to full steps. So it differs where the number of ranks does.
    """
    if not reference or {n: t.shape for n, t in run.items()} != {n: t.shape for n, t in reference.items()}:
        return math.inf
    largest = 0.0
    for name in reference:
        if not name.startswith(prefix):
            continue
        difference = (run[name] - reference[name]).abs()
        if not key_biases and name.endswith(KEY_BIAS):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        largest = max(largest, float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return largest
