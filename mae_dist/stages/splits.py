"""The splits that a run is trained and evaluated on: which there are, and whether they go together."""

import dataclasses
import logging

from mae_dist import dist, paths
from mae_dist.data import split_checks
from mae_dist.data.cache import Cache
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.places import evaluation_split, splits
from mae_dist.schema import C, RunConfig

log = logging.getLogger(__name__)


def with_test_split(config: C, earlier: RunConfig | None) -> C:
    """The config with the name of the split to evaluate on: as given, else as in `earlier`, else what there is."""
    data = config.data
    given = earlier.data.test_split if earlier is not None and data.test_split == "auto" else data.test_split
    path = data.test_path or data.path
    split = evaluation_split(path, given)
    if data.test_split == "auto" and split in splits(path) and dist.is_main():
        log.info("evaluation on split %s (data.test_split)", split)
    return dataclasses.replace(config, data=dataclasses.replace(data, test_split=split))


def open_splits(
    config: C, earlier: RunConfig | None, needs_test: bool, cache: Cache
) -> tuple[C, ShardIndex, ShardIndex | None]:  # fmt: skip
    """The config `with_test_split`, and the splits for training and evaluation. One rank of each machine checks the
    files. Raises ValueError on every rank alike, also where another machine has other data.
    """

    def open_here() -> tuple[C, ShardIndex, ShardIndex | None]:
        train = open_train_split(config, cache)
        completed = with_test_split(config, earlier)
        return completed, train, find_test_split(completed, needs_test, train)

    found = dist.run_together(open_here)
    prints = dist.gather_objects([split and split.fingerprint for split in found[1:]])
    if others := [number for number, own in enumerate(prints) if own != prints[0]]:
        raise ValueError(
            f"data.path={config.data.path}: rank {others[0]} finds other data there than rank 0; give a path of the "
            f"same data on all machines"
        )
    return found


def open_train_split(config: RunConfig, cache: Cache | None = None) -> ShardIndex:
    """The training split of data.path. Raises ValueError as `open_split`, and where tars of several splits are in it
    that data.path does not name.
    """
    data, checked = config.data, not dist.is_first_of_machine()
    train = open_split(data.path, data.split, cache, data.merge_labels, data.allow_outside, checked)
    split_checks.refuse_mixed(train, f"data.path={data.path}")
    return train


def find_test_split(config: RunConfig, required: bool, train: ShardIndex) -> ShardIndex | None:
    """The test split, from data.test_path or beside the training split, with classes numbered as in training; None
    where there is none and none is needed.
    """
    data = config.data
    known = splits(data.path) if data.test_path is None else []
    if data.test_path is None and not required and data.test_split not in known:
        if dist.is_main():
            wanted = "val or test" if data.test_split == "test" and "val" not in known else data.test_split
            every = "all of " if len(paths.parts(data.path)) > 1 else ""
            log.info("no test loss: no split %s in %s%s (data.test_path gives one)", wanted, every, data.path)
        return None
    if data.test_path is None and not known:
        raise ValueError(f"data.path={data.path}: tars have no test split; give data.test_path too")
    if data.test_path is None and data.test_split not in known:
        raise ValueError(
            f"data.path={data.path}: has no split {data.test_split!r} to evaluate on, only {', '.join(known)}; give "
            f"data.test_path or data.test_split, or make it with `mae-dist data index TARS --split {data.test_split}`, "
            f"or by packing again with --test-share 0.1"
        )
    test = open_split(
        data.test_path or data.path, data.test_split, train.cache, data.merge_labels, data.allow_outside,
        checked=not dist.is_first_of_machine(),
    )  # fmt: skip
    split_checks.refuse_mixed(test, f"data.test_path={data.test_path}")
    if not required:
        return test
    if (train.dataset.classes is None) != (test.dataset.classes is None) and dist.is_main():
        log.warning("only one of the training and the test split has class names: numbers are taken as they are")
    return split_checks.numbered_like(train, test, data.accept)


def check_splits(config: RunConfig, train: ShardIndex, test: ShardIndex, needs_labels: bool) -> ShardIndex:
    """Refuse a test split that shares tars with the training split, or has classes that it lacks (ValueError), unless
    data.accept has the word for that; the training split, with all classes.
    """
    for word, problem in dist.run_on_rank0(lambda: split_checks.problems(train, test, needs_labels)).items():
        if word not in config.data.accept:
            raise ValueError(f"{problem}; data.accept=[{word}] accepts it")
        if dist.is_main():
            log.warning("%s, accepted", problem)
    return split_checks.with_classes_of(train, test) if needs_labels else train


def refuse_unlabelled(index: ShardIndex | None, name: str, verb: str) -> None:
    """Every sample of the split `name` must have a label, and those of several data sets must go together."""
    assert index is not None
    if index.parts.problem:
        raise ValueError(f"data.path: {index.parts.problem}")
    missing = len(index) - index.num_labelled
    if missing:
        lacking = next(number for number, shard in enumerate(index.shards) if shard.num_labelled < shard.num_samples)
        folder = index.indexes[lacking].parent
        if missing < len(index):
            way = f"`mae-dist data check {folder} --unlabelled --quarantine` leaves them out"
        else:
            way = "name one with labels (data.split, data.test_split, data.test_path); pack again with --test-share 0.1"
        if index.dataset.is_packed:
            other = "pack again with --labels FILE"
        else:
            other = (
                f"index again with --split {name} --labels SOURCE (folder, json:FIELD, an extension, a FILE of rows)"
            )
        raise ValueError(
            f"{folder}: {missing} of {len(index)} samples have no label in split {name}, which {verb} needs; {way}; or "
            f"{other}"
        )
