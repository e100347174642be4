"""The verb `report`: one or several RunDirs become one HTML file that people can read, compare and pass on.

Promises: one self-contained file, written whole or not at all, that opens offline, in light and dark and on a phone; a
run that is not finished, or has no metrics yet, is reported as such; everything that comes from a run is escaped.
Reads files only: must not import torch, start anything or change a RunDir beyond the report itself.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mae_dist.monitor import incidents
from mae_dist.monitor.svg import STYLE, Series, colour, number, plot, swatch
from mae_dist.schema import RANDOM, RESULT_SECTIONS, WHERE_DATA_LIES

EARLIER_PICTURES = 6
SHOWN_INCIDENTS = 50
LOSS_UNITS = {"probe": "cross-entropy, nats", "finetune": "cross-entropy, nats"}
NORM_PIX = (
    "With mae.norm_pix=true the loss is in units of per-patch variance: 1.0 is predicting the patch mean. "
    "Pictures un-normalise with the true patch statistics."
)
ROWS = {"reconstruction": "rows: original, masked, reconstructed"}
Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """What one RunDir says. `style` is its place in the report; `result` is empty while the run is incomplete."""

    path: Path
    name: str
    style: int
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    starts: list[dict[str, Any]]
    incidents: list[incidents.Incident]
    num_unreadable: int

    @property
    def verb(self) -> str:
        return str(self.config["verb"])

    @property
    def resumed(self) -> list[float]:
        """The steps at which the run was started again."""
        return [start["step"] for start in self.starts if _finite(start.get("step")) and start["step"] > 0]

    def setting(self, section: str, key: str) -> Any:
        """The value of a field of config.yaml, None where the verb has no such field."""
        return (self.config.get(section) or {}).get(key)


def main(argv: list[str]) -> int:
    """`mae-dist report RUN [RUN ...] [--out FILE.html] [--title T]`; prints the path of the report."""
    parser = argparse.ArgumentParser(
        prog="mae-dist report", description="Write one HTML file about one or several runs."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN")
    parser.add_argument("--title", metavar="T", help="default: the runs' names")
    args = parser.parse_args(argv)
    title = args.title or ", ".join(run.resolve().name for run in args.runs[:3]) + ", ..." * (len(args.runs) > 3)
    print(write(args.runs, args.out or args.runs[0] / "report.html", title))
    return 0


def write(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Write the report about `runs` to the file `out` and return it. Raises ValueError where a run is no RunDir."""
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; name a file, for example {out / 'report.html'}")
    text = page(read_runs(runs), title, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    return unfinished.replace(out)


# Reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read RunDirs, each once, in the given order. Names are folder names, or whole paths where those are the same."""
    unique = list({path.resolve(): path for path in paths}.items())
    names = [resolved.name for resolved, _ in unique]
    return [
        _read_run(path, str(path) if names.count(resolved.name) > 1 else resolved.name, style)
        for style, (resolved, path) in enumerate(unique)
    ]


def _read_run(path: Path, name: str, style: int) -> Run:
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"run {path}: holds no config.yaml, so it is no run of mae-dist; give the out= folder of a run"
        )
    config = _mapping(file, yaml.safe_load)
    if "verb" not in config:
        raise ValueError(f"{file}: has no key `verb`, which says what the run did; restore it or leave the run out")
    result = _mapping(path / "result.json", json.loads) if (path / "result.json").is_file() else {}
    files = [read_lines(path / f"{kind}.jsonl") for kind in ("metrics", "provenance", "rewinds", "ends")]
    (metrics, starts, rewinds, ends), bad = zip(*files, strict=True)
    found = incidents.of(starts, rewinds, ends, incidents.notes(path))
    metrics = [line for line in metrics if _finite(line.get("step"))]
    return Run(path, name, style, file.read_text("utf-8"), config, metrics, result, starts, found, sum(bad))


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return dict(parse(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: cannot be understood ({reason}); restore it or leave the run out") from error


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file, one a line, and how many lines could not be read.

    A file that does not exist has none, and a last line that has no end yet is being written: it does not count.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found, num_unreadable = [], 0
    for line in filter(str.strip, text.splitlines(keepends=True)):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif line.endswith("\n"):
            num_unreadable += 1
    return found, num_unreadable


# What the runs say, as numbers


def points(run: Run, key: str) -> list[Point]:
    """(step, value) of one metric by step, finite values only; of a step that a resumed run did again, the later."""
    values = {line["step"]: line[key] for line in run.metrics if _finite(line.get(key))}
    return sorted(values.items())


def data_wait(run: Run) -> list[Point]:
    """(step, percent of a mean step's time for which that step waited for data), 100 at most."""
    batch, speed = run.setting("train", "global_batch"), dict(points(run, "images_per_second"))
    waits = [(step, wait) for step, wait in points(run, "data_wait") if batch and step in speed]
    return [(step, min(100.0, 100 * wait * speed[step] / batch)) for step, wait in waits]


def seconds(run: Run) -> float:
    """Time spent in training steps, from their number and the throughput; 0 where nothing was measured."""
    batch, speed = run.setting("train", "global_batch") or 0, points(run, "images_per_second")
    before = [0.0, *(step for step, _ in speed)]
    return sum(batch * (step - last) / rate for (step, rate), last in zip(speed, before, strict=False) if rate > 0)


def duration(seconds: float) -> str:
    """Seconds as people say them; a dash for 0."""
    unit, length = next((pair for pair in (("h", 3600), ("min", 60)) if seconds >= 2 * pair[1]), ("s", 1))
    return f"{seconds / length:.3g} {unit}" if seconds else "&ndash;"


def last(run: Run, key: str) -> float | None:
    """The latest value of a metric, None where there is none."""
    return next((line[key] for line in reversed(run.metrics) if _finite(line.get(key))), None)


def state(run: Run) -> str:
    """finished, or how far the run has come; where the settings count epochs, the total follows from those so far."""
    step, epoch, epochs = last(run, "step"), last(run, "epoch"), run.setting("train", "epochs")
    if run.result or step is None:
        return "finished" if run.result else "incomplete, no step yet"
    total = run.setting("train", "steps") or (round(step / epoch * epochs) if epoch and epochs else None)
    return f"incomplete at step {number(step)} of {number(total) if total else 'an unknown number'}"


def score(run: Run) -> tuple[float, int] | None:
    """(top-1 in percent, number of test images) of a finished run that measured it."""
    if not _finite(run.result.get("top1")) or not run.result.get("num_test_images"):
        return None
    return run.result["top1"], run.result["num_test_images"]


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(from random, from another run) of those with a score whose verb and every deciding setting are else the same."""
    scored = [run for run in runs if score(run)]
    randoms = {_decisive(run): run for run in scored if run.config.get("init_from") == RANDOM}
    others = [run for run in scored if run.config.get("init_from", RANDOM) != RANDOM]
    return [(randoms[_decisive(run)], run) for run in others if _decisive(run) in randoms]


def _decisive(run: Run) -> str:
    parts = {name: dict(run.config.get(name) or {}) for name in RESULT_SECTIONS}
    for field in WHERE_DATA_LIES:
        parts["data"].pop(field, None)
    return json.dumps([run.verb, run.config.get("data_fingerprint"), parts], sort_keys=True, default=str)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The page, in the order of reading


def page(runs: Sequence[Run], title: str, written: str) -> str:
    """The whole HTML text. Its policy forbids the browser to load anything, so that it stays self-contained."""
    verbs = dict.fromkeys(run.verb for run in runs)
    body = "\n".join(
        [
            f'<h1>{escape(title)}</h1><p class="soft">{len(runs)} run{"s" * (len(runs) > 1)}, {written}</p>',
            _summary(runs),
            _pairs(runs),
            *(_curves(verb, [run for run in runs if run.verb == verb]) for verb in verbs),
            _galleries(runs),
            _incidents(runs),
            _details(runs),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _shown(value: float | None, digits: int | None = None) -> str:
    if not _finite(value) or value is None:
        return "&ndash;"
    return number(value) if digits is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], first_number: int) -> str:
    """Cells are HTML already. Columns from `first_number` to the one before the last hold numbers."""
    numeric = range(first_number, len(head) - 1)

    def row(tag: str, cells: Sequence[str]) -> str:
        marked = (f"<{tag}{' class=num' * (i in numeric)}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    lines = "\n".join(row("td", cells) for cells in rows)
    return f'<div class="scroll"><table><thead>{row("th", head)}</thead>\n<tbody>{lines}</tbody></table></div>'


def _named(run: Run) -> str:
    path, name = escape(str(run.path)), escape(run.name)
    return f'<span class="nowrap" title="{path}">{swatch(run.style)} {name}</span>'


def _summary(runs: Sequence[Run]) -> str:
    texts = ("run", "verb", "model", "init_from")
    numbers = ("epochs", "steps", "top-1 %", "top-5 %", "loss", "test images", "bad samples", "images/s", "training")
    rows = []
    for run in runs:
        top1, top5 = (run.result.get(f"top{k}", last(run, f"test_top{k}")) for k in (1, 5))
        steps, loss = run.result.get("steps", last(run, "step")), run.result.get("loss", last(run, "loss"))
        speed, num_bad = ([value for _, value in points(run, key)] for key in ("images_per_second", "bad"))
        cells = [_named(run), escape(run.verb), escape(str(run.setting("model", "name"))), _start(run)]
        cells += [_shown(last(run, "epoch")), _shown(steps), _shown(top1, 2), _shown(top5, 2), _shown(loss)]
        cells += [_shown(run.result.get("num_test_images")), _shown(sum(num_bad))]
        cells += [_shown(median(speed) if speed else None), duration(seconds(run)), escape(state(run))]
        rows.append(cells)
    return _section("Runs", _table((*texts, *numbers, "state"), rows, first_number=len(texts)))


def _pairs(runs: Sequence[Run]) -> str:
    cards = "\n".join(_pair(random, run) for random, run in pairs(runs))
    return _section("Pretrained versus random", f'<div class="grid">{cards}</div>' if cards else "")


def _pair(random: Run, run: Run) -> str:
    scores = [(one, *pair) for one in (run, random) if (pair := score(one))]
    (_, after, _), (_, before, _) = scores
    gain = f"{after - before:+.2f}".replace("-", "&minus;")
    # as of two independent samples; on the same images, where runs often err together, it is rather less
    error = math.sqrt(sum(top1 * (100 - top1) / num_images for _, top1, num_images in scores))
    tested = " and ".join(dict.fromkeys(f"{num_images:,}" for *_, num_images in scores))
    longest = max(after, before) or 1
    bars = "".join(
        f'<div class="bar {colour(one.style)}"><span>from {_start(one)}</span><b>{top1:.2f}</b>'
        f'<i style="width: {100 * top1 / longest:.1f}%"></i></div>'
        for one, top1, _ in scores
    )
    return (
        f'<article class="pair"><h3>{escape(f"{run.verb}: {run.name} versus {random.name}")}</h3>'
        f'<p class="gain">{gain} <small>points top-1</small></p>{bars}'
        f'<p class="soft">On {tested} test images; same settings but for the start. Standard error of '
        f"that difference from the choice of test images: {error:.2f} points; a new seed may change more.</p></article>"
    )


def _start(run: Run) -> str:
    start = str(run.config.get("init_from", RANDOM))
    return f'<span class="nowrap" title="{escape(start)}">{escape(Path(start).name)}</span>'


def _curves(verb: str, runs: Sequence[Run]) -> str:
    def series(of: Callable[[Run], list[Point]]) -> list[Series]:
        return [Series(run.name, run.style, of(run), run.resumed) for run in runs]

    def metric(key: str) -> list[Series]:
        return series(lambda run: points(run, key))

    loss = plot("Loss", metric("loss"), unit=LOSS_UNITS.get(verb, ""), wide=True)
    small = (
        plot("Test top-1", metric("test_top1"), unit="%")
        + plot("Test top-5", metric("test_top5"), unit="%")
        + plot("Learning rate", metric("lr"), zero=True)
        + plot("Gradient norm", metric("grad_norm"), zero=True)
        + plot("Throughput", metric("images_per_second"), unit="images/s", zero=True)
        + plot("Waiting for data", series(data_wait), unit="% of the time", zero=True)
    )
    if not loss + small:
        return ""
    notes = ["Across: optimizer steps."]
    notes += [NORM_PIX] * any(run.setting("mae", "norm_pix") for run in runs)
    notes += ["Dotted vertical lines: the run was resumed there."] * any(run.resumed for run in runs)
    text = f'<p class="soft">{" ".join(notes)}</p>'
    return _section(f"Curves of {verb}", f'<div class="grid">{loss}</div>{text}<div class="grid">{small}</div>')


def _galleries(runs: Sequence[Run]) -> str:
    """For each run and kind of picture the latest large and earlier ones, evenly chosen, small."""
    parts = []
    for run in runs:
        kinds: dict[str, list[tuple[int, Path]]] = {}
        for file in (run.path / "pictures").glob("*.png"):
            kind, _, step = file.stem.rpartition("-")
            if step.isdecimal():
                kinds.setdefault(kind, []).append((int(step), file))
        for kind, files in sorted(kinds.items()):
            *earlier, latest = sorted(files)
            chosen = [earlier[i * len(earlier) // EARLIER_PICTURES] for i in range(EARLIER_PICTURES)] if earlier else []
            small = "".join(_picture(run, kind, *one) for one in dict.fromkeys(chosen))
            small = f'<h3>Through time</h3><div class="earlier">{small}</div>' if small else ""
            heading = f'<h3>{_named(run)}: {escape(kind)} <small class="soft">{ROWS.get(kind, "")}</small></h3>'
            parts.append(heading + _picture(run, kind, *latest) + small)
    return _section("Pictures", "\n".join(parts))


def _picture(run: Run, kind: str, step: int, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    alt = escape(f"{kind} of {run.name} at step {step}")
    caption = f"<figcaption>step {number(step)}</figcaption>"
    return f'<figure class="gallery"><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'


def _incidents(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if shown := run.incidents[-SHOWN_INCIDENTS:]:
            heading = f"<h3>{_named(run)}: the last {len(shown)} of {len(run.incidents)}</h3>"
            rows = ([escape(cell) for cell in one] for one in shown)
            parts.append(heading + _table(incidents.Incident._fields, rows, first_number=3))
    return _section("Incidents", "\n".join(parts))


def _details(runs: Sequence[Run]) -> str:
    """What each run was told and where it ran, word for word."""
    parts = []
    for run in runs:
        blocks = [("config.yaml", run.config_text)]
        blocks += [(f"start {i}", _yaml(start)) for i, start in enumerate(run.starts, 1)]
        blocks += [("result.json", _yaml(run.result))] if run.result else []
        inner = "".join(f"<h3>{name}</h3><pre>{escape(text)}</pre>" for name, text in blocks)
        if run.num_unreadable:
            inner = f"<p>{run.num_unreadable} unreadable lines of its .jsonl files were left out.</p>{inner}"
        about = escape(f"{state(run)}, {run.path}")
        parts.append(f"<details><summary>{_named(run)} <small>{about}</small></summary>{inner}</details>")
    return _section("Settings and provenance", "\n".join(parts))


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
