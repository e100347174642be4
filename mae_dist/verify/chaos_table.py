"""The table that `mae-dist chaos` ends with: a row for each fault, the totals, and whether all of them passed.

Printed in the terminal, and written as Markdown and JSON. Knows nothing of processes or of how faults are injected.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

TOLERANCE = 1e-4
"""Largest difference of losses and weights after the number of ranks has changed: sums are taken in another order."""
WIDTH = 110
"""Characters of the table where there is no terminal."""
HEADINGS = (
    "#", "kind", "step", "ranks", "recovered", "seconds", "steps redone", "samples lost", "samples repeated",
    "samples moved", "losses bit-equal",
)  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Steps of a run beside those of the undisturbed one. `elastic`: the number of ranks has changed by their end."""

    seconds: float
    redone: int | None
    lost: int
    repeated: int
    moved: int
    loss_difference: float
    elastic: bool

    @property
    def as_planned(self) -> bool:
        """Whether each planned sample was taken once and in order, with the losses of the undisturbed run."""
        return self.lost == self.repeated == self.moved == 0 and within(self.loss_difference, self.elastic)

    def last_cells(self) -> list[str]:
        """Text for each of HEADINGS from the seconds on."""
        counts = ["" if count is None else str(count) for count in (self.redone, self.lost, self.repeated, self.moved)]
        return [f"{self.seconds:.0f}", *counts, equality(self.loss_difference, self.elastic)]


@dataclass(frozen=True)
class FaultRow(Stretch):
    """One fault and how the run took it, from the fault before to the recovery."""

    number: int
    kind: str
    step: int
    ranks: int
    recovered: bool

    @property
    def passed(self) -> bool:
        """The run recovered, with the planned samples and the losses of the undisturbed run."""
        return self.recovered and self.as_planned

    def cells(self) -> list[str]:
        """Text for each of HEADINGS."""
        first = [str(self.number), self.kind, str(self.step), str(self.ranks), "yes" if self.recovered else "no"]
        return [*first, *self.last_cells()]


@dataclass(frozen=True)
class Totals(Stretch):
    """The whole run, from its first step to its last; `faults` were injected, of `planned`."""

    faults: int
    planned: int
    recovered: int
    steps: int
    state_difference: float

    @property
    def passed(self) -> bool:
        """The run recovered from every planned fault and equals the undisturbed run."""
        recovered = self.recovered == self.faults == self.planned
        return recovered and self.as_planned and within(self.state_difference, self.elastic)

    def cells(self) -> list[str]:
        """Text for each of HEADINGS."""
        first = ["", f"{self.faults} of {self.planned}", str(self.steps), "", str(self.recovered)]
        return [*first, *self.last_cells()]


def within(difference: float, elastic: bool) -> bool:
    """Whether two runs are equal: bit for bit, or up to TOLERANCE if the number of ranks has changed (`elastic`)."""
    return difference <= (TOLERANCE if elastic else 0.0)


def equality(difference: float, elastic: bool) -> str:
    """The text of a cell about bit-equality: "yes", or the difference and whether it is within TOLERANCE."""
    if difference == 0:
        return "yes"
    return f"within {TOLERANCE:g} ({difference:.1e})" if within(difference, elastic) else f"no ({difference:.1e})"


def passed(rows: list[FaultRow], totals: Totals) -> bool:
    """Whether every fault and the whole run passed."""
    return totals.passed and all(row.passed for row in rows)


def conclusion(rows: list[FaultRow], totals: Totals) -> str:
    """The line below the table."""
    verdict = "every promise is kept" if passed(rows, totals) else "a promise is broken"
    return f"final weights bit-equal: {equality(totals.state_difference, totals.elastic)}; {verdict}"


def show(rows: list[FaultRow], totals: Totals) -> None:
    """Print the table, failed rows in red."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    table = Table(caption=conclusion(rows, totals), box=box.SIMPLE, padding=0)
    for heading in HEADINGS:
        left = heading in ("kind", "losses bit-equal")
        table.add_column(heading.replace(" ", "\n"), justify="left" if left else "right", no_wrap=heading == "kind")
    for row in rows:
        table.add_row(*row.cells(), style=None if row.passed else "red")
    table.add_section()
    table.add_row(*totals.cells())
    console.print(table)


def markdown(rows: list[FaultRow], totals: Totals) -> str:
    """The table as the text of chaos.md."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows), totals.cells()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{conclusion(rows, totals)}\n"


def as_json(rows: list[FaultRow], totals: Totals) -> dict[str, Any]:
    """The table as the content of chaos.json; an infinite difference is None."""

    def numbers(record: FaultRow | Totals) -> dict[str, Any]:
        finite = {key: None if value == math.inf else value for key, value in asdict(record).items()}
        return finite | {"losses_bit_equal": record.loss_difference == 0, "passed": record.passed}

    equal = {"final_weights_bit_equal": totals.state_difference == 0}
    return {"passed": passed(rows, totals), "faults": [*map(numbers, rows)], "totals": numbers(totals) | equal}
