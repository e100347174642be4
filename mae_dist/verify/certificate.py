"""What `mae-dist certify` compares and writes: the evidence of a run, its gaps to another, the verdict, the files.

Evidence is what lies in a run's folder: a loss and a gradient norm for each step, the sample ids of each step, and the
final state. The state is read through `checkpoint`, whatever ranks had it in shards. Starts no process.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dist.data.index import open_split
from mae_dist.data.order import Order
from mae_dist.run import checkpoint, directory, tracker
from mae_dist.run.layout import write_text

FAILED, IDENTICAL = "FAILED", "bit-identical"
Ids = dict[int, tuple[list[int], list[int]]]
"""Step -> (epochs, sample ids) in the order of the global batch."""


@dataclass(frozen=True)
class Tolerance:
    """The largest gaps that pass: of losses (absolute) and of gradient norms (relative)."""

    loss: float
    grad_norm: float


def tolerance(precision: str) -> Tolerance:
    """Only fp32 is held to the order of its sums; in 16 bits, rounding itself depends on the shapes of the tensors."""
    return Tolerance(1e-5, 1e-4) if precision == "fp32" else Tolerance(1e-2, 1e-1)


@dataclass(frozen=True)
class Evidence:
    """What a finished run leaves: by step its loss, gradient norm (where finite: fp16 may overflow) and sample ids; the
    final state by name."""

    losses: dict[int, float]
    grad_norms: dict[int, float]
    ids: Ids
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Gaps:
    """How two runs differ: largest gaps over steps and over weights (inf: not comparable), whether every number and
    every tensor is the same bit by bit, and what is wrong with the order of samples (None: it is as planned)."""

    loss: float
    grad_norm: float
    weights: float
    identical: bool
    order: str | None


def read_evidence(path: Path) -> Evidence:
    """The evidence in a run's folder (ValueError when it is not finished or its checkpoints are damaged)."""
    run = directory.RunDir(path)
    newest = run.newest()
    if run.result() is None or newest is None:
        raise ValueError(f"{path}: the run is not finished")
    state = {name: torch.empty(size) for name, size in checkpoint.names_in(newest).items()}
    checkpoint.load(newest, state)
    steps = [record for record in tracker.read(path / "metrics.jsonl") if "lr" in record]
    losses, norms = ({r["step"]: r[key] for r in steps if key in r} for key in ("loss", "grad_norm"))
    ids = {line["step"]: (line["epochs"], line["ids"]) for line in tracker.read(path / "ids.jsonl")}
    return Evidence(losses, norms, ids, state)


def planned_ids(path: Path) -> Ids:
    """What a run should have trained on: a pure function of its settings and its data."""
    config = directory.RunDir(path).settings()[2]
    counts, batch = open_split(config.data.path, config.data.split).counts, config.train.global_batch
    order = Order(config.train.seed, counts, config.data.shuffle_window)
    found: Ids = {}
    for step in range(1, config.train.steps + 1):
        epochs, ids = order.at((step - 1) * batch, step * batch)
        found[step] = epochs.tolist(), ids.tolist()
    return found


def compare(run: Evidence, reference: Evidence, planned: Ids) -> Gaps:
    """The gaps between a run and its reference, and the run's order against the plan, which binds the reference too."""
    same_names = run.state.keys() == reference.state.keys()
    weights = [name for name in reference.state if name.startswith(("model.", "ema."))]
    return Gaps(
        loss=_largest(run.losses, reference.losses, relative=False)
        if run.losses.keys() == planned.keys()
        else math.inf,
        grad_norm=_largest(run.grad_norms, reference.grad_norms, relative=True),
        weights=max(_distance(run.state[n], reference.state[n]) for n in weights) if same_names else math.inf,
        identical=same_names
        and (run.losses, run.grad_norms) == (reference.losses, reference.grad_norms)
        and all(torch.equal(run.state[name], tensor) for name, tensor in reference.state.items()),
        order=_difference(run.ids, planned),
    )


def verdict(gaps: Gaps, allowed: Tolerance, exact: bool) -> str:
    """IDENTICAL, 'within ... in loss', or FAILED; `exact` asks for every bit."""
    if gaps.order is not None or not math.isfinite(gaps.loss + gaps.grad_norm + gaps.weights):
        return FAILED
    if gaps.identical:
        return IDENTICAL
    if exact or gaps.loss > allowed.loss or gaps.grad_norm > allowed.grad_norm:
        return FAILED
    return f"within {allowed.loss:g} in loss"


@dataclass(frozen=True)
class Start:
    """One start of a run's processes: where it began, on how many ranks, with what code and command."""

    step: int
    ranks: int
    git: str | None
    command: str


def read_starts(path: Path) -> list[Start]:
    """The starts of a run, as its provenance has them."""
    return [Start(r["step"], r["world"], r["git"], r["command"]) for r in tracker.read(path / "provenance.jsonl")]


@dataclass(frozen=True)
class Row:
    """One line of the certificate: what was run, how far it is from the folder `against`, and why, when it failed."""

    shape: str
    folder: str
    against: str
    starts: list[Start]
    gaps: Gaps | None
    verdict: str
    why: str | None = None

    def cells(self) -> list[str]:
        """The row as text: shape, gaps of loss, gradient norm and weights, order, verdict."""
        if self.gaps is None:
            return [self.shape, "", "", "", "", f"{self.verdict}: {self.why}"]
        numbers = [
            f"{value:.1e}" if value else "0" for value in (self.gaps.loss, self.gaps.grad_norm, self.gaps.weights)
        ]
        return [self.shape, *numbers, self.gaps.order or "as planned", self.verdict]


HEADINGS = ["shape", "loss", "gradient norm", "weights", "order", "verdict"]


@dataclass(frozen=True)
class Certificate:
    """Everything one would attach to a paper."""

    passed: bool
    provenance: dict[str, Any]
    code: list[str]
    settings: dict[str, Any]
    data_fingerprint: str
    num_parameters: int
    tolerance: Tolerance
    rows: list[Row]
    left_out: dict[str, str]

    def write(self, folder: Path) -> None:
        """certificate.json and certificate.md."""
        write_text(folder / "certificate.json", json.dumps(asdict(self), indent=1) + "\n")
        write_text(folder / "certificate.md", self.markdown())

    def markdown(self) -> str:
        """The same for reading."""
        where, train, allowed = self.provenance, self.settings["train"], self.tolerance
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        strict = "" if train["precision"] == "fp32" else " (not fp32, hence not 1e-5)"
        lines = [
            "# The same run in different shapes",
            "",
            f"{'Every row passes' if self.passed else 'NOT every row passes'}. {train['steps']} steps of "
            f"{train['global_batch']} images in {train['precision']}, {self.settings['model']['name']} with a decoder, "
            f"{self.num_parameters:,} weights. Losses may differ by {allowed.loss:g}{strict}, gradient norms by "
            f"{allowed.grad_norm:g} of their size, the order of samples not at all. A run that was stopped and resumed "
            "in the same shape is held against the undisturbed one, and may not differ by one bit; all others are held "
            "against 1 rank. Gaps are the largest over all steps, and over all weights at the end (mostly those of "
            "keys' biases: their gradient is zero but for rounding, which AdamW scales up).",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|" + "---|" * len(HEADINGS),
            *(f"| {' | '.join(row.cells())} |" for row in self.rows),
            "",
            *(f"- Left out: {shape}: {why}" for shape, why in self.left_out.items()),
            f"- Machine: {where['hostname']}, {where['device']}; {where['time']}",
            f"- Versions: {versions}",
            f"- Code: {', '.join(self.code)}",
            f"- Data: {self.settings['data']['path']}, fingerprint {self.data_fingerprint}",
            f"- Command: `{where['command']}`",
            "- certificate.json has all settings",
        ]
        return "\n".join(lines) + "\n"


def _largest(run: dict[int, float], reference: dict[int, float], relative: bool) -> float:
    """The largest gap over steps; inf when a step is missing in one of them or not finite."""
    if run.keys() != reference.keys():
        return math.inf
    gaps = [abs(run[step] - value) / ((abs(value) or 1.0) if relative else 1.0) for step, value in reference.items()]
    return max(gaps, default=0.0) if all(map(math.isfinite, gaps)) else math.inf


def _distance(tensor: Tensor, other: Tensor) -> float:
    if tensor.shape != other.shape:
        return math.inf
    gap = float((tensor - other).abs().max())
    return gap if math.isfinite(gap) else math.inf


def _difference(ids: Ids, planned: Ids) -> str | None:
    """Where an order leaves the plan, or None."""
    wrong = [step for step in sorted(ids.keys() | planned.keys()) if ids.get(step) != planned.get(step)]
    return f"{len(wrong)} steps not as planned, first {wrong[0]}" if wrong else None
