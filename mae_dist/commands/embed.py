"""`mae-dist embed RUN DATA --out FOLDER`: features of every image of a data set, as one array, with its keys.

FOLDER/
  features.npy    float32 (n, d), or (n, patches, d): a row for each sample, NaN where its image is unreadable
  samples.csv     key, tar, label, class, readable: a line for each row of features.npy, in its order
  computed.json   see `feature_pass`
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from mae_dist import dist
from mae_dist.commands import feature_pass
from mae_dist.commands.feature_pass import Pass
from mae_dist.printed import counted
from mae_dist.trained import KINDS, load

log = logging.getLogger(__name__)

FEATURES, SAMPLES = "features.npy", "samples.csv"


def main(argv: list[str]) -> int:
    """Run `mae-dist embed ARGV` and return the exit status."""
    parser = feature_pass.parser("embed", "Features of every image of a data set, as one array with its keys.")
    parser.add_argument("--split", default="train", metavar="NAME", help="split of the folder (train); tars have none")
    parser.add_argument(
        "--features", choices=KINDS, default="pooled", metavar="KIND",
        help=f"one of {', '.join(KINDS)}; pooled: what heads read; patches: of each patch; tokens: cls and patches",
    )  # fmt: skip
    parser.add_argument("--block", type=int, help="block after which they are taken, 1 for the first (the last)")
    options = parser.parse_args(argv)
    return feature_pass.on_ranks(["embed", *argv], options.processes, lambda: embed(options))


def embed(options: argparse.Namespace) -> None:
    """Compute the features on all ranks, and write the tables on rank 0."""
    device = dist.setup(feature_pass.LIMIT)
    trained = load(options.run)
    block, kind = trained.check_features(options.features, options.block), trained.resolved(options.features)
    index, how = feature_pass.open_data(trained, options.data, options.split)
    example = torch.zeros(1, trained.model.channels, *trained.model.image_size)
    shape = tuple(trained.features(example, kind, block).shape[1:])
    facts = {"features": kind, "block": block, "precision": options.precision}
    work = Pass(options.out, trained.to(device), index, how, shape, facts, SAMPLES)
    if work.compute(partial(trained.features, kind=kind, block=block), options.precision, options.workers):
        work.join(FEATURES)
        rows = np.array([readable for _, _, readable in work.samples()])
        feature_pass.write_csv(options.out / SAMPLES, ("key", "tar", "file", "label", "class", "readable"), table(work))
        if not rows.all():
            print(f"{counted(int((~rows).sum()), 'image')} of {len(rows):,} cannot be read: NaN in their rows")
    if dist.is_main():
        work.conclude()
        size = " x ".join(map(str, (len(index), *shape)))
        print(f"{options.out / FEATURES}: {size} numbers, {kind} of block {block}; {SAMPLES} has the key of each row")


def table(work: Pass) -> Iterator[tuple[str, str, str, int | str, str, int]]:
    """The rows of samples.csv: label and class are empty where there is no label, the class where that has no name."""
    names, problem = work.index.dataset.classes or [], work.index.parts.problem
    if problem:
        log.warning("%s; so samples.csv has no labels", problem)
    for sample, label, readable in work.samples():
        known, name = label >= 0 and not problem, names[label] if 0 <= label < len(names) else ""
        yield *work.place(sample), label if known else "", name if known else "", int(readable)
