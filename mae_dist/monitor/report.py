"""`mae-dist report RUN [RUN ...]`: one HTML file about one or several runs, to read, to compare and to pass on.

The file is self-contained, written atomically, opens offline, in light and dark, on a phone and on paper. A run that is
not finished, or has no metrics yet, is reported as such. The template escapes everything that comes from a run.
Reads files only: starts nothing and changes nothing in a run's folder but the report itself.
"""

import base64
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from mae_dist import config as configuration
from mae_dist import printed
from mae_dist.cli import Parser
from mae_dist.monitor import (
    compare,
    following,
    matrix,
    predictions,
    probe_table,
    provenance,
    records,
    report_texts,
    speed,
    svg,
)  # fmt: skip
from mae_dist.monitor.compare import Group
from mae_dist.monitor.records import Run
from mae_dist.monitor.svg import Series, number
from mae_dist.run import jsonl, layout
from mae_dist.schema import PretrainConfig
from mae_dist.track_settings import ONLINE

log = logging.getLogger(__name__)

MOST_DETAILED = 20
"""Groups of runs with text, curves, pictures and settings of their own; of more, as in a sweep, the tables have all."""
MAX_EARLIER_PICTURES = 6
MAX_INCIDENTS, MAX_REASONS = 50, 20
MAX_FURTHER_PLOTS = 24
MOST_PICTURE, MOST_PICTURES = 2**25, 2**28
"""Bytes of a picture, and of all that are shown of a run."""
LOSS_UNITS = {"probe": "cross-entropy, nats", "finetune": "cross-entropy, nats"}
NORM_PIX = (
    "With mae.norm_pix=true the loss is in units of per-patch variance: 1.0 is predicting the patch mean. "
    "Pictures un-normalise with the true patch statistics."
)
SEEDS = "A group of seeds is one curve, their mean."
BAND = "Dashed boxes: where the mean loss of these epochs should be (track.band)."
ROWS = {
    "reconstruction": "rows: original, masked, reconstructed",
    "loss_by_position": "mean test loss of each patch of the image, black the least, white the most",
    "look": "rows: original, masked, reconstructed, and where the class token of the last block looks",
}
KNOWN = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "bad"}
"""Numbers of metrics.jsonl that have their own plot, or are counted elsewhere."""


@dataclass(frozen=True)
class Report:
    """All that a report is made from."""

    title: str
    written: str
    runs: list[Run]
    groups: list[Group]
    pairs: list[compare.Pair]
    predictions: list[predictions.Predictions]

    @property
    def detailed(self) -> list[Group]:
        """The groups with text, curves and pictures: all, or of many the MOST_DETAILED with the highest accuracy."""
        if len(self.groups) <= MOST_DETAILED:
            return self.groups
        return sorted(self.groups, key=lambda group: -group.top1 if group.scores else math.inf)[:MOST_DETAILED]

    def next(self, run: Run) -> list[following.Next]:
        """Commands that may follow on a run."""
        own, starts = {str(run.path), run.config.out}, {other.init_from for other in self.runs}
        random = any(run in pair.other.runs for pair in self.pairs)
        names = {run.name, run.path.name}
        predicted = any(Path(found.origin.partition("@")[0]).name in names for found in self.predictions)
        return following.after(
            run.verb, run.config, str(run.path), run.starts[-1].get("command") if run.starts else None,
            finished=run.state == "finished", is_start=bool(own & starts), has_random=random, predicted=predicted,
        )  # fmt: skip

    def following(self) -> list[tuple[Run, list[following.Next]]]:
        """The commands of `next` of each run that has some; of a group of seeds that are finished, of the first."""
        chosen = (
            run for group in self.detailed for run in group.runs if run == group.runs[0] or run.state != "finished"
        )
        return [(run, steps) for run in chosen if (steps := self.next(run))]


def main(argv: list[str]) -> int:
    """Run `mae-dist report ARGV`: write the report, print its path and return the exit status."""
    parser = Parser(prog="mae-dist report", description="Write one HTML file about one or several runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or of `mae-dist predict`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    parser.add_argument("--title", metavar="T", help="default: the runs' names")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all numbers as JSON instead, or write them to --out")
    form.add_argument("--md", action="store_true", help="print Markdown tables of the results instead, or write them")
    args = parser.parse_args(argv)
    if args.out and args.out.is_dir():
        raise ValueError(f"out={args.out}: is a folder; name a file, for example {args.out / 'report.html'}")
    title = args.title or ", ".join(run.resolve().name for run in args.runs[:3]) + ", ..." * (len(args.runs) > 3)
    report = read(args.runs, title, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    as_text = args.json or args.md
    text = report_texts.as_json(report) if args.json else report_texts.as_markdown(report) if args.md else page(report)
    if as_text and args.out is None:
        print(text, end="")
        return 0
    out = args.out or report.runs[0].path / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomic(out, text)
    print(out)
    return 0


def read(paths: Sequence[Path], title: str, written: str) -> Report:
    """Read folders of runs and of predictions; `written` is when. Raises ValueError for any other folder."""
    of_predict = [path for path in dict.fromkeys(paths) if predictions.is_of_predict(path)]
    others = [path for path in paths if path not in of_predict]
    if not others:
        raise ValueError(f"{of_predict[0]}: holds predictions; give the run that made them as well")
    runs, groups = compare.grouped(records.read_runs(others))
    found = [predictions.read(path) for path in of_predict]
    return Report(title, written, runs, groups, compare.pairs(groups), found)


# The page


def page(report: Report) -> str:
    """The whole HTML text."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    columns, cells = summary(report.runs)
    tables = [table for group in report.detailed for run in group.runs if (table := probe_table.of(run))]
    return environment.get_template("report.html.j2").render(
        report=report, runs=report.runs, columns=columns, cells=cells, story=report_texts.story,
        curves=curves(report.detailed), galleries=galleries([run for group in report.detailed for run in group.runs]),
        probe_tables=tables, differences=compare.differences(report.detailed),
        speeds=[(run, speed.of(run)) for run in report.runs],
        style=Markup((folder / "report.css").read_text()), max_incidents=MAX_INCIDENTS, max_reasons=MAX_REASONS,
        escaped=printed.escaped, parts=speed.PARTS,
        environments=provenance.environments(report.runs), following=report.following(), documents=documents,
        changed=changed, number=number, colour=svg.colour, swatch=lambda style: Markup(svg.swatch(style)),
        max_classes=predictions.MOST_CLASSES,
        confusion=lambda found: Markup(matrix.confusion(found.order, found.counts)),
        whisker=lambda ends, scale: Markup(matrix.whisker(ends, scale)), labelled=matrix.LABELLED,
        file_name=lambda path: Path(path).name, end_of=lambda text: text if len(text) <= 40 else f"...{text[-37:]}",
    )  # fmt: skip


def summary(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of numbers in the first table, those that some run has, without those of track.online (there is no
    room), and each run's cells by its name.
    """
    all_numbers = {run.name: records.numbers(run) for run in runs}
    known = [name for name in report_texts.COLUMNS if name not in ONLINE.values()]
    names = [name for name in known if any(numbers[name] is not None for numbers in all_numbers.values())]
    cells = {run: [report_texts.cell(n, numbers[n]) for n in names] for run, numbers in all_numbers.items()}
    return [report_texts.COLUMNS[name] for name in names], cells


def curves(groups: Sequence[Group]) -> Iterator[tuple[str, Markup, Markup, str]]:
    """(verb, plot of the loss, the other plots, notes) of each verb whose runs have metrics."""
    for verb in dict.fromkeys(group.runs[0].verb for group in groups):
        chosen = [group for group in groups if group.runs[0].verb == verb]
        runs = [run for group in chosen for run in group.runs]

        def drawn(title: str, key: str, unit: str = "", chosen: list[Group] = chosen, **shape: Any) -> str:
            of = records.data_wait if key == "data_wait" else partial(records.points, key=key)
            series = []
            for group in chosen:
                points = sorted(point for run in group.runs for point in of(run))
                marks = [step for run in group.runs for step in run.resumed]
                series.append(Series(group.name, group.style, points, marks))
            return svg.plot(title, series, unit, **shape)

        loss = drawn("Loss", "loss", LOSS_UNITS.get(verb, ""), wide=True, boxes=(boxes := expected(runs)))
        small = "".join(drawn(_title(key), key, "%" if "top" in key else "") for key in further(runs))
        small += (
            drawn("Learning rate", "lr", zero=True)
            + drawn("Gradient norm", "grad_norm", zero=True)
            + drawn("Throughput", "images_per_second", "images/s", zero=True)
            + drawn("Waiting for data", "data_wait", "% of the time", zero=True)
        )
        notes = ["Across: optimizer steps. Light bands: the lowest to the highest value of what is drawn as one point."]
        notes += [NORM_PIX] * any(isinstance(run.config, PretrainConfig) and run.config.mae.norm_pix for run in runs)
        notes += [f"The loss is the mean over {heads} heads." for heads in {run.num_heads for run in runs} - {0}]
        notes += [SEEDS] * any(len(group.runs) > 1 for group in chosen)
        notes += [BAND] * bool(boxes)
        notes += ["Dotted vertical lines: the run was resumed there."] * any(run.resumed for run in runs)
        if loss + small:
            yield verb, Markup(loss), Markup(small), " ".join(notes)


def expected(runs: Sequence[Run]) -> list[svg.Box]:
    """Where the loss should be: the band of the first run that has one (track.band), by step."""
    run = next((run for run in runs if run.config.track.band and run.last("epoch")), None)
    if run is None:
        return []
    steps, begin, found = (run.last("step") or 0) / (run.last("epoch") or 1), 0.0, []
    for end, low, high in run.config.track.band:
        text = f"track.band: {low:g} to {high:g} in epochs {begin:g} to {end:g}"
        found.append(svg.Box(begin * steps, end * steps, low, high, text))
        begin = end
    return found


def further(runs: Sequence[Run]) -> list[str]:
    """Names of all other numbers that evaluations and the like have recorded, in their order, MAX_FURTHER_PLOTS at
    most; those of steps and intervals are in plots and tables of their own.
    """
    own = (jsonl.STEP, jsonl.INTERVAL)
    others = (line for run in runs for line in run.metrics if line.get("kind") not in own)
    found = dict.fromkeys(key for line in others for key, value in line.items() if records.finite(value))
    return [key for key in found if key not in KNOWN and not key.startswith("num_")][:MAX_FURTHER_PLOTS]


def _title(key: str) -> str:
    text = report_texts.COLUMNS.get(key, key.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5"))
    text = text.removesuffix(" %")
    return text[:1].upper() + text[1:60]


def is_png(file: Path) -> bool:
    """Whether a file is a PNG by its first bytes, of a size that a report can hold, and no link or folder."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST_PICTURE:
        return False
    with file.open("rb") as stream:
        return stream.read(8) == b"\x89PNG\r\n\x1a\n"


def galleries(runs: Sequence[Run]) -> Iterator[tuple[Run, str, str, list[tuple[int, str]]]]:
    """(run, kind, what the rows are, evenly chosen pictures, oldest first) for each run and kind of picture.

    A picture is (step, PNG in base64). What is none, and links, which may lead to other files, are left out.
    """
    for run in runs:
        kinds: dict[str, list[tuple[int, Path]]] = {}
        for file in (run.path / "pictures").glob("*.png"):
            kind, _, step = file.stem.rpartition("-")
            if step.isdecimal() and is_png(file):
                kinds.setdefault(kind, []).append((int(step), file))
        room = MOST_PICTURES
        for kind, files in sorted(kinds.items()):
            *earlier, latest = sorted(files)
            places = dict.fromkeys(i * len(earlier) // MAX_EARLIER_PICTURES for i in range(MAX_EARLIER_PICTURES))
            chosen = [earlier[place] for place in places] if earlier else []
            room -= sum(file.stat().st_size for _, file in (*chosen, latest))
            if room < 0:
                log.warning("%s: pictures from %s on are left out, as all have over %d MB", run.path, kind, 2**8)
                break
            encoded = [(step, base64.b64encode(file.read_bytes()).decode()) for step, file in (*chosen, latest)]
            yield run, kind, ROWS.get(kind, ""), encoded


def changed(run: Run) -> str:
    """The settings of a run that are not the defaults of its verb, as they are written on a command line."""
    return "\n".join(report_texts.setting(*pair) for pair in configuration.changed(run.config).items())


def documents(run: Run) -> list[tuple[str, str]]:
    """(heading, text) of the run's settings, of where each start ran, and of its result."""
    as_yaml = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    starts = [(f"start {i}", as_yaml(start)) for i, start in enumerate(run.starts, 1)]
    return [(layout.CONFIG, run.config_text), *starts, *([(layout.RESULT, as_yaml(run.result))] if run.result else [])]
