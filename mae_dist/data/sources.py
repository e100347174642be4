"""Sources of pictures for `pack`: the synthetic set, CIFAR-100's archive, class folders, tars. Imports no torch."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_dist import rng
from mae_dist.data import cifar, index, synthetic
from mae_dist.data.pack import Picture, ProgressCallback, Source, no_progress, safe_name
from mae_dist.errors import from_os_error

log = logging.getLogger(__name__)

FOLDER_IMAGES = index.IMAGES
PACK_EPOCH = 2**32 - 1
"""Epoch of the random draws that permute class folders; no run reaches it."""
DRAWN_AT_ONCE = 250
"""Pictures of the synthetic set that are drawn in one call."""


def _png(pixels: np.ndarray, label: int) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Picture("png", stream.getvalue(), label)


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


class _File(NamedTuple):
    """An image file of a class folder; `stamp` changes with its content."""

    class_name: str
    path: Path
    stamp: str


def from_folder(folder: Path, test_share: float = 0.0) -> Source:
    """Images in folder/SPLIT/CLASS/* (ImageNet's layout) or folder/CLASS/*, classes sorted by name.

    Splits `val` and `validation` are stored as `test`. Without splits everything is `train`, or a `test_share` of it
    (0..1) is held out as `test`. The files of a split are permuted in a fixed way, so that shards are not sorted by
    class. Raises ValueError when there are no images.
    """
    if not folder.is_dir():
        raise ValueError(f"--source {folder}: no such folder")
    if not 0 <= test_share < 1:
        raise ValueError(f"--test-share {test_share:g}: must be at least 0 and less than 1, for example 0.1")
    found = _splits(folder, test_share)
    splits = {split: [files[i] for i in _permutation(len(files))] for split, files in found.items()}
    if test_share:
        held_out = round(test_share * len(splits["train"]))
        if not 0 < held_out < len(splits["train"]):
            raise ValueError(f"--test-share {test_share:g}: leaves a split of {len(splits['train'])} images empty")
        splits = {"train": splits["train"][held_out:], "test": splits["train"][:held_out]}
    classes = sorted({file.class_name for files in splits.values() for file in files})
    labels = {name: label for label, name in enumerate(classes)}

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for number in numbers:
            name, path, _ = splits[split][number]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _unreadable(path, error) from error
            extension = path.suffix[1:].lower()
            yield Picture(extension, content, labels[name], name=path.stem, origin=str(path))

    counts = {split: len(files) for split, files in splits.items()}
    return Source(folder.resolve().name, classes, counts, pictures, _fingerprint(folder, splits))


def _fingerprint(folder: Path, splits: dict[str, list[_File]]) -> str:
    rows = [f"{split} {f.path.relative_to(folder)} {f.stamp}" for split, files in splits.items() for f in files]
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


def _splits(folder: Path, test_share: float) -> dict[str, list[_File]]:
    """The files of each split, train before test, sorted by class and name."""
    children = _folders(folder)
    with_splits = any(_folders(child) for child in children)
    if with_splits and test_share:
        raise ValueError(
            f"--test-share {test_share:g}: {folder} has splits of its own ({children[0].name}, ...); leave it out"
        )
    found = {_split_name(child): _files_of_classes(child) for child in children} if with_splits else {
        "train": _files_of_classes(folder)
    }  # fmt: skip
    if with_splits and len(found) < len(children):
        raise ValueError(
            f"--source {folder}: two of its folders would be the split 'test'; keep one of val, validation, test"
        )
    classes = {file.class_name for files in found.values() for file in files}
    for split, files in found.items():
        if not files:
            where = "DIR/CLASS/*" if not with_splits else f"DIR/{split}/CLASS/*"
            raise ValueError(
                f"--source {folder}: no images of split {split!r}; expected {where} with .{', .'.join(FOLDER_IMAGES)}"
            )
        if absent := classes - {file.class_name for file in files}:
            log.warning("%s: split %s has no image of %d classes, %s first", folder, split, len(absent), min(absent))
    return dict(sorted(found.items(), reverse=True))


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _split_name(folder: Path) -> str:
    return "test" if folder.name in ("val", "validation") else safe_name(folder.name)


def _files_of_classes(folder: Path) -> list[_File]:
    """The images folder/CLASS/*, sorted by class and name; links are followed."""
    files: list[_File] = []
    for child in _folders(folder):
        found = sorted(f for f in child.iterdir() if not f.name.startswith(".") and f.is_file())
        images = [f for f in found if f.suffix[1:].lower() in FOLDER_IMAGES]
        if len(images) < len(found):
            log.warning(
                "%s: %d files are no .%s and are left out", child, len(found) - len(images), ", .".join(FOLDER_IMAGES)
            )
        files += [_File(child.name, image, _stamp(image)) for image in images]
    return files


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _permutation(count: int) -> np.ndarray:
    words = rng.bits(0, rng.Purpose.SAMPLES, PACK_EPOCH, np.arange(count), 2)
    return np.lexsort((words[:, 1], words[:, 0]))


# --- tars


def from_tars(path: str, split: str | None = None) -> Source:
    """Indexed tars: all splits of a folder with a dataset.json, or the tars that a glob matches, as one split.

    Keys, labels, splits, class names and the number of classes are kept, and the samples of one tar stay together and
    in their order, so a sample keeps its id if all are readable. A glob's split is `split`, else the one that
    dataset.json lists its tars in, else train. Members other than image and label are left out, with a warning. Raises
    ValueError when there is no tar, or one is not indexed.
    """
    splits = _opened(path, split)
    if unusable := [name for name in splits if name != safe_name(name) or not name]:
        raise ValueError(f"split {unusable[0]!r}: names files; use letters, digits, _ and - only")
    if others := sum((index.other_members(f) for data in splits.values() for f in data.indexes), Counter[str]()):
        listed = ", ".join(f".{extension} ({count})" for extension, count in sorted(others.items()))
        log.warning("%s: members that are no image and no label are left out: %s", path, listed)

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        data = splits[split]
        for number in numbers:
            shard, _ = data.locate(number)
            try:
                sample = data.read(number)
            except OSError as error:
                raise _unreadable(data.tars[shard], error) from error
            origin = data.sample_name(number)
            yield Picture(sample.extension, sample.image, sample.label, key=sample.key, origin=origin, group=shard)

    known = next(iter(splits.values())).dataset
    return Source(
        known.name, known.classes, {name: len(data) for name, data in splits.items()}, pictures,
        fingerprint=" ".join(data.fingerprint for data in splits.values()),
        num_classes=known.num_classes, mean=known.mean, std=known.std,
    )  # fmt: skip


def _opened(path: str, split: str | None) -> dict[str, index.ShardIndex]:
    splits = index.splits(path)
    if not splits:
        data = index.open_split(path, "")
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
