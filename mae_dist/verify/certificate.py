"""The certificate of `mae-dist certify`: gaps between runs, the tolerance for each precision, verdicts, and the files.

Compares evidence from run folders and writes certificate.md and certificate.json. Starts no process.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_dist.run import directory, events, jsonl
from mae_dist.verify import compare
from mae_dist.verify.compare import Evidence, Samples

FAILED, IDENTICAL = "FAILED", "bit-identical"


@dataclass(frozen=True)
class Tolerance:
    """The largest gaps that pass: of losses (absolute) and of gradient norms (relative)."""

    loss: float
    grad_norm: float


def tolerance(precision: str) -> Tolerance:
    """The tolerance for a precision: in 16 bits, rounding itself depends on the shapes of the tensors."""
    return Tolerance(1e-5, 1e-4) if precision == "fp32" else Tolerance(1e-2, 1e-1)


@dataclass(frozen=True)
class Gaps:
    """How far a run is from its reference: the largest gaps over steps and over weights at the end (inf: something is
    missing or not finite), whether every number and tensor is bit-identical, and where the order of samples leaves the
    plan (None: nowhere)."""

    loss: float
    grad_norm: float
    weights: float
    identical: bool
    order: str | None


def read_finished(run: Path) -> Evidence:
    """The evidence of a finished run; ValueError if it is not finished or its last checkpoint is damaged."""
    evidence = compare.read_evidence(run)
    if directory.RunDir(run).result() is None or not evidence.state:
        raise ValueError(f"{run}: the run is not finished, or its last checkpoint is damaged")
    return evidence


def planned_samples(run: Path) -> dict[int, Samples]:
    """The samples that each step of a run must take: a pure function of the run's settings and data."""
    config = directory.RunDir(run).settings()[2]
    steps = range(1, config.train.steps + 1)
    return compare.planned_samples(compare.planned_order(config), config.train.global_batch, steps)


def measure_gaps(run: Evidence, reference: Evidence, planned: dict[int, Samples]) -> Gaps:
    """The gaps between a run and its reference, and where the run's samples differ from the planned ones."""
    steps, norms = planned.keys() | run.losses.keys() | reference.losses.keys(), reference.grad_norms
    same_numbers = (run.losses, run.grad_norms) == (reference.losses, norms)
    return Gaps(
        loss=compare.largest_difference(run.losses, reference.losses, steps),
        grad_norm=compare.largest_difference(run.grad_norms, norms, run.grad_norms.keys() | norms.keys(), True),
        weights=compare.state_difference(run.state, reference.state, ("model.", "ema.")),
        identical=same_numbers and compare.state_difference(run.state, reference.state) == 0,
        order=_deviation(run.samples, planned),
    )


def verdict(gaps: Gaps, allowed: Tolerance, exact: bool) -> str:
    """IDENTICAL, "within ... in loss", or FAILED. `exact`: only a bit-identical run passes."""
    if gaps.order is not None or not math.isfinite(gaps.loss + gaps.grad_norm + gaps.weights):
        return FAILED
    if gaps.identical:
        return IDENTICAL
    if exact or gaps.loss > allowed.loss or gaps.grad_norm > allowed.grad_norm:
        return FAILED
    return f"within {allowed.loss:g} in loss"


@dataclass(frozen=True)
class Start:
    """One start of a run's processes: the step and number of ranks, the commit of the code, the command."""

    step: int
    ranks: int
    git: str | None
    command: str


def read_starts(run: Path) -> list[Start]:
    """The starts of a run, oldest first, from its events.jsonl."""
    return [Start(e["step"], e["ranks"], e["git"], e["command"]) for e in events.of(run, "start")]


@dataclass(frozen=True)
class ShapeRow:
    """A row of the certificate: a shape, its gaps to the run in the folder `against`, and why it failed."""

    shape: str
    folder: str
    against: str
    starts: list[Start]
    gaps: Gaps | None
    verdict: str
    why: str | None = None

    def cells(self) -> list[str]:
        """Text for each of HEADINGS."""
        if self.gaps is None:
            return [self.shape, "", "", "", "", f"{self.verdict}: {self.why}"]
        numbers = [
            f"{value:.1e}" if value else "0" for value in (self.gaps.loss, self.gaps.grad_norm, self.gaps.weights)
        ]
        return [self.shape, *numbers, self.gaps.order or "as planned", self.verdict]


HEADINGS = ["shape", "loss", "gradient norm", "weights", "order", "verdict"]


@dataclass(frozen=True)
class Certificate:
    """All rows with the settings, versions, machine and code that they were made with."""

    passed: bool
    provenance: dict[str, Any]
    code: list[str]
    settings: dict[str, Any]
    data_fingerprint: str
    num_parameters: int
    tolerance: Tolerance
    rows: list[ShapeRow]
    left_out: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write certificate.json and certificate.md."""
        jsonl.write_atomic(folder / "certificate.json", json.dumps(asdict(self), indent=1) + "\n")
        jsonl.write_atomic(folder / "certificate.md", self.markdown())

    def markdown(self) -> str:
        """The text of certificate.md."""
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
            "in the same shape is compared with the undisturbed run of that shape and must be bit-identical; all "
            "others are compared with 1 rank. Gaps are the largest over all steps, and over all weights at the end "
            "(mostly in the biases of attention keys: their gradient is zero up to rounding, which AdamW scales up).",
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


def _deviation(samples: dict[int, Samples], planned: dict[int, Samples]) -> str | None:
    """How many steps took other samples than planned, and the first of them; None if there are none."""
    wrong = [step for step in sorted(samples.keys() | planned.keys()) if samples.get(step) != planned.get(step)]
    return f"{len(wrong)} steps not as planned, first {wrong[0]}" if wrong else None
