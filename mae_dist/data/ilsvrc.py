"""ImageNet's archives (ILSVRC2012) as a source of `pack`: a tar of tars, read at byte offsets, never extracted.

Classes are the synsets sorted by WNID, as in torchvision and timm. Imports no torch.

Source of the data: Russakovsky et al., "ImageNet large scale visual recognition challenge" (2015).
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dist.data import ilsvrc_labels
from mae_dist.data.pack import LOST, Picture, ProgressCallback, Source, no_progress, permutation
from mae_dist.data.workers import ordered_map
from mae_dist.errors import from_os_error

CLASS_TAR = re.compile(r"(n\d{8})\.tar")


class _Part(NamedTuple):
    """The bytes of a file, from `begin` to `end`, that are a tar of images of one synset ('': of any)."""

    file: Path
    begin: int
    end: int
    wnid: str


class _Image(NamedTuple):
    file: Path
    offset: int
    size: int
    name: str
    label: int


def from_imagenet(
    train: Path, val: Path | None, val_labels: Sequence[Path], workers: int = 1, tick: ProgressCallback = no_progress
) -> Source:
    """ILSVRC2012_img_train.tar (or a folder with the 1,000 tars in it) and, if wanted, ILSVRC2012_img_val.tar.

    `val_labels` are the files that `ilsvrc_labels.read` reads. The images of a split are permuted in a fixed way.
    Raises ValueError where an archive has another form or is cut short, or where labels are missing or do not fit.
    """
    if (val is None) != (not val_labels):
        raise ValueError("--val and --val-labels: give both or none, since the archive of images has no labels")
    truth = ilsvrc_labels.read(val_labels) if val_labels else None
    parts = _class_tars(train)
    wnids = sorted(part.wnid for part in parts)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    images: dict[str, list[_Image]] = {"train": []}
    for number, (part, offset, size, name) in enumerate(ordered_map(_members, parts, workers, LOST), 1):
        images["train"].append(_Image(part.file, offset, size, name, labels[part.wnid]))
        tick("list train", number, 0)
    if val is not None and truth is not None:
        members = list(_members(_Part(val, 0, _size(val), "")))
        given = truth.of([name for *_, name in members])
        if strange := sorted(set(given) - set(wnids)):
            raise ValueError(f"--val-labels: {strange[0]} and {len(strange) - 1} other synsets are not in {train}")
        images["val"] = [
            _Image(val, offset, size, name, labels[wnid])
            for (_, offset, size, name), wnid in zip(members, given, strict=True)
        ]
    shuffled = {split: [rows[i] for i in permutation(len(rows))] for split, rows in images.items()}

    def pictures(split: str, numbers: range) -> Iterator[Picture]:
        for image in shuffled[split][numbers.start : numbers.stop]:
            yield _picture(image)

    names = {} if truth is None else truth.names
    classes = [f"{wnid} {names[wnid]}" if wnid in names else wnid for wnid in wnids]
    rows = [f"{image.file.name} {image.offset} {image.size} {image.label}" for s in shuffled.values() for image in s]
    files = {part.file for part in parts} | ({val} if val is not None else set())
    rows += [f"{file} {file.stat().st_mtime_ns}" for file in sorted(files)]
    counts = {split: len(rows) for split, rows in shuffled.items()}
    return Source("imagenet", classes, counts, pictures, hashlib.sha256("\n".join(rows).encode()).hexdigest())


def _picture(image: _Image) -> Picture:
    try:
        with image.file.open("rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), image.size, image.offset)
    except OSError as error:
        raise from_os_error(error, f"{image.file}: cannot be read ({error.strerror})") from error
    stem, extension = os.path.splitext(image.name)
    return Picture(
        extension[1:].lower(), content, image.label, name=stem, origin=f"{image.name} in {image.file}",
        problem="" if len(content) == image.size else "file cut short",
    )  # fmt: skip


def _class_tars(train: Path) -> list[_Part]:
    """The tars of the synsets, in a tar or in a folder."""
    if train.is_dir():
        files = sorted(file for file in train.iterdir() if CLASS_TAR.fullmatch(file.name))
        parts = [_Part(file, 0, _size(file), file.stem) for file in sorted(files)]
    else:
        inner = [(row, CLASS_TAR.fullmatch(row[3])) for row in _members(_Part(train, 0, _size(train), ""))]
        parts = [_Part(train, begin, begin + size, match[1]) for (_, begin, size, _), match in inner if match]
    if not parts:
        raise ValueError(
            f"--train {train}: contains no n01440764.tar, ...; expected ILSVRC2012_img_train.tar, a tar of 1,000 tars, "
            f"or a folder of these (`pack folder` reads class folders, and `data index` tars of images)"
        )
    return parts


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise from_os_error(error, f"{file}: cannot be read ({error.strerror})") from error


def _members(part: _Part) -> Iterator[tuple[_Part, int, int, str]]:
    """The regular files of a tar within a file: part, offset, size, name without folders. Hidden ones are left out."""
    where = f"{part.file}: {part.wnid}.tar in it" if part.begin else f"{part.file}"
    try:
        with part.file.open("rb") as stream:
            stream.seek(part.begin)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.offset >= part.end:
                        return  # a tar without its last blocks, so what comes next is behind it
                    if member.offset_data + member.size > part.end:
                        raise ValueError(f"{where} is cut short in {member.name}; copy or download it again")
                    name = os.path.basename(member.name)
                    if member.isreg() and not name.startswith("."):
                        yield part, member.offset_data, member.size, name
                stream.seek(archive.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
                if any(stream.read(min(tarfile.BLOCKSIZE, part.end - archive.offset))):
                    raise ValueError(
                        f"{where} is no complete tar (no header at byte {archive.offset}); download it again"
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{where} is no complete tar ({error}); copy or download it again") from error
    except OSError as error:
        raise from_os_error(error, f"{where} cannot be read ({error.strerror})") from error
