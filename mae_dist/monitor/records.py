"""What a run's folder says about the run, read once for a report: its settings, metrics, events, result and heads.

What others may have written there is checked: a number that is none, or an event without its fields, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeGuard

from mae_dist import heads_settings, small_files
from mae_dist.monitor import incidents
from mae_dist.run import events, jsonl, layout, unreadable
from mae_dist.schema import RANDOM, ProbeConfig, RunConfig

MOST_STEPS = 50_000
"""Steps of a metrics.jsonl that are shown, at least, where it has as many."""
HEADS = "heads.json"
LARGEST = 1e100
Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Run:
    """What one run's folder holds. `style` is the run's colour in the report; `result` is {} until it is finished;
    `every` is how many recorded steps each of those in `metrics` stands for; `heads` is {} but for a probe with many;
    `num_unreadable` counts damaged lines, `unreadable` has samples (see `run.unreadable`).
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
    heads: dict[str, Any]
    num_classes: int
    unreadable: list[tuple[str, list[str]]]

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
        return top1 if finite(top1) and self.num_test_images else None

    @property
    def num_test_images(self) -> int:
        """Test images that a finished run was measured on."""
        number = self.result.get("num_test_images")
        return int(number) if finite(number) and number > 0 else 0

    @property
    def num_heads(self) -> int:
        """Heads that a probe trains by steps, all at the same time; 0 for every other run."""
        return heads_settings.num_trained(self.config.heads) if isinstance(self.config, ProbeConfig) else 0

    @property
    def intervals(self) -> list[dict[str, Any]]:
        """The records of what limited the run, see `run.interval`."""
        return [line for line in self.metrics if line.get("kind") == jsonl.INTERVAL]

    @property
    def warnings(self) -> list[incidents.Incident]:
        """What the run warned of."""
        return [incident for incident in self.incidents if incident.is_warning]

    @property
    def state(self) -> str:
        """`finished`, or how far the run has come."""
        step = self.last("step")
        if self.result or step is None:
            return "finished" if self.result else "incomplete, no step yet"
        return f"incomplete at step {step:,} of {self.total_steps:,}"

    def last(self, key: str) -> float | None:
        """The latest value of a metric, None where there is none."""
        return next((line[key] for line in reversed(self.metrics) if finite(line.get(key))), None)


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
    text, (verb, data_fingerprint, config) = small_files.read_text(file, small_files.MOST_YAML), layout.settings(path)
    metrics, *damaged, every = jsonl.read_thinned(path / layout.METRICS, MOST_STEPS)
    recorded, also_damaged = jsonl.read_counting(path / events.FILE, events.MOST)
    recorded = events.sound(recorded, events.FIELDS)
    run = Run(
        path=path, name=name, style=style, verb=verb, data_fingerprint=data_fingerprint, config=config,
        config_text=text, total_steps=layout.read_config(path)["total_steps"], result=_result(path),
        num_unreadable=sum(damaged, also_damaged), every=every, heads=_heads(path), num_classes=_num_classes(path),
        unreadable=unreadable.by_reason(path),
        metrics=[line for line in metrics if finite(line.get("step"))],
        starts=[event for event in recorded if event["event"] == "start"], incidents=incidents.of(recorded, path),
    )  # fmt: skip
    for record in [*run.metrics, run.result] if run.num_heads else ():  # losses of heads are added in training
        if finite(record.get("loss")):
            record["loss"] /= run.num_heads
    return run


def _result(path: Path) -> dict[str, Any]:
    try:
        return layout.result(path) or {}
    except ValueError as error:
        raise ValueError(f"{path / layout.RESULT}: is damaged ({error}); restore it or leave the run out") from error


def _heads(path: Path) -> dict[str, Any]:
    """heads.json with the rows that are whole, the best head first."""
    file = path / HEADS
    if not file.is_file():
        return {}
    found = small_files.read_json(file)
    rows = found.get("rows")
    whole = [row for row in rows if _is_head(row)] if isinstance(rows, list) else []
    return found | {"rows": sorted(whole, key=lambda row: (row["diverged"], -row["held_out_top1"]))} if whole else {}


def _is_head(row: Any) -> bool:
    numbers = ("base_lr", "weight_decay")
    return (
        isinstance(row, Mapping) and all(isinstance(row.get(name), str) for name in ("name", "method", "features"))
        and finite(row.get("held_out_top1")) and 0 <= row["held_out_top1"] <= 100
        and isinstance(row.get("diverged"), bool) and type(row.get("block")) is int
        and all(row.get(name) is None or finite(row[name]) for name in numbers)
    )  # fmt: skip


def _num_classes(path: Path) -> int:
    """How many classes the run is trained on, 0 where that is not known."""
    file = path / layout.CLASSES
    names = small_files.read_json(file).get("classes") if file.is_file() else None
    return len(names) if isinstance(names, list) else 0


# Numbers


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, of which sums are finite, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def points(run: Run, key: str) -> list[Point]:
    """(step, value) of one metric by step, finite values only; of a step that a resumed run repeated, the later."""
    values = {line["step"]: line[key] for line in run.metrics if finite(line.get(key))}
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


def numbers(run: Run) -> dict[str, float | None]:
    """The main numbers of a run, None where it has none; the loss is the mean of the last steps (`layout.recent`)."""
    result, speed = run.result, [value for _, value in points(run, "images_per_second")]
    every = points(run, "loss")
    losses = [value for _, value in every[-max(1, layout.recent(len(every) * run.every) // run.every) :]]
    found = {
        "epochs": run.last("epoch"),
        "steps": result.get("steps", run.last("step")),
        "top1": result.get("top1", run.last("test_top1")),
        "top5": result.get("top5", run.last("test_top5")),
        **{name: result.get(name, run.last(name)) for name in ("knn_top1", "ridge_top1", "rankme")},
        "loss": result.get("loss", mean(losses) if losses else None),
        "test_loss": result.get("test_loss", run.last("test_loss")),
        "num_test_images": result.get("num_test_images"),
        "bad": sum(value for _, value in points(run, "bad")) or None,
        "images_per_second": median(speed) if speed else None,
        "seconds": training_seconds(run) or None,
    }
    return {name: value if finite(value) else None for name, value in found.items()}
