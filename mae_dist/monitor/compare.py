"""Runs beside each other: seeds of one experiment as a group, pretrained beside random, and settings that differ."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import NamedTuple

from mae_dist import config as configuration
from mae_dist import hints, starts
from mae_dist.monitor.records import Run
from mae_dist.schema import RANDOM

SEED = "train.seed"
END_OF_NAME = re.compile(r"[-_.]*(seed|s)?[-_.]*\d*$")
"""What seeds differ in at the end of their names."""


class Group(NamedTuple):
    """Runs of one experiment: those that differ in their seed alone, and in that of the run they start from."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The name of the only run, or the common part of the names and the number of seeds."""
        names = [run.name for run in self.runs]
        if len(names) == 1:
            return names[0]
        first, last = min(names), max(names)
        shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = END_OF_NAME.sub("", first[:shared]) or names[0]
        return f"{common} ({len(names)} seeds)"

    @property
    def style(self) -> int:
        return self.runs[0].style

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config.train.seed for run in self.runs)

    @property
    def scores(self) -> list[float]:
        """Test accuracies of the finished runs, in percent."""
        return [run.top1 for run in self.runs if run.top1 is not None]

    @property
    def top1(self) -> float:
        """The mean test accuracy, of a group with scores."""
        return mean(self.scores)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the test accuracy over seeds, None with one."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def standard_error(self) -> float:
        """Of the mean accuracy: from the spread over seeds, else from the choice of the test images."""
        if self.spread is not None:
            return self.spread / math.sqrt(len(self.scores))
        images = next(run.num_test_images for run in self.runs if run.top1 is not None)
        return math.sqrt(max(0.0, self.top1 * (100 - self.top1)) / images)


class Pair(NamedTuple):
    """Two groups with test accuracies whose settings differ only in the initial weights."""

    random: Group
    other: Group

    @property
    def gain(self) -> float:
        """Points of top-1 by which the pretrained runs are better."""
        return self.other.top1 - self.random.top1

    @property
    def over_seeds(self) -> bool:
        """Whether both have several seeds, so that the standard error of the gain is that over seeds."""
        return self.random.spread is not None and self.other.spread is not None

    @property
    def standard_error(self) -> float:
        """Of the gain, in points, as if the two had been tested on independent samples of images. On the same images,
        where two runs often err together, it is smaller.
        """
        return math.hypot(self.random.standard_error, self.other.standard_error)

    @property
    def num_test_images(self) -> str:
        """One number as text, or two where the runs were tested on different splits."""
        counts = (run.num_test_images for group in self for run in group.runs if run.top1 is not None)
        return " and ".join(dict.fromkeys(f"{count:,}" for count in counts))


def grouped(runs: Sequence[Run]) -> tuple[list[Run], list[Group]]:
    """The runs, those of a group with one style, and their groups in the order of their first runs. A group has each
    seed once: runs that are equal are repetitions, and tell nothing about seeds.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        experiment, times = _experiment(run, runs), 0
        while any(other.config.train.seed == run.config.train.seed for other in found.get((experiment, times), ())):
            times += 1
        found.setdefault((experiment, times), []).append(run)
    styles = {run.name: style for style, members in enumerate(found.values()) for run in members}
    styled = {run.name: replace(run, style=styles[run.name]) for run in runs}
    return [*styled.values()], [Group(tuple(styled[run.name] for run in members)) for members in found.values()]


def pairs(groups: Sequence[Group]) -> list[Pair]:
    """Each group with scores that was initialised from another run, beside the first with the same verb, data and
    deciding settings that was initialised at random: all seeds where both have several, else those that both have.
    """
    scored = [group for group in groups if group.scores]
    randoms: dict[str, Group] = {}
    for group in scored:
        if group.runs[0].init_from == RANDOM:
            randoms.setdefault(_settings(group.runs[0]), group)
    found = []
    for group in scored:
        random = randoms.get(_settings(group.runs[0]))
        if random is None or group.runs[0].init_from == RANDOM:
            continue
        pair = Pair(random, group)
        if not pair.over_seeds:
            shared = {*random.seeds} & {*group.seeds}
            pair = Pair(*(Group(tuple(run for run in each.runs if run.config.train.seed in shared)) for each in pair))
        if pair.random.scores and pair.other.scores:
            found.append(pair)
    return found


def differences(groups: Sequence[Group]) -> list[tuple[str, list[Group], list[tuple[str, list[str]]]]]:
    """(verb, its groups, rows) of each verb with several groups; a row is a setting and its value in each group, of the
    settings that decide the result and are not equal in all.
    """
    found = []
    for verb in dict.fromkeys(group.runs[0].verb for group in groups):
        chosen = [group for group in groups if group.runs[0].verb == verb]
        columns = [
            configuration.result_settings(g.runs[0].config) | {"data": g.runs[0].data_fingerprint} for g in chosen
        ]
        for column, group in zip(columns, chosen, strict=True):
            column[SEED] = group.seeds[0] if len(group.seeds) == 1 else group.seeds
        rows = [(name, [hints.shown(column.get(name)) for column in columns]) for name in columns[0]]
        differing = [(name, values) for name, values in rows if len({*values}) > 1]
        if differing:
            found.append((verb, chosen, differing))
    return found


def _settings(run: Run) -> str:
    """Verb, data and deciding settings of a run but for its seed and its initial weights, as a key."""
    settings = configuration.result_settings(run.config) | {"init_from": None, SEED: None}
    return json.dumps([run.verb, run.data_fingerprint, settings], sort_keys=True, default=str)


def _experiment(run: Run, runs: Sequence[Run], seen: tuple[str, ...] = ()) -> str:
    """What runs of one group have in common: `_settings`, and the experiment of the run that each starts from."""
    folder, step = starts.run_and_step(run.init_from)
    origin = next((other for other in runs if other.path.resolve() == folder.resolve()), None)
    known = run.init_from != RANDOM and origin is not None and origin.name not in seen
    start = _experiment(origin, runs, (*seen, run.name)) if known and origin else run.init_from
    return json.dumps([_settings(run), start, step])
