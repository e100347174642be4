"""`mae-dist runs [DIR ...] [--watch] [--results FILE.md]`: a table of all runs in some folders, with their status.

With `--results`, a markdown table of the finished runs: the settings in which they differ, and their final numbers.
Reads only the end of each metrics.jsonl and calls SLURM once for all jobs, so a hundred runs take less than a second.
"""

import html
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from mae_dist import config as configuration
from mae_dist.cli import Parser, duration
from mae_dist.monitor.status import QUIET, RunStatus, find_runs, run_status
from mae_dist.printed import escaped, rate
from mae_dist.run import jobs, jsonl, layout, slurm_cli

WATCH_SECONDS = 5.0
"""How often --watch refreshes the table."""
PIPE_WIDTH = 1000
"""Columns of a table that is not printed to a terminal."""
UNREADABLE = "unreadable"
"""Shown as the verb of a run whose config.yaml is damaged or of an older layout."""
MARKUP = re.compile(r"[\\`*\[\]|!]")
"""Characters that mean something in markdown wherever they stand, beside those of HTML."""
NUMBERS = ("top1", "top5", "test_loss", "loss")
"""Final numbers for --results, the most important first."""
STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "stopped": "yellow", "requeued": "magenta"}
HEADINGS = ("run", "verb", "state", "step", "loss", "images/s", "ETA", "saved ago", "job", "result")
NUMERIC = ("step", "loss", "images/s", "ETA", "saved ago")


@dataclass(frozen=True)
class Row:
    """One run in the table; numbers that it does not have are None. ``seconds_left`` until the end at the current
    speed, ``seconds_saved`` since the newest checkpoint.
    """

    path: Path
    verb: str
    status: RunStatus
    step: int | None
    total_steps: int | None
    loss: float | None
    images_per_second: float | None
    seconds_left: float | None
    seconds_saved: float | None
    result: dict[str, Any]

    def cells(self, name: str) -> list[str]:
        """The cells of the table as text, in the order of HEADINGS."""
        total = f"/{self.total_steps:,}" if self.total_steps else ""
        style = STYLES.get(self.status.state, "default")
        main = next((key for key in NUMBERS[:3] if key in self.result), None)
        return [
            escape(escaped(name)), escape(escaped(self.verb)), f"[{style}]{escape(str(self.status))}[/]",
            "" if self.step is None else f"{self.step:,}{total}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.images_per_second is None else rate(self.images_per_second),
            "" if self.seconds_left is None else duration(self.seconds_left),
            "" if self.seconds_saved is None else duration(self.seconds_saved),
            self.status.job,
            "" if main is None else f"{main} {self.result[main]:.4g}",
        ]  # fmt: skip


def main(argv: list[str]) -> int:
    """Run `mae-dist runs ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist runs", description="A table of all runs in some folders, with their status.")
    parser.add_argument("folders", metavar="DIR", nargs="*", type=Path, default=[Path("runs")], help="default: runs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help=f"refresh every {WATCH_SECONDS:g} s, until Ctrl-C")
    mode.add_argument("--results", metavar="FILE.md", type=Path, help="write a table of the finished runs' results")
    arguments = parser.parse_args(argv)
    for top in arguments.folders:
        if not top.is_dir():
            raise ValueError(f"DIR={top}: no such folder; give one with runs in it")
    if arguments.results:
        return write_results(arguments.folders, arguments.results)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if not arguments.watch:
        console.print(table(arguments.folders))
        return 0
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(table(arguments.folders), refresh=True)
            time.sleep(WATCH_SECONDS)
    return 0


def table(tops: list[Path]) -> Table | str:
    """The table of all runs in these folders, or a sentence if there are none. Empty columns are left out."""
    paths = list(dict.fromkeys(path for top in tops for path in find_runs(top)))
    if not paths:
        return no_runs(tops)
    cells = [row.cells(name_of(row.path, tops)) for row in read_rows(paths)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    used = [column for column in range(len(HEADINGS)) if any(line[column] for line in cells)]
    for column in used:
        numeric = HEADINGS[column] in NUMERIC
        align = "right" if numeric else "left"
        table.add_column(HEADINGS[column], justify=align, no_wrap=numeric, overflow="fold")
    for line in cells:
        table.add_row(*(line[column] for column in used))
    return table


def no_runs(tops: list[Path]) -> str:
    """The sentence for folders without runs."""
    return f"no runs in {', '.join(map(str, tops))}"


def name_of(path: Path, tops: list[Path]) -> str:
    """A run's name in the table: its path relative to the one folder that was given, else the whole path."""
    return str(path.relative_to(tops[0])) if len(tops) == 1 and path != tops[0] else str(path)


def read_rows(paths: list[Path]) -> list[Row]:
    """The rows of these runs, in their order. SLURM is called once, for the jobs of unfinished runs only."""
    unfinished = (path for path in paths if not (path / layout.RESULT).is_file())
    states = slurm_cli.states(newest.job for path in unfinished for newest in jobs.submissions(path)[-1:])
    return [_read_row(path, states) for path in paths]


def _read_row(path: Path, states: dict[str, str]) -> Row:
    settings = _settings(path)
    total = settings.get("total_steps")
    steps = (record for record in jsonl.backwards(path / layout.METRICS) if record.get("kind") == jsonl.STEP)
    recent = [*islice(steps, layout.RECENT)]
    last = recent[0] if recent else {}
    losses = [record["loss"] for record in recent[: layout.recent(last.get("step", 0))] if "loss" in record]
    step, speed = last.get("step"), last.get("images_per_second")
    batch, log_every = settings.get("train", {}).get("global_batch", 0), settings.get("track", {}).get("every", 0)
    status = run_status(path, states, max(QUIET, 3 * log_every * batch / speed) if speed else QUIET)
    left = (total - step) * batch / speed if status.state == "running" and speed and total and step else None
    saves = layout.checkpoints(path)
    return Row(
        path=path, verb=str(settings.get("verb", "")), status=status, step=step, total_steps=total,
        loss=sum(losses) / len(losses) if losses else None, images_per_second=speed, seconds_left=left,
        seconds_saved=time.time() - saves[-1].stat().st_mtime if saves else None, result=_result(path),
    )  # fmt: skip


def _settings(path: Path) -> dict[str, Any]:
    """config.yaml as it is; {} before there is one, and only a verb where it is damaged or of an older layout."""
    if not (path / layout.CONFIG).is_file():
        return {}
    try:
        found = layout.read_config(path)
    except ValueError:
        return {"verb": UNREADABLE}
    train, track = found.get("train"), found.get("track")
    if not (isinstance(train, dict) and isinstance(track, dict)):
        return {"verb": UNREADABLE}
    numbers = found.get("total_steps") or 0, train.get("global_batch", 0), track.get("every", 0)
    return found if all(type(number) in (int, float) for number in numbers) else {"verb": UNREADABLE}


def _result(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        return layout.result(path) or {}
    return {}


# Results


def write_results(tops: list[Path], file: Path) -> int:
    """Write the markdown about the finished runs, print it, and give the exit status.

    Raises ValueError, and writes nothing, if none is finished.
    """
    paths = dict.fromkeys(path for top in tops for path in find_runs(top))
    rows = read_rows([path for path in paths if is_run(path)])
    finished = [row for row in rows if row.status.state == "finished" and row.verb != UNREADABLE]
    if not finished:
        raise ValueError(f"none of the {len(rows)} runs is finished; see mae-dist runs" if rows else no_runs(tops))
    text = markdown({name_of(row.path, tops): row for row in finished})
    others = [
        plain(f"{name_of(row.path, tops)} ({UNREADABLE if row.verb == UNREADABLE else row.status})")
        for row in rows
        if row not in finished
    ]
    if others:
        text += f"\nLeft out: {', '.join(others)}.\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomic(file, text)
    print(text, end="")
    return 0


def is_run(path: Path) -> bool:
    """Whether this is a run, perhaps a queued one, and not a stage of a pipeline that makes none."""
    return (path / layout.CONFIG).is_file() or path.parent.name != jobs.PIPELINE


def markdown(rows: dict[str, Row]) -> str:
    """One table a verb, the best run first: names, the settings in which the verb's runs differ, and final numbers."""
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
    lines = []
    for name in ranked:
        values = [_text(settings[name].get(key)) for key in varied]
        lines.append([name, *values, *(_text(rows[name].result.get(key)) for key in shown)])
    return f"## {verb}\n\n" + table_of(["run", *varied, *shown], lines, 1 + len(varied))


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int) -> str:
    """A Markdown table whose first columns are texts, and the others numbers."""
    lines = [
        [*map(plain, head)],
        ["---"] * num_texts + ["---:"] * (len(head) - num_texts),
        *([*map(plain, row)] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain(text: str) -> str:
    """Text as markdown shows it: in one line, with nothing that could be a link, a tag or the end of a cell."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return MARKUP.sub(r"\\\g<0>", html.escape(text, quote=False))


def _rank(result: dict[str, Any]) -> tuple[float, float]:
    """Sort key: the highest accuracy first, then the lowest loss."""
    loss = next((result[key] for key in NUMBERS[2:] if key in result), math.inf)
    return -result.get("top1", -math.inf), loss


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
