"""Whether a test split measures what a training split teaches: no class that training lacks, no tar of training.

Images that are in both splits are found by `mae-dist data check`, which reads them. Imports no torch.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from mae_dist.data.dataset import Dataset
from mae_dist.data.index import ShardIndex
from mae_dist.printed import counted

UNSEEN, OVERLAP = "unseen_classes", "overlap"
"""Words of data.accept."""
MOST_READ = 50_000
"""Samples whose labels are read where dataset.json does not count them."""
SHOWN = 5
"""Classes and tars that a message lists."""


def refuse_mixed(index: ShardIndex, setting: str) -> None:
    """Raise ValueError where a pattern has caught tars of several splits, which are named nowhere in it."""
    if mixed := index.parts.mixed:
        folder, name = os.path.split(index.tars.texts[0])
        raise ValueError(
            f"{setting}: the tars in it are of several splits by name or dataset.json ({', '.join(mixed)}; {name} "
            f"first); name those of one, or, to use all as one split, each by a word, like "
            f"'{folder}/*{{{','.join(mixed)}}}*.tar'"
        )


def problems(train: ShardIndex, test: ShardIndex, needs_labels: bool) -> dict[str, str]:
    """Word of data.accept -> a sentence on what is wrong. Reads labels where nothing else counts them."""
    found = {}
    if tars := shared_tars(train, test):
        listed = f"{', '.join(tars[:SHOWN])}{', ...' if len(tars) > SHOWN else ''}"
        found[OVERLAP] = f"{counted(len(tars), 'tar')} in both the test split and the training split ({listed})"
    if needs_labels and (unseen := sorted(unseen_classes(train, test))):
        names = test.dataset.classes or []
        listed = ", ".join(f"{n} {names[n]}" if n < len(names) else str(n) for n in unseen[:SHOWN])
        more = ", ..." if len(unseen) > SHOWN else ""
        found[UNSEEN] = f"the test split has {len(unseen)} classes that the training split lacks ({listed}{more})"
    return found


def shared_tars(train: ShardIndex, test: ShardIndex) -> list[str]:
    """Names of the tars of `test` that have the sha256, or, where that is not known, the path, of one of `train`."""
    known = {shard.sha256 for shard in train.shards} - {""} | {*train.tars.texts}
    return [
        os.path.basename(tar) for tar, s in zip(test.tars.texts, test.shards, strict=True) if known & {s.sha256, tar}
    ]


def unseen_classes(train: ShardIndex, test: ShardIndex) -> set[int]:
    """Classes of `test` that `train` lacks, as far as it is known which occur, else by their number."""
    taught, asked = present_labels(train), present_labels(test)
    if taught is None or asked is None:
        taught = taught if asked is not None and taught is not None else set(range(train.dataset.num_classes or 0))
        asked = asked if asked is not None else set(range(test.dataset.num_classes or 0))
    return asked - taught


def label_counts(index: ShardIndex) -> dict[int, int] | None:
    """The labels that occur in a split, and how often, as dataset.json counts them; None where it does not."""
    counts = index.dataset.label_counts
    name = next((name for name, shards in index.dataset.splits.items() if shards == index.shards), None)
    if name not in counts:
        return None
    table = index.parts.labels[0] if index.parts.labels else None
    return {int(n if table is None else table[n]): count for n, count in enumerate(counts[name]) if count}


def labels_of(dataset: Dataset, splits: Iterable[str]) -> set[int]:
    """The labels that occur in these splits; all that there are where dataset.json does not count those of one."""
    labelled = [split for split in splits if any(shard.num_labelled for shard in dataset.splits[split])]
    if any(split not in dataset.label_counts for split in labelled):
        return {*range(dataset.num_classes or 0)}
    return {number for split in labelled for number, count in enumerate(dataset.label_counts[split]) if count}


def present_labels(index: ShardIndex) -> set[int] | None:
    """The labels that occur in a split; None where that is not known and too many samples, or remote ones, had to be
    read.
    """
    if (counts := label_counts(index)) is not None:
        return {*counts}
    if len(index) > MOST_READ or any(index.remotes):
        return None
    found = set()
    for sample in range(len(index)):
        with suppress(ValueError):  # an unreadable sample is the loader's business
            found.add(index.label(sample))
    return found - {-1}


def numbered_like(train: ShardIndex, test: ShardIndex, accept: tuple[str, ...]) -> ShardIndex:
    """The test split with its classes numbered as in training, by name; as it is where one of them has no names."""
    names, own = train.dataset.classes, test.dataset.classes
    if names is None or own is None:
        return test
    unseen = [name for name in own if name not in names] if UNSEEN in accept else []
    return test.numbered_as([*names, *unseen])


def with_classes_of(train: ShardIndex, test: ShardIndex) -> ShardIndex:
    """`train` with as many classes as the test split has, so that a head has outputs for all of them."""
    numbers = [index.dataset.num_classes or 0 for index in (train, test)]
    if numbers[1] <= numbers[0]:
        return train
    return train.described_by(replace(train.dataset, num_classes=numbers[1], classes=test.dataset.classes))
