"""`mae-dist data check`: read a whole data set before a run does, and say what is wrong with it. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from mae_dist import environment, paths
from mae_dist.commands.data_output import progress
from mae_dist.data import quarantine
from mae_dist.data.check import Report, report_of
from mae_dist.data.findings import KINDS, UNREADABLE, Checked, Facts, Finding, facts, findings
from mae_dist.data.pack import LOST
from mae_dist.data.places import Place, of_split, refuse_outside, splits
from mae_dist.data.workers import ordered_map
from mae_dist.errors import DONE, FAILED
from mae_dist.printed import counted, span
from mae_dist.schema import DataConfig

SHOWN = 10
"""Findings of a kind that are printed without --json."""


def add_parser(actions: Any) -> None:
    """Add `check` to the actions of `mae-dist data`."""
    cores = environment.cores()
    parser = actions.add_parser("check", help="find what is wrong with a data set; status 1 where something is")
    parser.add_argument("data", metavar="TARS", help="folder with a dataset.json, or tars, as in data.path")
    parser.add_argument("--test", metavar="TARS", help="tars of the test split, as in data.test_path")
    parser.add_argument(
        "--shuffle-window", type=int, default=DataConfig.shuffle_window, metavar="N",
        help=f"data.shuffle_window of runs (default {DataConfig.shuffle_window})",
    )  # fmt: skip
    parser.add_argument(
        "--quarantine", action="store_true",
        help=f"add samples that cannot be used to {quarantine.FILE} beside their index, so that runs leave them out",
    )  # fmt: skip
    parser.add_argument("--unlabelled", action="store_true", help="samples without a label cannot be used, too")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: one a core, here {cores})")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    places = {
        split: [place for part in of_split(path, split) for place in part]
        for split, path in _splits(arguments.data, arguments.test)
    }
    refuse_outside(arguments.data, (place for listed in places.values() for place in listed), allowed=False)
    tars = {split: [*_checked(listed, arguments.workers, split)] for split, listed in places.items()}
    known = [place.dataset.num_classes for listed in places.values() for place in listed if place.dataset.num_classes]
    found = [*findings(tars, max(known, default=None), arguments.shuffle_window, arguments.unlabelled)]
    if arguments.json:
        print(json.dumps({"splits": {split: _plain(facts(listed)) for split, listed in tars.items()},
                          "findings": [finding._asdict() for finding in found]}, indent=1))  # fmt: skip
    else:
        _print(arguments.data, {split: facts(listed) for split, listed in tars.items()}, found)
    unusable = [finding for finding in found if finding.kind == UNREADABLE]
    if arguments.quarantine:
        _put_in_quarantine([place for listed in places.values() for place in listed], unusable, arguments.json)
        found = [finding for finding in found if finding.kind != UNREADABLE]
    elif unusable and not arguments.json:
        print("next: the same command with --quarantine leaves the samples that cannot be used out of all runs")
    return FAILED if found else DONE


def _splits(data: str, test: str | None) -> Iterator[tuple[str, str]]:
    """(split, path) of all that is to be checked."""
    data = paths.with_variables(data)
    yield from ((split, data) for split in splits(data) or ["train"])
    if test is not None:
        yield "test", paths.with_variables(test)


def _checked(places: list[Place], workers: int, split: str) -> Iterator[Checked]:
    def work(number: int) -> tuple[Report]:
        return (report_of(places[number]),)

    left_out: dict[str, set[str]] = {}
    for folder in {os.path.dirname(place.idx) for place in places}:
        for line in quarantine.read(Path(folder)):
            left_out.setdefault(os.path.join(folder, line.idx), set()).add(line.image)
    reports = ordered_map(work, range(len(places)), workers, LOST)
    with progress() as tick:
        for number, (place, report) in enumerate(zip(places, reports, strict=True), 1):
            yield Checked(Path(place.tar), report, frozenset(left_out.get(place.idx, ())))
            tick(f"check {split}", number, len(places))


def _plain(found: Facts) -> dict[str, Any]:
    tally = found.tally
    more = {name: getattr(tally, name) for name in ("smallest", "largest", "mean", "std", "changes")}
    return {name: value for name, value in asdict(found).items() if name != "tally"} | more


def _print(data: str, splits: dict[str, Facts], found: list[Finding]) -> None:
    print(f"{data}: {len(found)} finding{'s' * (len(found) > 1)}" if found else f"{data}: nothing is wrong with it")
    for split, known in splits.items():
        print(f"  {split}: {', '.join(_described(known))}")
        if not known.classes and any(other.classes for other in splits.values()):
            print(f"  {split}: note: none of its images has a label, as evaluation on it needs")
        for what, (count, example) in known.notes.items():
            print(f"  {split}: note: {what} ({count}; first {_shown(example)})")
        for remark in known.tally.remarks():
            print(f"  {split}: note: {remark}")
    for kind, meaning in KINDS.items():
        some = [finding for finding in found if finding.kind == kind]
        if some:
            print(f"{meaning} ({len(some)}):")
        for finding in islice(some, SHOWN):
            words = filter(None, (finding.tar or finding.split, finding.image, finding.what))
            print(f"  {': '.join(map(_shown, words))}")
        if len(some) > SHOWN:
            print(f"  ... and {len(some) - SHOWN} more (--json prints all)")


def _shown(name: str) -> str:
    """A name as it can be printed: escaped where it has control characters or is no UTF-8."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def _described(known: Facts) -> Iterator[str]:
    yield f"{known.num_images:,} images in {counted(known.num_tars, 'tar')}"
    if known.num_quarantined:
        yield f"{known.num_quarantined} more in quarantine"
    sizes = known.classes.values()
    yield f"{counted(len(sizes), 'class')} of {span(min(sizes), max(sizes))} images" if sizes else "no labels"
    tally = known.tally
    if tally.mean is not None and tally.std is not None:
        (top, left), (bottom, right) = tally.smallest, tally.largest
        yield f"width {span(left, right)}, height {span(top, bottom)}"
        yield "mean " + " ".join(f"{value:.4f}" for value in tally.mean)
        yield "std " + " ".join(f"{value:.4f}" for value in tally.std)


def _put_in_quarantine(places: list[Place], unusable: list[Finding], quiet: bool) -> None:
    indexes = {str(Path(place.tar)): Path(place.idx) for place in places}
    lines: dict[Path, list[quarantine.Line]] = {}
    for finding in unusable:
        idx = indexes[finding.tar]
        lines.setdefault(idx.parent, []).append(quarantine.Line(idx.name, finding.image, finding.what))
    for folder, some in lines.items():
        try:
            file = quarantine.add(folder, some)
        except PermissionError as error:
            raise ValueError(
                f"{folder}: cannot be written; make an index of your own with `mae-dist data index TARS --out FOLDER`, "
                f"and check that"
            ) from error
        if not quiet:
            print(f"wrote {file}: runs leave out {counted(len(some), 'sample')} more")
