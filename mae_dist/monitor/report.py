"""`mae-dist report RUN [RUN ...]`: one HTML file about one or several runs, to read, to compare and to pass on.

The file is self-contained, written atomically, opens offline, in light and dark and on a phone. A run that is not
finished, or has no metrics yet, is reported as such. The template escapes everything that comes from a run.
Reads files only: starts nothing and changes nothing in a run's folder but the report itself.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from mae_dist import config as configuration
from mae_dist.cli import Parser, duration
from mae_dist.monitor import incidents, svg
from mae_dist.monitor.svg import Series, number
from mae_dist.run import events, jsonl, layout
from mae_dist.schema import RANDOM, PretrainConfig, RunConfig

MAX_EARLIER_PICTURES = 6
MAX_INCIDENTS = 50
MOST_STEPS = 50_000
"""Steps of a metrics.jsonl that are shown, at least, where it has as many."""
MOST_PICTURE = 2**25
"""Bytes of a picture."""
LOSS_UNITS = {"probe": "cross-entropy, nats", "finetune": "cross-entropy, nats"}
NORM_PIX = (
    "With mae.norm_pix=true the loss is in units of per-patch variance: 1.0 is predicting the patch mean. "
    "Pictures un-normalise with the true patch statistics."
)
ROWS = {"reconstruction": "rows: original, masked, reconstructed"}
DASH = "\N{EN DASH}"
"""Shown in place of a number that a run does not have."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """What one run's folder holds. `style` is the run's place in the report; `result` is {} until it is finished;
    `every` is how many recorded steps each of those in `metrics` stands for.
    """

    path: Path
    name: str
    style: int
    verb: str
    data_fingerprint: str
    total_steps: int
    config: RunConfig
    config_text: str
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    starts: list[dict[str, Any]]
    incidents: list[incidents.Incident]
    num_unreadable: int
    every: int

    @property
    def resumed(self) -> list[float]:
        """The steps at which the run was started again."""
        return [start["step"] for start in self.starts if start["step"] > 0]

    @property
    def init_from(self) -> str:
        """The run whose weights this run started from, or `random`."""
        return getattr(self.config, "init_from", RANDOM)

    @property
    def top1(self) -> float | None:
        """Test accuracy in percent of a finished run that measured it."""
        top1 = self.result.get("top1")
        return top1 if _finite(top1) and self.result.get("num_test_images") else None

    @property
    def state(self) -> str:
        """`finished`, or how far the run has come."""
        step = self.last("step")
        if self.result or step is None:
            return "finished" if self.result else "incomplete, no step yet"
        return f"incomplete at step {number(step)} of {number(self.total_steps)}"

    def last(self, key: str) -> float | None:
        """The latest value of a metric, None where there is none."""
        return next((line[key] for line in reversed(self.metrics) if _finite(line.get(key))), None)


class Pair(NamedTuple):
    """Two finished runs with a test accuracy that differ only in their initial weights."""

    random: Run
    run: Run

    @property
    def scores(self) -> list[tuple[float, int]]:
        """Top-1 in percent and the number of test images, of each run."""
        return [(run.result["top1"], run.result["num_test_images"]) for run in self]

    @property
    def gain(self) -> float:
        """Points of top-1 by which the pretrained run is better."""
        return self.run.result["top1"] - self.random.result["top1"]

    @property
    def standard_error(self) -> float:
        """Of the gain, in points, as if the two had been tested on independent samples of images. On the same images,
        where two runs often err together, it is smaller.
        """
        return math.sqrt(sum(top1 * (100 - top1) / num_images for top1, num_images in self.scores))

    @property
    def num_test_images(self) -> str:
        """One number as text, or two where the runs were tested on different splits."""
        return " and ".join(dict.fromkeys(f"{num_images:,}" for _, num_images in self.scores))


def main(argv: list[str]) -> int:
    """Run `mae-dist report ARGV`: write the report, print its path and return the exit status."""
    parser = Parser(prog="mae-dist report", description="Write one HTML file about one or several runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN")
    parser.add_argument("--title", metavar="T", help="default: the runs' names")
    args = parser.parse_args(argv)
    title = args.title or ", ".join(run.resolve().name for run in args.runs[:3]) + ", ..." * (len(args.runs) > 3)
    print(write(args.runs, args.out or args.runs[0] / "report.html", title))
    return 0


def write(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Write the report about `runs` to the file `out` and return it. Raises ValueError for a folder that is no run."""
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; name a file, for example {out / 'report.html'}")
    text = page(read_runs(runs), title, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomic(out, text)
    return out


# Reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run once, in the given order. Its name is its folder's, or the whole path where two are the same."""
    unique = list({path.resolve(): path for path in paths}.items())
    names = [resolved.name for resolved, _ in unique]
    return [
        _read_run(path, str(path) if names.count(resolved.name) > 1 else resolved.name, style)
        for style, (resolved, path) in enumerate(unique)
    ]


def _read_run(path: Path, name: str, style: int) -> Run:
    file = path / layout.CONFIG
    if not file.is_file():
        raise ValueError(f"run {path}: holds no config.yaml, so it is no run of mae-dist; give the out= of a run")
    verb, data_fingerprint, config = layout.settings(path)
    metrics, *damaged, every = jsonl.read_thinned(path / layout.METRICS, MOST_STEPS)
    recorded, also_damaged = jsonl.read_counting(path / events.FILE)
    recorded = events.sound(recorded, events.FIELDS)
    return Run(
        path=path, name=name, style=style, verb=verb, data_fingerprint=data_fingerprint, config=config,
        config_text=file.read_text("utf-8"), total_steps=layout.read_config(path)["total_steps"], result=_result(path),
        num_unreadable=sum(damaged, also_damaged), every=every,
        metrics=[line for line in metrics if _finite(line.get("step"))],
        starts=[event for event in recorded if event["event"] == "start"], incidents=incidents.of(recorded, path),
    )  # fmt: skip


def _result(path: Path) -> dict[str, Any]:
    try:
        return layout.result(path) or {}
    except ValueError as error:
        raise ValueError(f"{path / layout.RESULT}: is damaged ({error}); restore it or leave the run out") from error


# Numbers


def points(run: Run, key: str) -> list[Point]:
    """(step, value) of one metric by step, finite values only; of a step that a resumed run repeated, the later."""
    values = {line["step"]: line[key] for line in run.metrics if _finite(line.get(key))}
    return sorted(values.items())


def data_wait(run: Run) -> list[Point]:
    """(step, percent of a mean step's time for which that step waited for data), 100 at most."""
    batch, speed = run.config.train.global_batch, dict(points(run, "images_per_second"))
    waits = [(step, wait) for step, wait in points(run, "data_wait") if step in speed]
    return [(step, min(100.0, 100 * wait * speed[step] / batch)) for step, wait in waits]


def training_seconds(run: Run) -> float:
    """Time spent in training steps, from their number and the throughput; 0 where nothing was measured."""
    batch, speed = run.config.train.global_batch, points(run, "images_per_second")
    before = [0.0, *(step for step, _ in speed)]
    return sum(batch * (step - last) / rate for (step, rate), last in zip(speed, before, strict=False) if rate > 0)


def summary(run: Run) -> dict[str, str]:
    """The numbers of a run in the first table: column -> text."""

    def shown(value: float | None, digits: int | None = None) -> str:
        if value is None or not _finite(value):
            return DASH
        return number(value) if digits is None else f"{value:,.{digits}f}"

    result, spent = run.result, training_seconds(run)
    speed, num_bad = ([value for _, value in points(run, key)] for key in ("images_per_second", "bad"))
    return {
        "epochs": shown(run.last("epoch")),
        "steps": shown(result.get("steps", run.last("step"))),
        "top-1 %": shown(result.get("top1", run.last("test_top1")), 2),
        "top-5 %": shown(result.get("top5", run.last("test_top5")), 2),
        "loss": shown(result.get("loss", run.last("loss"))),
        "test images": shown(result.get("num_test_images")),
        "bad samples": shown(sum(num_bad)),
        "images/s": shown(median(speed) if speed else None),
        "training": duration(spent) if spent else DASH,
    }


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Each run with a score that was initialised from another run, beside the one with the same verb, data and deciding
    settings that was initialised at random.
    """

    def key(run: Run) -> str:
        settings = configuration.result_settings(run.config) | {"init_from": None}
        return json.dumps([run.verb, run.data_fingerprint, settings], sort_keys=True, default=str)

    scored = [run for run in runs if run.top1 is not None]
    randoms = {key(run): run for run in scored if run.init_from == RANDOM}
    return [Pair(randoms[key(run)], run) for run in scored if run.init_from != RANDOM and key(run) in randoms]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The page


def page(runs: Sequence[Run], title: str, written: str) -> str:
    """The whole HTML text; `written` is when."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        title=title, written=written, runs=runs, pairs=pairs(runs), curves=curves(runs), galleries=galleries(runs),
        style=Markup((folder / "report.css").read_text()), max_incidents=MAX_INCIDENTS, summary=summary,
        documents=documents, number=number, colour=svg.colour, swatch=lambda style: Markup(svg.swatch(style)),
        file_name=lambda path: Path(path).name, end_of=lambda text: text if len(text) <= 40 else f"...{text[-37:]}",
    )  # fmt: skip


def curves(runs: Sequence[Run]) -> Iterator[tuple[str, Markup, Markup, str]]:
    """(verb, plot of the loss, the other plots, notes) of each verb whose runs have metrics."""
    for verb in dict.fromkeys(run.verb for run in runs):
        chosen = [run for run in runs if run.verb == verb]

        def drawn(title: str, key: str, unit: str = "", chosen: list[Run] = chosen, **shape: bool) -> str:
            of = data_wait if key == "data_wait" else partial(points, key=key)
            return svg.plot(title, [Series(run.name, run.style, of(run), run.resumed) for run in chosen], unit, **shape)

        loss = drawn("Loss", "loss", LOSS_UNITS.get(verb, ""), wide=True)
        small = (
            drawn("Test top-1", "test_top1", "%")
            + drawn("Test top-5", "test_top5", "%")
            + drawn("Learning rate", "lr", zero=True)
            + drawn("Gradient norm", "grad_norm", zero=True)
            + drawn("Throughput", "images_per_second", "images/s", zero=True)
            + drawn("Waiting for data", "data_wait", "% of the time", zero=True)
        )
        notes = ["Across: optimizer steps."]
        notes += [NORM_PIX] * any(isinstance(run.config, PretrainConfig) and run.config.mae.norm_pix for run in chosen)
        notes += ["Dotted vertical lines: the run was resumed there."] * any(run.resumed for run in chosen)
        if loss + small:
            yield verb, Markup(loss), Markup(small), " ".join(notes)


def is_png(file: Path) -> bool:
    """Whether a file is a PNG by its first bytes, of a size that a report can hold, and no link or folder."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST_PICTURE:
        return False
    with file.open("rb") as stream:
        return stream.read(8) == b"\x89PNG\r\n\x1a\n"


def galleries(runs: Sequence[Run]) -> Iterator[tuple[Run, str, str, tuple[int, str], list[tuple[int, str]]]]:
    """(run, kind, what the rows are, latest picture, evenly chosen earlier ones) for each run and kind of picture.

    A picture is (step, PNG in base64). What is none, and links, which may lead to other files, are left out.
    """
    for run in runs:
        kinds: dict[str, list[tuple[int, Path]]] = {}
        for file in (run.path / "pictures").glob("*.png"):
            kind, _, step = file.stem.rpartition("-")
            if step.isdecimal() and is_png(file):
                kinds.setdefault(kind, []).append((int(step), file))
        for kind, files in sorted(kinds.items()):
            *earlier, latest = sorted(files)
            places = dict.fromkeys(i * len(earlier) // MAX_EARLIER_PICTURES for i in range(MAX_EARLIER_PICTURES))
            chosen = [earlier[place] for place in places] if earlier else []
            (last, *small) = [(step, base64.b64encode(file.read_bytes()).decode()) for step, file in (latest, *chosen)]
            yield run, kind, ROWS.get(kind, ""), last, small


def documents(run: Run) -> list[tuple[str, str]]:
    """(heading, text) of the run's settings, of where each start ran, and of its result."""
    as_yaml = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    starts = [(f"start {i}", as_yaml(start)) for i, start in enumerate(run.starts, 1)]
    return [(layout.CONFIG, run.config_text), *starts, *([(layout.RESULT, as_yaml(run.result))] if run.result else [])]
