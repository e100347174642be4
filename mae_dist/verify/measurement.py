"""What the benchmarks of `mae-dist bench` have in common: rows of a table, results, and the runs that they start."""

import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_dist.run import jsonl
from mae_dist.verify import processes

WARM_UP = 5
"""Steps at the start of a run that no measurement includes."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table: a name, its value, and the bounds that it should keep, if there are any."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        """The bounds in words, and whether they are missed."""
        bounds = [f"{what} {bound:g}" for what, bound in (("at most", self.at_most), ("at least", self.at_least))
                  if bound is not None]  # fmt: skip
        high, low = math.inf if self.at_most is None else self.at_most, self.at_least or -math.inf
        return " and ".join(bounds) + ("" if low <= self.value <= high else " MISSED")


@dataclass(frozen=True)
class Result:
    """What a bench measured: the rows of its table, every value by name (`raw`), and what follows, in a sentence."""

    title: str
    measurements: list[Measurement]
    raw: dict[str, Any]
    conclusion: str = ""


@dataclass(frozen=True)
class Runner:
    """Starts the runs of a bench and reads their metrics.

    folder: where the runs lie; verb: of the runs; overrides: their settings on the command line, without out=;
    settings: the config that follows from them; options: the bench's own, --rounds for example.
    """

    folder: Path
    verb: str
    overrides: list[str]
    settings: Any
    options: dict[str, int]

    def new_folder(self, name: str) -> Path:
        """Path of a folder for a run; what an earlier bench left there is removed."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def start(self, run: Path, *overrides: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a run in the folder `run`, with more settings and environment variables."""
        argv = [self.verb, *self.overrides, *overrides, f"out={run}"]
        return processes.start(argv, self.folder / "runs.log", **environment)

    def finish(self, process: subprocess.Popen[bytes], expected: int) -> None:
        """Wait for a run to end; ValueError with the last line of its output if its exit status is not `expected`."""
        if (status := process.wait()) != expected:
            last = processes.last_line(self.folder / "runs.log")
            raise ValueError(f"a run of this bench ended with status {status}, not {expected}: {last}")

    def records(self, run: Path) -> list[dict[str, Any]]:
        """The records of a run's steps after WARM_UP."""
        return jsonl.steps(run / "metrics.jsonl")[WARM_UP:]


@dataclass(frozen=True)
class Bench:
    """A bench: its function, a line for --help, its options (default, help), its settings, whether it needs data
    that mae_dist can make, or data of the user's (`reads_data`), the verb of its runs, and its options without a
    number (help).
    """

    measure: Callable[[Runner], Result]
    summary: str
    options: dict[str, tuple[int, str]]
    settings: list[str] = field(default_factory=list)
    needs_data: bool = True
    reads_data: bool = False
    verb: str = "pretrain"
    flags: dict[str, str] = field(default_factory=dict)
