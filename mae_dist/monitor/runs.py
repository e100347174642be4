"""`mae-dist runs [DIR ...] [--watch] [--results FILE.md]`: all runs below some folders in one table, how each stands.

With `--results`, the finished ones as markdown: in which settings they differ, and what came out. Reads the end of each
metrics.jsonl only and asks SLURM once for all jobs, so that a hundred runs take less than a second. No torch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from mae_dist import config as configuration
from mae_dist.cli import Parser, duration
from mae_dist.monitor.status import QUIET, RunStatus, find, newest_submissions, run_status
from mae_dist.run import jobs, layout, slurm_cli

RECENT = 100
"""Steps over which the loss is averaged, at most."""
EPOCH_ERROR = 5e-5
"""How far from the truth `epoch` in metrics.jsonl may be."""
EVERY = 5.0
"""Seconds between two looks of --watch."""
WIDE = 1000
"""Columns of a table that no terminal shows."""
NUMBERS = ("top1", "top5", "test_loss", "loss")
"""Final numbers for --results; the first that a run has is its main one."""
STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "stopped": "yellow", "requeued": "magenta"}
HEADINGS = ("run", "verb", "state", "step", "loss", "images/s", "ETA", "saved ago", "job", "result")
COUNTS = ("step", "loss", "images/s", "ETA", "saved ago")


@dataclass(frozen=True)
class Row:
    """One run in the table; numbers that it does not have are None. Seconds: ``left``, and ``saved`` ago."""

    path: Path
    verb: str
    status: RunStatus
    step: int | None
    total: int | None
    loss: float | None
    images_per_second: float | None
    left: float | None
    saved: float | None
    result: dict[str, Any]

    def cells(self, name: str) -> list[str]:
        """What the table shows, in the order of HEADINGS."""
        total = f"/{self.total:,}" if self.total else ""
        style = STYLES.get(self.status.state, "default")
        main = next((key for key in NUMBERS[:3] if key in self.result), None)
        return [
            escape(name), self.verb, f"[{style}]{escape(str(self.status))}[/]",
            "" if self.step is None else f"{self.step:,}{total}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.images_per_second is None else f"{self.images_per_second:,.0f}",
            "" if self.left is None else duration(self.left),
            "" if self.saved is None else duration(self.saved),
            self.status.job,
            "" if main is None else f"{main} {self.result[main]:.4g}",
        ]  # fmt: skip


def main(argv: list[str]) -> int:
    """Run `mae-dist runs ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist runs", description="All runs below some folders, and how each stands.")
    parser.add_argument("folders", metavar="DIR", nargs="*", type=Path, default=[Path("runs")], help="default: runs")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--watch", action="store_true", help=f"look again every {EVERY:g} s, until Ctrl-C")
    way.add_argument("--results", metavar="FILE.md", type=Path, help="write a table of what the finished ones gave")
    arguments = parser.parse_args(argv)
    for top in arguments.folders:
        if not top.is_dir():
            raise ValueError(f"DIR={top}: no such folder; give one with runs in it")
    if arguments.results:
        return write_results(arguments.folders, arguments.results)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    if not arguments.watch:
        console.print(table(arguments.folders))
        return 0
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(table(arguments.folders), refresh=True)
            time.sleep(EVERY)
    return 0


def table(tops: list[Path]) -> Table | str:
    """The table of all runs below these folders, or a sentence when there are none. Empty columns are left out."""
    paths = list(dict.fromkeys(path for top in tops for path in find(top)))
    if not paths:
        return nothing(tops)
    cells = [row.cells(name_of(row.path, tops)) for row in look(paths)]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    used = [place for place in range(len(HEADINGS)) if any(line[place] for line in cells)]
    for place in used:
        count = HEADINGS[place] in COUNTS
        made.add_column(HEADINGS[place], justify="right" if count else "left", no_wrap=count, overflow="fold")
    for line in cells:
        made.add_row(*(line[place] for place in used))
    return made


def nothing(tops: list[Path]) -> str:
    """That there is no run."""
    return f"no runs in {', '.join(map(str, tops))}"


def name_of(path: Path, tops: list[Path]) -> str:
    """A run's name: its path below the one folder that was asked for, else the whole path."""
    return str(path.relative_to(tops[0])) if len(tops) == 1 and path != tops[0] else str(path)


def look(paths: list[Path]) -> list[Row]:
    """How these runs stand; SLURM is asked once, and not of those that are finished."""
    submissions = newest_submissions([path for path in paths if not (path / layout.RESULT).is_file()])
    states = slurm_cli.states(submission.job for submission in submissions.values())
    return [_row(path, states) for path in paths]


def _row(path: Path, states: dict[str, str]) -> Row:
    settings, result = _settings(path), _mapping(path / layout.RESULT)
    train, every = settings.get("train", {}), settings.get("track", {}).get("every", 0)
    steps = [record for record in layout.recent(path / "metrics.jsonl") if "lr" in record][-RECENT:]
    losses = [record["loss"] for record in steps if "loss" in record]
    last = steps[-1] if steps else {}
    step, epoch, speed = last.get("step"), last.get("epoch"), last.get("images_per_second")
    total = train.get("steps")
    if total is None and epoch:
        wanted = train["epochs"] * step / epoch
        total = math.ceil(wanted * (1 - EPOCH_ERROR / epoch))
    batch = train.get("global_batch", 0)
    quiet = max(QUIET, 3 * every * batch / speed) if speed else QUIET
    how = run_status(path, states, quiet)
    if how.state == "finished":
        total = step
    left = (total - step) * batch / speed if how.state == "running" and speed and total and step else None
    saves = layout.checkpoints(path)
    return Row(
        path=path, verb=str(settings.get("verb", "")), status=how, step=step, total=total,
        loss=sum(losses) / len(losses) if losses else None, images_per_second=speed, left=left,
        saved=time.time() - saves[-1].stat().st_mtime if saves else None, result=result,
    )  # fmt: skip


def _settings(path: Path) -> dict[str, Any]:
    """config.yaml as it is; {} before there is one, and of one that is damaged, which the verb then says."""
    try:
        text = (path / layout.CONFIG).read_text()
        plain = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # ten times as fast
        sound = isinstance(plain, dict) and all(isinstance(plain.get(name), dict) for name in ("train", "track"))
        return plain if sound else {"verb": "damaged"}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {"verb": "damaged"}


def _mapping(file: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    return {}


# What came out


def write_results(tops: list[Path], file: Path) -> int:
    """Write the markdown about the finished runs, print it, and give the exit status.

    Raises ValueError when none is finished: nothing is written then.
    """
    paths = dict.fromkeys(path for top in tops for path in find(top))
    rows = look([path for path in paths if is_run(path)])
    finished = [row for row in rows if row.status.state == "finished"]
    if not finished:
        raise ValueError(f"none of the {len(rows)} runs is finished; see mae-dist runs" if rows else nothing(tops))
    text = markdown({name_of(row.path, tops): row for row in finished})
    others = [f"{name_of(row.path, tops)} ({row.status})" for row in rows if row not in finished]
    if others:
        text += f"\nNot finished: {', '.join(others)}.\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    layout.write_text(file, text)
    print(text, end="")
    return 0


def is_run(path: Path) -> bool:
    """Whether this is a run, queued ones too; not a launcher's stage that makes none, such as this very table's."""
    return (path / layout.CONFIG).is_file() or path.parent.name != jobs.PIPELINE


def markdown(rows: dict[str, Row]) -> str:
    """A table a verb: each run's name, the settings in which its runs differ, and its numbers; the best first."""
    verbs = dict.fromkeys(row.verb for row in rows.values())
    return "\n".join(_markdown(verb, {k: row for k, row in rows.items() if row.verb == verb}) for verb in verbs)


def _markdown(verb: str, rows: dict[str, Row]) -> str:
    settings = {}
    for name, row in rows.items():
        _, data, config = layout.settings(row.path)
        settings[name] = configuration.result_settings(config) | {"data": data}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    varied = [key for key in keys if len({str(values.get(key)) for values in settings.values()}) > 1]
    shown = [key for key in NUMBERS if any(key in row.result for row in rows.values())]
    ranked = sorted(rows, key=lambda name: _rank(rows[name].result))
    lines = [["run", *varied, *shown], ["---"] * (1 + len(varied)) + ["---:"] * len(shown)]
    for name in ranked:
        values = [_said(settings[name].get(key)) for key in varied]
        lines.append([name, *values, *(_said(rows[name].result.get(key)) for key in shown)])
    cells: Iterable[str] = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return f"## {verb}\n\n" + "".join(f"| {line} |\n" for line in cells)


def _rank(result: dict[str, Any]) -> tuple[float, float]:
    """Accuracy from above, then losses from below."""
    loss = next((result[key] for key in NUMBERS[2:] if key in result), math.inf)
    return -result.get("top1", -math.inf), loss


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_said, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
