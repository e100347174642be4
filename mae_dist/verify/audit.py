"""What a harmed run is held against: the planned order of its samples, and an undisturbed run's losses and weights.

Pure comparisons of what lies in files, and the table that `mae-dist chaos` ends with. A step of the files is 1-based:
the n-th step took the positions (n - 1) * global_batch up to n * global_batch of the stream.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mae_dist.data.order import Order
from mae_dist.run import checkpoint, tracker
from mae_dist.run.directory import RunDir

TOLERANCE = 1e-4
"""Largest difference of losses and weights where the number of ranks changed: sums are taken in another order."""
KEY_BIAS = "attn.qkv.bias"


@dataclass(frozen=True)
class Audit:
    """Samples of a stretch of steps that were left out, came too often, or came in another order than planned."""

    lost: int
    repeated: int
    moved: int


def audit(lines: Iterable[dict[str, Any]], order: Order, global_batch: int, first: int, last: int) -> Audit:
    """The lines of an ids.jsonl against the planned order, from step `first` to step `last`, both included.

    What is lost or repeated moves all that follow it, so `moved` is counted only where nothing is.
    """
    wanted = [pair for step in range(first, last + 1) for pair in planned(order, global_batch, step)]
    found = [
        pair for line in lines if first <= line["step"] <= last
        for pair in zip(line["epochs"], line["ids"], strict=True)
    ]  # fmt: skip
    lost = (Counter(wanted) - Counter(found)).total()
    repeated = (Counter(found) - Counter(wanted)).total()
    whole = not lost and not repeated
    return Audit(lost, repeated, sum(a != b for a, b in zip(wanted, found, strict=True)) if whole else 0)


def planned(order: Order, global_batch: int, step: int) -> list[tuple[int, int]]:
    """The (epoch, sample id) pairs of a step, in order."""
    epochs, ids = order.at((step - 1) * global_batch, step * global_batch)
    return list(zip(epochs.tolist(), ids.tolist(), strict=True))


def losses(run: RunDir) -> dict[int, float]:
    """The loss of each step of a run; NaN for one that was skipped or is there more than once."""
    found: dict[int, float] = {}
    for record in tracker.read(run.path / "metrics.jsonl"):
        if "loss" in record:
            broken = record.get("skipped") or record["step"] in found
            found[record["step"]] = math.nan if broken else float(record["loss"])
    return found


def loss_difference(found: dict[int, float], wanted: dict[int, float], first: int, last: int) -> float:
    """The largest absolute difference over these steps; infinite where one is missing or no number."""
    differences = [abs(found.get(n, math.nan) - wanted.get(n, math.nan)) for n in range(first, last + 1)]
    return max((math.inf if math.isnan(d) else d for d in differences), default=0.0)


def final_state(run: RunDir) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint (weights and moments); none if there is no undamaged one."""
    paths = run.checkpoints()
    if not paths or checkpoint.verify(paths[-1]) is not None:
        return {}
    state = {name: torch.full(shape, torch.nan) for name, shape in checkpoint.names_in(paths[-1]).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        checkpoint.load(paths[-1], state)
    return state


def state_difference(found: dict[str, Tensor], wanted: dict[str, Tensor], elastic: bool) -> float:
    """The largest absolute difference of two states; infinite if they hold other tensors or something not finite.

    Where the number of ranks has changed (`elastic`), the key part of attention biases is left out: softmax does not
    depend on it, so its gradient is nothing but rounding, which AdamW makes into steps as long as any.
    """
    if not wanted or found.keys() != wanted.keys():
        return math.inf
    largest = 0.0
    for name in wanted:
        difference = (found[name] - wanted[name]).abs()
        if elastic and name.endswith(KEY_BIAS):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        largest = max(largest, float(difference.nan_to_num(nan=math.inf).max()))
    return largest


@dataclass(frozen=True)
class Row:
    """One fault and what became of it. `elastic`: the number of ranks has changed by then."""

    number: int
    kind: str
    step: int
    ranks: int
    recovered: bool
    seconds: float
    redone: int | None
    lost: int
    repeated: int
    moved: int
    loss_difference: float
    elastic: bool

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return self.recovered and whole(self) and within(self.loss_difference, self.elastic)


@dataclass(frozen=True)
class Totals:
    """The whole run, from its first step to its last."""

    faults: int
    planned: int
    recovered: int
    steps: int
    redone: int
    lost: int
    repeated: int
    moved: int
    loss_difference: float
    state_difference: float
    elastic: bool
    seconds: float

    @property
    def passed(self) -> bool:
        """Every planned fault struck and was survived, and the run is the undisturbed one."""
        same = within(self.loss_difference, self.elastic) and within(self.state_difference, self.elastic)
        return self.recovered == self.faults == self.planned and whole(self) and same


def whole(record: Row | Totals) -> bool:
    """Each planned sample once and in order."""
    return record.lost == record.repeated == record.moved == 0


def within(difference: float, elastic: bool) -> bool:
    """Bit-equal; where the number of ranks has changed, equal up to rounding."""
    return difference <= (TOLERANCE if elastic else 0.0)


def verdict(rows: list[Row], totals: Totals) -> bool:
    """Whether the promise was kept."""
    return totals.passed and all(row.passed for row in rows)


WIDTH = 110
"""Characters of the table where there is no terminal."""
HEAD = (
    "#", "kind", "step", "ranks", "recovered", "seconds", "steps redone", "samples lost", "samples repeated",
    "samples moved", "losses bit-equal",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as people read it."""
    return [
        str(row.number), row.kind, str(row.step), str(row.ranks), "yes" if row.recovered else "no",
        f"{row.seconds:.0f}", "" if row.redone is None else str(row.redone), str(row.lost), str(row.repeated),
        str(row.moved), equality(row.loss_difference, row.elastic),
    ]  # fmt: skip


def total_cells(totals: Totals) -> list[str]:
    """The last row."""
    return [
        "", f"{totals.faults} of {totals.planned}", str(totals.steps), "", str(totals.recovered),
        f"{totals.seconds:.0f}", str(totals.redone), str(totals.lost), str(totals.repeated), str(totals.moved),
        equality(totals.loss_difference, totals.elastic),
    ]  # fmt: skip


def equality(difference: float, elastic: bool) -> str:
    """yes; the difference, where there may be one; or no."""
    if difference == 0:
        return "yes"
    return f"within {TOLERANCE:g} ({difference:.1e})" if within(difference, elastic) else f"no ({difference:.1e})"


def conclusion(rows: list[Row], totals: Totals) -> str:
    """The last line."""
    kept = "kept" if verdict(rows, totals) else "broken"
    return f"final weights bit-equal: {equality(totals.state_difference, totals.elastic)}; the promise is {kept}"


def show(rows: list[Row], totals: Totals) -> None:
    """Print the table."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    made = Table(caption=conclusion(rows, totals), box=box.SIMPLE, padding=0)
    for name in HEAD:
        left = name in ("kind", "losses bit-equal")
        made.add_column(name.replace(" ", "\n"), justify="left" if left else "right", no_wrap=name == "kind")
    for row in rows:
        made.add_row(*cells(row), style=None if row.passed else "red")
    made.add_section()
    made.add_row(*total_cells(totals))
    console.print(made)


def markdown(rows: list[Row], totals: Totals) -> str:
    """The same for a file."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows), total_cells(totals)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{conclusion(rows, totals)}\n"


def plain(rows: list[Row], totals: Totals) -> dict[str, Any]:
    """The same for a program."""

    def numbers(record: Row | Totals) -> dict[str, Any]:
        finite = {k: None if v == math.inf else v for k, v in asdict(record).items()}  # JSON has no infinity
        return finite | {"losses_bit_equal": record.loss_difference == 0, "passed": record.passed}

    equal = {"final_weights_bit_equal": totals.state_difference == 0}
    return {"passed": verdict(rows, totals), "faults": [*map(numbers, rows)], "totals": numbers(totals) | equal}
