"""A report in words, as JSON for machines, and as Markdown tables to paste into a paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from mae_dist import hints
from mae_dist.cli import duration
from mae_dist.monitor import compare, probe_table, provenance, records, speed
from mae_dist.monitor.compare import Group
from mae_dist.monitor.records import Run
from mae_dist.monitor.runs import plain, table_of
from mae_dist.monitor.svg import number
from mae_dist.run import layout
from mae_dist.schema import RANDOM
from mae_dist.track_settings import ONLINE

if TYPE_CHECKING:
    from mae_dist.monitor.report import Report

COLUMNS = {
    "epochs": "epochs", "steps": "steps", "top1": "top-1 %", "top5": "top-5 %", "knn_top1": "kNN top-1 %",
    "ridge_top1": "ridge top-1 %", "rankme": "RankMe", "loss": "loss", "test_loss": "test loss",
    "num_test_images": "test images", "bad": "bad samples", "images_per_second": "images/s", "seconds": "training",
}  # fmt: skip
"""Number of `records.numbers` -> its heading."""
MD = {
    "top1": 2, "top5": 2, "knn_top1": 2, "ridge_top1": 2, "rankme": 1, "loss": 4, "test_loss": 4, "num_test_images": 0,
}  # fmt: skip
"""Numbers of tables for papers -> digits behind the point."""
DASH = "\N{EN DASH}"
"""Shown in place of a number that a run does not have."""
WORDS = {
    "pretrain": "masked autoencoder pretraining", "knn": "nearest neighbours on frozen features",
    "probe": "linear probe on frozen features", "finetune": "fine-tuning on labels",
}  # fmt: skip


def cell(name: str, value: float | None) -> str:
    """A number of a run as text."""
    if value is None:
        return DASH
    return duration(value) if name == "seconds" else f"{value:,.2f}" if "top" in name else number(value)


def setting(name: str, value: Any) -> str:
    """A setting as it is written on a command line."""
    return hints.given(name, [*value] if isinstance(value, tuple) else value)


def accuracy(group: Group) -> str:
    """The test accuracy of a group, with its spread over seeds; empty without scores."""
    return with_spread(group.scores, 2) if group.scores else ""


def with_spread(values: Sequence[float], digits: int) -> str:
    """The mean of values, and of several their standard deviation."""
    spread = f" \N{PLUS-MINUS SIGN} {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


# In words


def story(group: Group) -> list[str]:
    """What was done, what came out, and what limited the speed: sentences about the runs of a group."""
    run = group.runs[0]
    found = [_done(group), *_outcome(group)]
    measured = records.numbers(run)
    if measured["images_per_second"] and measured["seconds"]:
        rate = f"{number(measured['images_per_second'])} images/s, {duration(measured['seconds'])} of training steps"
        limits = speed.of(run)
        of = f" of {run.name}" if len(group.runs) > 1 else ""
        found.append(f"Speed{of}: {rate}{'; ' if limits else ''}{'; '.join(limits.limits) if limits else ''}.")
    return found


def _done(group: Group) -> str:
    run, config = group.runs[0], group.runs[0].config
    size = config.model.image_size
    pixels = f"{size} px" if isinstance(size, int) else f"{' x '.join(map(str, size))} px"
    start = "from random weights" if run.init_from == RANDOM else f"from {run.init_from}"
    seeds = f", seeds {', '.join(map(str, group.seeds))}" if len(group.runs) > 1 else ""
    text = f"{WORDS.get(run.verb, run.verb)} of {config.model.name} at {pixels} on {config.data.path} {start}{seeds}"
    step = run.last("step")
    if run.total_steps and step is not None:
        epochs = run.last("epoch")
        passes = "" if epochs is None else f" ({epochs:.3g} epochs)"
        text += f": {step:,.0f} of {run.total_steps:,} steps of {config.train.global_batch:,} images{passes}"
    states = dict.fromkeys(member.state for member in group.runs)
    return f"{text[:1].upper()}{text[1:]}; {', '.join(states)}."


def _outcome(group: Group) -> list[str]:
    run, found = group.runs[0], []
    if group.scores:
        chance = f"; chance is {number(100 / run.num_classes)} %" if run.num_classes else ""
        seeds = f" over {len(group.scores)} seeds (mean and standard deviation)" if group.spread is not None else ""
        found.append(f"Top-1 is {accuracy(group)} % on {run.num_test_images:,} test images{seeds}{chance}.")
    if table := probe_table.of(run):
        chosen = next((row.head["name"] for row in table.rows if row.chosen), "?")
        found.append(f"Of {table.num_heads} heads the best on {table.num_held_out:,} held-out images: {chosen}.")
    measured, of = [records.numbers(member) for member in group.runs], f" of {run.name}" * (len(group.runs) > 1)
    for name in ("loss", "test_loss"):
        points, last = records.points(run, name), measured[0][name]
        if len(points) > 1 and last is not None:
            few = layout.recent(len(points)) if name == "loss" else 1
            first = mean(value for _, value in points[:few])
            found.append(f"{COLUMNS[name].capitalize()}{of}: {number(first)} to {number(last)}.")
    online = [
        f"{COLUMNS[name].removesuffix(' %')} {with_spread(values, MD[name])}{' %' * ('top' in name)}"
        for name in ONLINE.values()
        if (values := [value for numbers in measured if (value := numbers[name]) is not None])
    ]
    return [*found, f"Features: {', '.join(online)}."] if online else found


# For machines


def as_json(report: Report) -> str:
    """All numbers of a report. Fields that a run does not have are null."""
    found = {
        "title": report.title, "written": report.written, "runs": [_run(report, run) for run in report.runs],
        "groups": [
            {"name": group.name, "runs": [run.name for run in group.runs], "seeds": group.seeds}
            | ({"top1": group.top1, "standard_error": group.standard_error} if group.scores else {})
            | {"spread": group.spread}
            for group in report.groups
        ],
        "pairs": [
            {"random": pair.random.name, "other": pair.other.name, "gain": pair.gain}
            | {"standard_error": pair.standard_error, "over_seeds": pair.over_seeds}
            for pair in report.pairs
        ],
        "differences": [
            {"verb": verb, "groups": [group.name for group in groups], "settings": dict(rows)}
            for verb, groups, rows in compare.differences(report.groups)
        ],
        "predictions": [
            {"path": str(each.path), "run": each.origin, "step": each.step} | each.result
            | {"classes": [row.__dict__ for row in each.classes], "confusions": each.confused()}
            for each in report.predictions
        ],
        "environments": [
            environment.facts | {"runs": [run.name for run in environment.runs], "starts": environment.starts}
            for environment in provenance.environments(report.runs)
        ],
    }  # fmt: skip
    return json.dumps(found, indent=1, default=str) + "\n"


def _run(report: Report, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"name": run.name, "path": str(run.path), "verb": run.verb, "state": run.state}
    found |= {"model": run.config.model.name, "init_from": run.init_from, "data": run.config.data.path}
    found |= {"seed": run.config.train.seed, "total_steps": run.total_steps} | records.numbers(run)
    measured, table = speed.of(run), probe_table.of(run)
    found["speed"] = measured._asdict() if measured else None
    found["heads"] = table and {
        "chosen": run.heads.get("chosen"), "num_held_out": table.num_held_out, "test_top1": run.top1,
        "interval": run.heads.get("interval"),
        "rows": [row.head | {"low": row.low, "high": row.high} for row in table.rows],
    }  # fmt: skip
    found["unreadable"] = [{"reason": why, "samples": len(names), "first": names[:3]} for why, names in run.unreadable]
    found["incidents"] = [incident._asdict() for incident in run.incidents]
    found["next"] = [step._asdict() for step in report.next(run)]
    return found


# For papers


def as_markdown(report: Report) -> str:
    """Tables of the results, one row a group of seeds, and of the settings in which groups of a verb differ."""
    measured = [[records.numbers(run) for run in group.runs] for group in report.groups]
    shown = [name for name in MD if any(run[name] is not None for runs in measured for run in runs)]
    head = ["run", "verb", "model", "initial weights", "seeds", *(COLUMNS[name] for name in shown)]
    rows = []
    for group, runs in zip(report.groups, measured, strict=True):
        run, cells = group.runs[0], []
        for name in shown:
            values = [value for each in runs if (value := each[name]) is not None]
            values = values[:1] if name == "num_test_images" else values
            cells.append(with_spread(values, MD[name]) if values else DASH)
        rows.append([group.name, run.verb, run.config.model.name, run.init_from, str(len(group.runs)), *cells])
    text = table_of(head, rows, 4)
    if any(len(group.runs) > 1 for group in report.groups):
        text += "\nWith several seeds: mean \N{PLUS-MINUS SIGN} standard deviation.\n"
    for table in filter(None, map(probe_table.of, report.runs)):
        if table.test:
            low, top1, high = table.test
            chosen = plain(str(table.run.heads.get("chosen")))
            text += (
                f"\nChosen head of {plain(table.run.name)}: {chosen}, top-1 {top1:.2f} % (95 % interval {low:.2f} to "
            )
            text += f"{high:.2f}), best of {table.num_heads} on {table.num_held_out:,} held-out images.\n"
    for verb, groups, rows in compare.differences(report.groups):
        lines = [[name, *values] for name, values in rows]
        text += f"\nSettings of {verb} that differ:\n\n"
        text += table_of(["setting", *(group.name for group in groups)], lines, len(groups) + 1)
    return text
