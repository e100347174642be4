"""`mae-dist predict RUN DATA --out FOLDER`: the classes of every image of a data set, by a fine-tuned or probed run.

    FOLDER/
      predictions.csv  key, tar, file, label, and the five likeliest classes with their probabilities, of each sample
      logits.npy       float32 (n, classes), in the order of predictions.csv; NaN where an image is unreadable
      result.json      top-1 and top-5 in percent, counts, the names of the classes in the order of the logits
      classes.csv      of each class that occurs: its images, top-1, top-5, and how many images were taken for it
      confusion.csv    label, predicted, count: each pair of classes that occurs, the most frequent confusion first
      computed.json    see `feature_pass`

Without labels only the first three. Labels are matched with the run's classes by name where both are known.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mae_dist import dist, evaluate
from mae_dist.commands import feature_pass
from mae_dist.commands.feature_pass import Pass
from mae_dist.data import split_checks
from mae_dist.data.index import ShardIndex
from mae_dist.run import jsonl
from mae_dist.trained import Trained, load

log = logging.getLogger(__name__)

TOP = 5
RESULT = "result.json"


def main(argv: list[str]) -> int:
    """Run `mae-dist predict ARGV` and return the exit status."""
    parser = feature_pass.parser("predict", "Classes of every image of a data set, by a fine-tuned or probed run.")
    parser.add_argument("--split", default="auto", metavar="NAME", help="split of the folder (val, else test)")
    parser.add_argument("--ignore-labels", action="store_true", help="predict as if the data set had no labels")
    options = parser.parse_args(argv)
    return feature_pass.on_ranks(["predict", *argv], options.processes, lambda: predict(options))


def predict(options: argparse.Namespace) -> None:
    """Compute the logits on all ranks, and write the tables on rank 0."""
    device = dist.setup(feature_pass.LIMIT)
    trained = load(options.run)
    trained.check_head()
    index, how = feature_pass.open_data(trained, options.data, options.split)
    labelled = not options.ignore_labels and index.num_labelled > 0
    index = numbered(index, trained, options.data) if labelled else index
    facts = {"precision": options.precision, "head": trained.chosen, "labels": labelled}
    work = Pass(options.out, trained.to(device), index, how, (trained.num_classes,), facts, RESULT)
    if work.compute(trained.predict, options.precision, options.workers):
        work.join("logits.npy")
        conclude(work, labelled)
    if dist.is_main():
        work.conclude()
        result = json.loads((options.out / RESULT).read_text())
        numbers = {name: value for name, value in result.items() if name != "classes"}
        listed = "  ".join(f"{n} {v:,}" if isinstance(v, int) else f"{n} {v:.2f}" for n, v in numbers.items())
        print(f"{options.out}: {listed}")


def numbered(index: ShardIndex, trained: Trained, data: str) -> ShardIndex:
    """The split with its labels numbered as the run's classes: by names; where those of one are not known, as they are,
    with a warning. Raises ValueError for classes that the run does not have.
    """
    own, known, way = index.dataset.classes, [*trained.classes], "--ignore-labels predicts without labels"
    if index.parts.problem:
        raise ValueError(f"DATA={data}: {index.parts.problem}; or {way}")
    if own is None or not known:
        if (number := index.dataset.num_classes or 0) > trained.num_classes:
            raise ValueError(f"DATA={data}: has {number} classes, and {trained.name} {trained.num_classes}; {way}")
        if dist.is_main():
            whose = trained.name if not known else data
            log.warning("the names of the classes of %s are not known: labels are compared by their numbers", whose)
        return index
    for whose, names in ((f"DATA={data}", own), (trained.name, known)):
        if own != known and (twice := [name for name, count in Counter(names).items() if count > 1]):
            raise ValueError(f"{whose}: has two classes named {twice[0]}, so names do not tell them apart; {way}")
    present, others = split_checks.present_labels(index), [name for name in own if name not in known]
    unseen = [name for label, name in enumerate(own) if name in others and (present is None or label in present)]
    if unseen:
        listed = ", ".join(unseen[: split_checks.SHOWN]) + (", ..." if len(unseen) > split_checks.SHOWN else "")
        which = f"{len(unseen)} of its classes are none of the {len(known)} of {trained.name} ({listed})"
        raise ValueError(f"DATA={data}: {which}; {way}")
    if own != known and dist.is_main():
        log.info("classes are matched by name: the data set has %d, the run %d", len(own), len(known))
    return index.numbered_as([*known, *others])


@dataclass
class Tally:
    """What is counted over all labelled and readable images."""

    names: Sequence[str]
    labelled: bool
    hits: np.ndarray  # int64 (classes, 3): of each class [top-1, top-5, images]
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    num_readable: int = 0

    def rows(self, work: Pass) -> Iterator[list[object]]:
        """The rows of predictions.csv, while all that they say is counted."""
        samples, sigmoid = work.samples(), getattr(work.trained.config.train, "loss", "softmax") == "sigmoid"
        for number in range(work.features.num_shards):
            logits = torch.from_numpy(np.array(work.features.arrays(number)[0]))
            best = logits.topk(min(TOP, logits.shape[1]), 1).indices
            chances = (logits.sigmoid() if sigmoid else logits.softmax(1)).gather(1, best).tolist()
            for order, probabilities in zip(best.tolist(), chances, strict=True):
                sample, label, readable = next(samples)
                known = self.labelled and label >= 0
                if known and label >= len(self.names):
                    name = work.index.sample_name(sample)
                    raise ValueError(f"{name}: label {label}, of {len(self.names)} classes; see --ignore-labels")
                row: list[object] = [*work.place(sample), self.names[label] if known else ""]
                for place, probability in zip(order, probabilities, strict=True) if readable else ():
                    row += [self.names[place], f"{probability:.6g}"]
                yield row
                self.num_readable += readable
                if known and readable:
                    self.hits[label] += (label == order[0], label in order, 1)
                    self.pairs[label, order[0]] += 1


def conclude(work: Pass, labelled: bool) -> None:
    """Write all tables, and result.json last."""
    known, number = work.trained.classes, work.trained.num_classes
    tally = Tally(known or [*map(str, range(number))], labelled, np.zeros((number, 3), dtype=np.int64))
    top = range(1, 1 + min(TOP, number))
    head = ["key", "tar", "file", "label"]
    head += [f"{what}_{place}" for place in top for what in ("predicted", "probability")]
    feature_pass.write_csv(work.out / "predictions.csv", head, tally.rows(work))
    result: dict[str, Any] = {"num_images": len(work.index)}
    result |= evaluate.unreadable(tally.num_readable, len(work.index))
    if labelled:
        counts = torch.from_numpy(tally.hits.sum(0))
        result = evaluate.percentages(counts, int(counts[2])) | result
        write_classes(work, tally)
    result["classes"] = list(tally.names)
    jsonl.write_atomic(work.out / RESULT, json.dumps(result, indent=1) + "\n")


def write_classes(work: Pass, tally: Tally) -> None:
    """Write classes.csv and confusion.csv."""
    names, taken = tally.names, Counter[int]()
    for (_, predicted), count in tally.pairs.items():
        taken[predicted] += count
    rows = [
        (names[n], images, f"{100 * first / images:.4f}", f"{100 * five / images:.4f}", taken[n])
        for n, (first, five, images) in enumerate(tally.hits.tolist()) if images
    ]  # fmt: skip
    feature_pass.write_csv(work.out / "classes.csv", ("class", "images", "top1", "top5", "predicted"), rows)
    order = sorted(tally.pairs, key=lambda pair: (pair[0] == pair[1], -tally.pairs[pair], pair))
    pairs = [(names[label], names[predicted], tally.pairs[label, predicted]) for label, predicted in order]
    feature_pass.write_csv(work.out / "confusion.csv", ("label", "predicted", "count"), pairs)
