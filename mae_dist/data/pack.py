"""Pack CIFAR-100, class folders or the synthetic set into webdataset tars with indexes and a dataset.json.

Equal input gives equal bytes, and the folder is written atomically. cifar100 and synthetic are written in their own
order; class folders are permuted in a fixed way, so that shards are not sorted by class.

Knows no model and no view; progress is reported to a `ProgressCallback`. Imports no torch; webdataset, which does, is
imported when the first shard is written.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dist import rng
from mae_dist.atomic import replacing
from mae_dist.data import cifar, index, synthetic

log = logging.getLogger(__name__)

FOLDER_IMAGES = ("jpg", "jpeg", "png", "webp")
MEASURED = 10_000
"""Images of a class folder from which mean and std are computed (evenly spaced; all if there are fewer)."""
MAX_BAD = 0.01
"""Largest share of unreadable images in a split of a packed folder."""
PACK_EPOCH = 2**32 - 1
"""Epoch of the random draws that permute class folders; no run reaches it."""

ProgressCallback = Callable[[str, int, int], None]
"""Called as (what is being done, number done, total number)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A ProgressCallback that does nothing."""


@dataclass(frozen=True)
class Picture:
    """One image to be packed.

    ``content`` is the encoded file and ``extension`` its format (lower case, no dot); ``size`` is (height, width);
    ``pixels`` is uint8 (height, width, 3) if the image counts for mean and std; ``name`` is its file's name, or empty.
    """

    extension: str
    content: bytes
    label: int
    size: tuple[int, int]
    pixels: np.ndarray | None = None
    name: str = ""


@dataclass(frozen=True)
class Source:
    """What to pack: name, class names, number of pictures per split, and a function that yields those of a split."""

    name: str
    classes: list[str]
    counts: dict[str, int]
    pictures: Callable[[str], Iterator[Picture]]


def pack(source: Source, out: Path, shard_size: int = 5000, tick: ProgressCallback = no_progress) -> index.Dataset:
    """Write `source` as a data set into the new folder `out`: {split}-000000.tar and .idx, ..., and dataset.json.

    Members are named {split}_{number}[-{name}].{extension} and .cls, at most `shard_size` samples a tar (fewer when a
    tar reaches 3 GB). Raises ValueError when `out` has files in it or cannot be written, and what `source` raises. A
    process that is killed may leave a hidden folder .NAME.PID beside `out`, never a part of `out`.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; choose another or remove it")
    if shard_size < 1:
        raise ValueError(f"--shard-size {shard_size}: must be 1 or more samples")
    try:
        with replacing(out) as work:
            work.mkdir(parents=True)
            return _write(source, work, shard_size, tick)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror or error})") from error


def _write(source: Source, folder: Path, shard_size: int, tick: ProgressCallback) -> index.Dataset:
    from webdataset.writer import ShardWriter

    splits: dict[str, list[index.Shard]] = {}
    sizes: set[tuple[int, int]] = set()
    moments: dict[str, _Moments] = {}
    for split, total in source.counts.items():
        tars: list[str] = []
        moments[split] = _Moments()
        writer = ShardWriter(
            f"{folder}/{split}-".replace("%", "%%") + "%06d.tar",
            maxcount=shard_size, post=tars.append, verbose=0,
            encoder=False, compress=False, mtime=0, user="root", group="root",
        )  # fmt: skip
        try:
            for number, picture in enumerate(source.pictures(split)):
                key = f"{split}_{number:06d}" + (f"-{_safe(picture.name)}" if picture.name else "")
                label = str(picture.label).encode()
                writer.write({"__key__": key, picture.extension: picture.content, index.LABEL: label})
                sizes.add(picture.size)
                if picture.pixels is not None:
                    moments[split].add(picture.pixels)
                tick(f"pack {split}", number + 1, total)
        finally:
            writer.close()
        splits[split] = []
        for number, tar in enumerate(map(Path, tars)):
            splits[split].append(index.build(tar, tar.with_suffix(".idx"))[0])
            tick(f"index {split}", number + 1, len(tars))
    measured = moments.get("train")
    dataset = index.Dataset(
        name=source.name,
        splits=splits,
        num_classes=len(source.classes),
        classes=source.classes,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mean=measured.mean() if measured else None,
        std=measured.std() if measured else None,
    )
    dataset.save(folder)
    return dataset


class _Moments:
    """Mean and standard deviation of each channel over all pixels, exact because the sums are of integers."""

    def __init__(self) -> None:
        self.num_pixels, self.sums, self.squares = 0, [0, 0, 0], [0, 0, 0]

    def add(self, pixels: np.ndarray) -> None:
        values = pixels.reshape(-1, 3).astype(np.int64)
        self.num_pixels += len(values)
        self.sums = [total + int(v) for total, v in zip(self.sums, values.sum(0), strict=True)]
        self.squares = [total + int(v) for total, v in zip(self.squares, (values**2).sum(0), strict=True)]

    def mean(self) -> tuple[float, float, float]:
        red, green, blue = (total / self.num_pixels / 255 for total in self.sums)
        return red, green, blue

    def std(self) -> tuple[float, float, float]:
        n = self.num_pixels
        red, green, blue = (
            (n * square - total**2) ** 0.5 / n / 255 for total, square in zip(self.sums, self.squares, strict=True)
        )
        return red, green, blue


def _safe(name: str) -> str:
    """Make `name` usable in a key: ASCII letters, digits, _ and - only, at most 60 characters for the tar header."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _from_array(pixels: np.ndarray, label: int) -> Picture:
    height, width, _ = pixels.shape
    return Picture("png", _png(pixels), label, (height, width), pixels)


# --- the synthetic set


def from_synthetic(num_train: int, num_test: int, seed: int = 0) -> Source:
    """The procedural set of `data.synthetic`, whose test pictures have parameters that training pictures never have."""
    counts = {"train": num_train, "test": num_test}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"--{split} {count}: must be 1 or more images")

    def pictures(split: str) -> Iterator[Picture]:
        for first in range(0, counts[split], 250):
            ids = np.arange(first, min(first + 250, counts[split]))
            images, labels = synthetic.draw(seed, split, ids)
            for pixels, label in zip(images, labels, strict=True):
                yield _from_array(pixels, int(label))

    return Source("synthetic", list(synthetic.CLASSES), counts, pictures)


# --- CIFAR-100's archive


def from_cifar100(archive: Path | None = None, tick: ProgressCallback = no_progress) -> Source:
    """CIFAR-100, or any archive in its layout, in the archive's order and with fine labels only.

    Without `archive` the official file is downloaded. Raises ValueError as `cifar.read` and `cifar.download` do.
    """
    if archive is None:
        archive = cifar.download(lambda done, total: tick("download CIFAR-100", done, total))
    content = cifar.read(archive)

    def pictures(split: str) -> Iterator[Picture]:
        for pixels, label in zip(*content.splits[split], strict=True):
            yield _from_array(pixels, int(label))

    counts = {split: len(labels) for split, (_, labels) in content.splits.items()}
    return Source(content.name, content.classes, counts, pictures)


# --- class folders


def from_folder(folder: Path, test_share: float = 0.0) -> Source:
    """Images in folder/SPLIT/CLASS/* (ImageNet's layout) or folder/CLASS/*, bytes unchanged, classes sorted by name.

    Splits `val` and `validation` are stored as `test`. Without splits everything is `train`, or a `test_share` of it
    (0..1) is held out as `test`. Every image is decoded once; unreadable ones are logged and left out, up to MAX_BAD of
    a split. Mean and std are over all pixels of at most MEASURED evenly spaced training images. Raises ValueError when
    there are no images, or too many unreadable ones.
    """
    if not folder.is_dir():
        raise ValueError(f"--source {folder}: no such folder")
    if not 0 <= test_share < 1:
        raise ValueError(f"--test-share {test_share:g}: must be at least 0 and less than 1, for example 0.1")
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
    classes = sorted({name for files in found.values() for name, _ in files})
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[tuple[int, Path]]] = {}
    for split, files in sorted(found.items(), reverse=True):  # train before test
        if not files:
            where = "DIR/CLASS/*" if not with_splits else f"DIR/{split}/CLASS/*"
            raise ValueError(
                f"--source {folder}: no images of split {split!r}; expected {where} with .{', .'.join(FOLDER_IMAGES)}"
            )
        absent = set(classes) - {name for name, _ in files}
        if absent:
            log.warning("%s: split %s has no image of %d classes, %s first", folder, split, len(absent), min(absent))
        splits[split] = [(labels[files[i][0]], files[i][1]) for i in _permutation(len(files))]
    if test_share:
        held_out = round(test_share * len(splits["train"]))
        if not 0 < held_out < len(splits["train"]):
            raise ValueError(f"--test-share {test_share:g}: leaves a split of {len(splits['train'])} images empty")
        splits = {"train": splits["train"][held_out:], "test": splits["train"][:held_out]}

    def pictures(split: str) -> Iterator[Picture]:
        return _decodable(split, splits[split])

    name = folder.resolve().name
    return Source(name, classes, {split: len(files) for split, files in splits.items()}, pictures)


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _split_name(folder: Path) -> str:
    return "test" if folder.name in ("val", "validation") else _safe(folder.name)


def _files_of_classes(folder: Path) -> list[tuple[str, Path]]:
    """(class, file) of folder/CLASS/*, sorted by both names; links are followed."""
    files: list[tuple[str, Path]] = []
    for child in _folders(folder):
        found = sorted(f for f in child.iterdir() if not f.name.startswith(".") and f.is_file())
        images = [f for f in found if f.suffix[1:].lower() in FOLDER_IMAGES]
        if len(images) < len(found):
            log.warning(
                "%s: %d files are no .%s and are left out", child, len(found) - len(images), ", .".join(FOLDER_IMAGES)
            )
        files += [(child.name, image) for image in images]
    return files


def _permutation(count: int) -> np.ndarray:
    words = rng.bits(0, rng.Purpose.SAMPLES, PACK_EPOCH, np.arange(count), 2)
    return np.lexsort((words[:, 1], words[:, 0]))


def _decodable(split: str, files: list[tuple[int, Path]]) -> Iterator[Picture]:
    stride = max(1, -(-len(files) // MEASURED))
    bad = 0
    for number, (label, file) in enumerate(files):
        try:
            content = file.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                size = (image.height, image.width)
                measured = split == "train" and number % stride == 0
                if not measured:
                    image.draft("RGB", (1, 1))  # a JPEG is still read to its end, but at an eighth of the size
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            bad += 1
            log.warning("%s: unreadable, left out (%s)", file, error)
            if bad > MAX_BAD * len(files):
                raise ValueError(
                    f"{file}: unreadable, as are {bad - 1} others of the {len(files)} images of split {split!r}; "
                    f"more than {MAX_BAD:.0%} is too many: repair or remove them (they are logged)"
                ) from error
            continue
        extension = file.suffix[1:].lower()
        yield Picture(extension, content, label, size, pixels if measured else None, file.stem)
    if bad:
        log.warning("split %s: %d of %d images unreadable and left out", split, bad, len(files))
