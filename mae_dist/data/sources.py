"""Sources of pictures for `pack`: the synthetic set, CIFAR-100's archive, class folders, tars. Imports no torch."""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dist.data import (
    cifar,
    folder_files,
    folder_layout,
    index,
    indexing,
    places,
    source_files,
    split_checks,
    synthetic,
)
from mae_dist.data.pack import Picture, ProgressCallback, Source, no_progress, permutation, safe_name
from mae_dist.errors import from_os_error
from mae_dist.printed import counted

log = logging.getLogger(__name__)

DRAWN_AT_ONCE = 250
"""Pictures of the synthetic set that are drawn in one call."""


def _png(pixels: np.ndarray, label: int) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Picture("png", stream.getvalue(), label)


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _unreadable(path: Path, error: OSError) -> Exception:
    return from_os_error(error, f"{path}: cannot be read ({error.strerror or error})")


# --- the synthetic set


def from_synthetic(num_train: int, num_test: int, seed: int = 0) -> Source:
    """The procedural set of `data.synthetic`, whose test pictures have parameters that training pictures never have."""
    counts = {"train": num_train, "test": num_test}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"--{split} {count}: must be 1 or more images")

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for pixels, label in zip(*synthetic.draw(seed, split, np.asarray(numbers)), strict=True):
            yield _png(pixels, int(label))

    return Source("synthetic", [*synthetic.CLASSES], counts, pictures, fingerprint=f"seed {seed}", chunk=DRAWN_AT_ONCE)


# --- CIFAR-100's archive


def from_cifar100(archive: Path | None = None, tick: ProgressCallback = no_progress) -> Source:
    """CIFAR-100, or any archive in its layout, in the archive's order and with fine labels only.

    Without `archive` the official file is downloaded. Raises ValueError as `cifar.read` and `cifar.download` do.
    """
    if archive is None:
        archive = cifar.download(lambda done, total: tick("download CIFAR-100", done, total))
    content = cifar.read(archive)

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        images, labels = content.splits[split]
        for number in numbers:
            yield _png(images[number], int(labels[number]))

    counts = {split: len(labels) for split, (_, labels) in content.splits.items()}
    return Source(content.name, content.classes, counts, pictures, fingerprint=_stamp(archive))


# --- class folders


def from_folder(
    folder: Path, test_share: float = 0.0, splits: str | None = None, labels: str | Path | None = None,
    tick: ProgressCallback = no_progress,
) -> Source:  # fmt: skip
    """Images in folder/SPLIT/CLASS/** (ImageNet's layout) or folder/CLASS/**, classes sorted by name, or unlabelled.

    `splits` and `labels` are the options --splits and --labels (`folder_layout.read`). A `test_share` of train (0..1)
    is held out as `test`, or as `val` where there is a test split. The files of a split are permuted in a fixed way, so
    that shards are not sorted by class. Raises ValueError where there are no images, or a layout is not clear.
    """
    if not folder.is_dir():
        what = f"is a file, no folder; {folder_files.UNPACK}" if folder.exists() else "no such folder"
        raise ValueError(f"--source {folder}: {what}")
    _check_share(test_share)
    found = folder_files.find(folder, lambda count: tick("find images", count, 0))
    layout = folder_layout.read(folder, found, splits, labels)
    _log_left_out(folder, found)
    shuffled = {split: [files[i] for i in permutation(len(files))] for split, files in layout.splits.items()}
    if test_share:
        held_out, train = _held_out_split(test_share, shuffled), shuffled["train"]
        chosen = _held_out([label for _, label in train], test_share, [file.inode for file, _ in train])
        shuffled["train"] = [train[i] for i in np.flatnonzero(~chosen)]
        shuffled[held_out] = [train[i] for i in np.flatnonzero(chosen)]

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for number in numbers:
            yield _picture(folder, *shuffled[split][number])

    counts = {split: len(files) for split, files in shuffled.items()}
    rows = [f"{split} {f.path} {f.stamp} {label}" for split, files in shuffled.items() for f, label in files]
    fingerprint = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()
    return Source(folder.resolve().name, layout.classes, counts, pictures, fingerprint, layout.num_classes)


def _picture(folder: Path, file: folder_files.File, label: int) -> Picture:
    """Read an image file."""
    path, kind = folder / file.path, file.kind
    picture = Picture(kind, b"", label, name=path.stem, file=file.path, origin=str(path), problem=file.problem)
    if file.problem:
        return picture
    try:
        content = path.read_bytes()
    except PermissionError:
        return replace(picture, problem="no permission to read it")
    except OSError as error:
        raise _unreadable(path, error) from error
    return replace(picture, content=content, to_png=kind in folder_files.TO_PNG)


def _log_left_out(folder: Path, found: folder_files.Found) -> None:
    """Log which files and folders are not looked at, and which are stored in another format."""
    if found.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.others.most_common(8))
        log.warning("%s: left out what is no image (%s): %s", folder, counted(found.others.total(), "file"), kinds)
    if found.num_hidden:
        log.info("%s: %d hidden or system files and folders are left out", folder, found.num_hidden)
    if found.loops:
        log.warning("%s: links that lead back are not followed: %s", folder, ", ".join(found.loops[:5]))
    if num_png := sum(f.kind in folder_files.TO_PNG and not f.problem for f in found.files):
        kinds = ", .".join(folder_files.TO_PNG)
        log.info(
            "%s: %d files (.%s) become PNG, where bytes may stay and it can hold their pixels", folder, num_png, kinds
        )


# --- the share for testing


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"--test-share {share:g}: must be at least 0 and less than 1, for example 0.1")


def _held_out_split(share: float, splits: Collection[str]) -> str:
    """The name of the split that a share of train becomes: test, or val beside a test split."""
    if "train" not in splits or "val" in splits:
        raise ValueError(f"--test-share {share:g}: SOURCE has the splits {', '.join(splits)}; leave it out")
    return "val" if "test" in splits else "test"


def _held_out(labels: Sequence[int], share: float, files: Sequence[tuple[int, int] | None]) -> np.ndarray:
    """Which of the images with these labels are held out: bool (n,). As far as this is possible, the same share of each
    class; within a class by a fixed permutation. Images that are one of the ``files`` by links (None: not known) stay
    together.
    """
    num = len(labels)
    count = round(share * num)
    if not 0 < count < num:
        raise ValueError(f"--test-share {share:g}: leaves a split of {num} images empty")
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    drawn = np.argsort(permutation(num))
    places = np.empty(num)
    places[np.lexsort((drawn, classes))] = np.arange(num) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(num, dtype=bool)
    chosen[np.lexsort((drawn, (places + 0.5) / sizes[classes]))[:count]] = True
    first: dict[tuple[int, int], int] = {}
    twins = [number if file is None else first.setdefault(file, number) for number, file in enumerate(files)]
    if not 0 < chosen[twins].sum() < num:
        raise ValueError(f"--test-share {share:g}: leaves a split empty, as images are links to one file")
    return chosen[twins]


# --- tars


def from_tars(path: str, split: str | None = None, test_share: float = 0.0) -> Source:
    """Indexed tars: all splits of a folder with a dataset.json, or the tars that a glob matches, as one split.

    Keys, labels, splits, class names and the number of classes are kept, and the samples of one tar stay together and
    in their order, so a sample keeps its id if all are readable. A glob's split is `split`, else the one that
    dataset.json lists its tars in, else train. A `test_share` of train is held out as in `from_folder`. Members other
    than image and label are left out, with a warning. Raises ValueError when there is no tar, or one is not indexed.
    """
    _check_share(test_share)
    splits = _opened(path, split)
    if unusable := [name for name in splits if name != safe_name(name) or not name]:
        raise ValueError(f"split {unusable[0]!r}: names files; use letters, digits, _ and - only")
    if others := sum((indexing.other_members(f) for data in splits.values() for f in data.indexes), Counter[str]()):
        listed = ", ".join(f".{extension} ({count})" for extension, count in sorted(others.items()))
        log.warning("%s: members that are no image and no label are left out: %s", path, listed)

    origins = {name: (data, np.arange(len(data))) for name, data in splits.items()}
    if test_share:
        name, train = _held_out_split(test_share, splits), splits["train"]
        samples = range(len(train))
        chosen = _held_out([*map(train.label, samples)], test_share, [*map(train.place_of_image, samples)])
        origins |= {"train": (train, np.flatnonzero(~chosen)), name: (train, np.flatnonzero(chosen))}

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        data, samples = origins[split]
        for number in samples[numbers.start : numbers.stop].tolist():
            shard, _ = data.locate(number)
            try:
                sample = data.read(number)
            except OSError as error:
                raise _unreadable(data.tars[shard], error) from error
            origin, file = data.sample_name(number), source_files.read(data.tars[shard]).get(sample.key, "")
            yield Picture(
                sample.extension, sample.image, sample.label, key=sample.key, file=file, origin=origin, group=shard
            )

    known = next(iter(splits.values())).dataset
    tars = [tar for data in splits.values() for tar in data.local_tars]
    return Source(
        known.name, known.classes, {name: len(samples) for name, (_, samples) in origins.items()}, pictures,
        fingerprint=" ".join([*(data.fingerprint for data in splits.values()), *map(_stamp, tars), str(test_share)]),
        num_classes=known.num_classes,
        mean=None if test_share else known.mean, std=None if test_share else known.std,
    )  # fmt: skip


def _opened(path: str, split: str | None) -> dict[str, index.ShardIndex]:
    splits = places.splits(path)
    if not splits:
        data = index.open_split(path, "")
        if split is None:
            split_checks.refuse_mixed(data, f"--source {path}")
        return {split or _listed_split(data): data}
    if split is not None:
        raise ValueError(f"--split {split}: {path}/{index.FILE} names the splits; leave --split out")
    return {name: index.open_split(path, name) for name in splits}


def _listed_split(data: index.ShardIndex) -> str:
    """The split in which dataset.json lists all tars of a glob; train if there is none."""
    folder = data.tars[0].parent
    for name, shards in data.dataset.splits.items():
        if {folder / shard.tar for shard in shards}.issuperset(data.tars):
            return name
    return "train"
