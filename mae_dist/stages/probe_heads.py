"""`mae-dist probe` with heads.*: many heads on one frozen backbone, of which one is chosen and tested.

Heads are trained on the training split less a held-out part, on which they are then compared, with ridge regression and
nearest neighbours where the settings ask for them. Only the best is evaluated on the test split, and only once.
heads.md and heads.json have a row for every head.
Without random augmentation features are computed once and kept in the run's folder.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mae_dist import config as configuration
from mae_dist import dist, evaluate, heads_settings, parallel, schema
from mae_dist.batch import Batch
from mae_dist.data.features import Features
from mae_dist.data.loader import Source
from mae_dist.objectives.probe_heads import Head, ProbeHeads, held_out
from mae_dist.run import jsonl, tracker
from mae_dist.run.layout import MANIFEST
from mae_dist.stages import warn
from mae_dist.stages.setup import Setup, num_classes, prepare_run
from mae_dist.train import fit

log = logging.getLogger(__name__)

PENALTIES = tuple(10.0**power for power in range(-6, 2))
"""Of ridge regression, each a multiple of the features' mean variance."""


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are computed together: ``score`` maps features (b, width) to scores (b, heads, classes)."""

    heads: list[Head]
    score: Callable[[Tensor], Tensor]


def run(config: schema.ProbeConfig) -> None:
    """Train all heads, choose one, test it; the same call resumes."""
    machine = dataclasses.replace(config.machine, strategy="ddp", shards=None)  # heads are small: nothing to share
    config = dataclasses.replace(config, machine=machine)
    opened = prepare_run("probe", config, needs_labels=True, build=lambda setup: (build(setup), *divide(setup)))
    if opened is None:
        return
    setup, (objective, held, rest) = opened
    with setup.recorded():
        train_and_compare(setup, objective, held, rest)


def train_and_compare(
    setup: Setup[schema.ProbeConfig], objective: ProbeHeads, held: np.ndarray, rest: np.ndarray
) -> None:
    """Train the heads on the samples `rest`, compare them on the `held` out ones, test the best."""
    precision, fixed = setup.config.train.precision, heads_settings.stores_features(setup.config)
    source = stored(setup, objective) if fixed else setup.source(setup.train_split, training=True)
    numbers = train(setup, objective, source, held) if objective.heads else prepare(setup, objective)
    with parallel.autocast(precision, setup.device):
        groups = [HeadGroup(objective.heads, objective.logits)] if objective.heads else []
        groups += closed_forms(setup, objective, setup.evaluation_batches(source, rest))
        counts = count(objective, groups, setup.evaluation_batches(source, held))
        conclude(setup, objective, groups, counts, numbers)


def build(setup: Setup[schema.ProbeConfig]) -> ProbeHeads:
    """The objective that the settings describe."""
    config = setup.config
    return ProbeHeads(
        setup.backbone, num_classes(setup.train_split), config.heads, chunk=setup.micro_batch, seed=config.train.seed
    )


def divide(setup: Setup[schema.ProbeConfig]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training samples that are held out, and of the others (ValueError unless there are both)."""
    share, num_samples = setup.config.heads.held_out, len(setup.train_split)
    chosen = held_out(setup.config.train.seed, share, np.arange(num_samples))
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"heads.held_out={share:g}: {chosen.sum()} of the {num_samples} training samples would be held out"
        )
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def prepare(setup: Setup[schema.ProbeConfig], objective: ProbeHeads) -> dict[str, float]:
    """Launch a run in which no head is trained by steps: load the backbone; no numbers."""
    setup.run.record_launch(0, setup.device)
    setup.load_initial_weights(objective)
    objective.to(setup.device)
    return {}


def train(
    setup: Setup[schema.ProbeConfig], objective: ProbeHeads, source: Source, held: np.ndarray
) -> dict[str, float]:
    """Train the heads; evaluations on the way use the held-out samples."""
    config, num_samples = setup.config, len(setup.train_split)
    total = configuration.total_steps(config.train, num_samples)
    group = HeadGroup(objective.heads, objective.logits)

    def evaluate_step(step: int) -> dict[str, float]:
        if step == total:  # `conclude` compares all heads then
            return {}
        counts = count(objective, [group], setup.evaluation_batches(source, held))
        top1 = 100 * float((counts[:, 0] / counts[:, 2]).max())
        return {"held_out_top1": top1, "diverged": int(objective.dead.sum())}

    task = setup.task(objective, source, 1, evaluate_step)  # one micro-batch: batch norm sees all of it
    return fit(task, setup.run, config, setup.device)


def stored(setup: Setup[schema.ProbeConfig], objective: ProbeHeads) -> Features:
    """The features of the training split, computed and written where they are missing.

    Raises ValueError when the stored ones come from another checkpoint of init_from, or the disk has no room.
    """
    folder = setup.run.path / "features"
    features = Features(folder / setup.train_split.fingerprint, setup.train_split, (objective.width,), setup.device)
    start = "random" if setup.initial_weights is None else (setup.initial_weights.path / MANIFEST).read_text()
    key = hashlib.sha256(start.encode()).hexdigest()

    def check_stored() -> list[int]:
        file, missing = folder / "start.txt", features.missing()
        if file.is_file() and file.read_text().strip() != key:
            raise ValueError(
                f"{folder}: holds features of another checkpoint of init_from={setup.config.init_from}, which "
                f"has gone on since; choose another out="
            )
        folder.mkdir(exist_ok=True)
        features.remove_leftovers()
        jsonl.write_atomic(file, key + "\n")
        needed, free = features.num_bytes * len(missing) // features.num_shards, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"{folder}: features take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room, or leave "
                f"out heads.attentive or some of heads.blocks"
            )
        if missing:
            size = f"{len(setup.train_split):,} samples x {objective.width:,} numbers"
            log.info("features: %s = %.1f MB, to %s", size, features.num_bytes / 1e6, folder)
        return missing

    if dist.run_on_rank0(check_stored):
        setup.load_initial_weights(objective)
        objective.to(setup.device).backbone.eval()
        precision = parallel.autocast(setup.config.train.precision, setup.device)
        with dist.name_lost_ranks(lambda: "the computation of features"), torch.no_grad(), precision:
            images, view = setup.source(setup.train_split), setup.view(training=False)
            features.fill(images, view, lambda batch: objective.rows(batch.images), dist.rank(), dist.world())
            dist.barrier()
    return features


@torch.no_grad()
def closed_forms(setup: Setup[schema.ProbeConfig], objective: ProbeHeads, batches: Iterable[Batch]) -> list[HeadGroup]:
    """Ridge regression and nearest neighbours, where the settings ask for them, on each kind of feature; called by all
    ranks together.
    """
    settings, classes = setup.config.heads, num_classes(setup.train_split)
    if not (settings.ridge or settings.knn):
        return []
    slices = {read: objective.columns[read] for read in objective.reads}
    ridges = {
        read: evaluate.Ridge(columns.stop - columns.start, classes, setup.device) for read, columns in slices.items()
    }
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        readable = ~batch.bad
        rows, known = objective.features(batch)[readable, : objective.num_columns], batch.labels[readable]
        for read, ridge in ridges.items() if settings.ridge else ():
            ridge.add(rows[:, slices[read]], known)
        if settings.knn:
            kept.append(rows)
            labels.append(known)
    groups = []
    for (block, kind), ridge in ridges.items() if settings.ridge else ():
        heads = [Head("ridge", None, penalty, kind, block) for penalty in PENALTIES]
        groups.append(HeadGroup(heads, linear(slices[block, kind], *ridge.solve(PENALTIES))))
    if settings.knn:
        rows, marks = dist.gather(torch.cat(kept)), dist.gather(torch.cat(labels))
        for (block, kind), columns in slices.items():
            bank = nn.functional.normalize(rows[:, columns], dim=1)
            groups.append(HeadGroup([Head("knn", None, None, kind, block)], neighbours(columns, bank, marks, classes)))
    return groups


def linear(columns: slice, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores of several linear maps of the same columns: weight (rows, d, classes), bias (rows, classes)."""
    return lambda rows: evaluate.linear_scores(rows[:, columns], weight, bias)


def neighbours(columns: slice, bank: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Scores by the votes of the nearest neighbours in `bank` (features of length 1)."""
    knn = schema.KnnConfig()
    return lambda rows: evaluate.votes((bank, labels), rows[:, columns], classes, knn.k, knn.temperature)[:, None]


@torch.no_grad()
def count(objective: ProbeHeads, groups: list[HeadGroup], batches: Iterable[Batch]) -> Int[Tensor, "rows 3"]:
    """`evaluate.hits` of every head over all ranks' batches."""
    objective.eval()
    counts = torch.zeros(sum(len(c.heads) for c in groups), 3, dtype=torch.int64, device=objective.dead.device)
    for batch in batches:
        readable = ~batch.bad
        rows, labels = objective.features(batch)[readable], batch.labels[readable]
        with torch.autocast(rows.device.type, enabled=False):
            scores = [score for group in groups for score in group.score(rows).unbind(1)]
        counts += torch.stack([evaluate.hits(score, labels) for score in scores])
    objective.train()
    return dist.all_reduce_sum(counts)


def conclude(
    setup: Setup[schema.ProbeConfig], objective: ProbeHeads, groups: list[HeadGroup], counts: Int[Tensor, "rows 3"],
    numbers: dict[str, float],
) -> None:  # fmt: skip
    """Choose the best head on the held-out samples, test it, write heads.md, heads.json and result.json.

    Raises ValueError when every head diverged.
    """
    assert setup.test_split is not None
    dead = objective.dead.tolist() + [False] * (len(counts) - len(objective.dead))
    heads = [(group, place) for group in groups for place in range(len(group.heads))]
    rows = [
        {"name": group.heads[place].name} | dataclasses.asdict(group.heads[place])
        | {"held_out_top1": 100 * hit / max(1, total), "diverged": gone}
        for (group, place), (hit, _, total), gone in zip(heads, counts.tolist(), dead, strict=True)
    ]  # fmt: skip
    if all(dead):
        raise ValueError("every head diverged; give lower rates in heads.lars, heads.sgd, heads.adamw")
    best = max(range(len(rows)), key=lambda i: (not dead[i], rows[i]["held_out_top1"]))
    group, place = heads[best]
    alone = HeadGroup([group.heads[place]], lambda features: group.score(features)[:, place : place + 1])
    tested = count(objective, [alone], setup.evaluation_batches(setup.source(setup.test_split)))[0]
    result = {"verb": "probe", "chosen": rows[best]["name"], "held_out_top1": rows[best]["held_out_top1"]}
    result |= evaluate.percentages(tested, len(setup.test_split))
    classes = num_classes(setup.test_split)
    setup.warn(warn.of_chance(result["top1"], result["num_test_images"], setup.test_split, classes, "the chosen head"))
    low, high = evaluate.bootstrap(int(tested[0]), int(tested[2]), setup.config.train.seed)
    result["interval"] = [round(low, 4), round(high, 4)]
    result |= {"num_held_out": int(counts[best, 2]), "diverged": sum(dead), "table": "heads.md"}
    if dist.is_main():
        jsonl.write_atomic(setup.run.path / "heads.json", json.dumps(result | {"rows": rows}, indent=1) + "\n")
        jsonl.write_atomic(setup.run.path / "heads.md", markdown(setup.config, result, rows))
    setup.run.finish(numbers | result)
    tracker.mirror_result(setup.run.path, setup.config, "probe", numbers | result)


def markdown(config: schema.ProbeConfig, result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table of all heads as Markdown, the best first."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    low, high = result["interval"]
    lines = [
        f"# Probe heads of {config.model.name} from {config.init_from}",
        "",
        f"Chosen on {result['num_held_out']:,} held-out training images: **{result['chosen']}**. Of the "
        f"{result['num_test_images']:,} test images, evaluated once with this head alone: top-1 {result['top1']:.2f} % "
        f"(95 % interval {low:.2f} to {high:.2f}), top-5 {result['top5']:.2f} %.",
        "",
        "| held-out top-1 % | method | base lr | weight decay | features | block |",
        "|---:|---|---:|---:|---|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["diverged"], -row["held_out_top1"])):
        top1 = "diverged" if row["diverged"] else f"{row['held_out_top1']:.2f}"
        values = (row["method"], cell(row["base_lr"]), cell(row["weight_decay"]), row["features"], str(row["block"]))
        lines.append(f"| {' | '.join((top1, *values))} |")
    lines += ["", "The weight decay of ridge regression is its penalty, as a multiple of the features' mean variance."]
    return "\n".join(lines) + "\n"
