"""Index a tar: find its samples and their labels, and write its index beside it. Imports no torch."""

import os
import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mae_dist.checksum import sha256
from mae_dist.data import grouping, idx, labels
from mae_dist.data.dataset import Shard
from mae_dist.data.idx import Entry, Members
from mae_dist.data.labels import Label
from mae_dist.data.tar_reader import Notes, members

AUTO, NO_LABELS, FOLDER, JSON, LIST = "auto", "none", "folder", "json:", "a list/"
"""Where labels are from: .cls members, nowhere, the folders in the tar, a field of .json members (json:FIELD), or rows
of a list, which are found by the names of images.
"""


@dataclass(frozen=True)
class Indexed:
    """An indexed tar: its Shard, the labels of its samples (of FOLDER: the folder, of LIST: the name of the image; see
    `data_index`), whether they stand in .cls members
    as plain numbers, and what is worth telling. ``others`` counts the members that are neither image nor label by
    extension; ``fields`` are those of its first .json that could hold labels; ``folders`` those of its samples.
    """

    shard: Shard
    labels: list[Label]
    plain: bool
    notes: Notes
    others: Counter[str] = field(default_factory=Counter)
    fields: tuple[str, ...] = ()
    folders: frozenset[str] = frozenset()


def build(tar: Path, index: Path, source: str = AUTO) -> Indexed:
    """Index one tar and write the index file atomically. Labels are from `source`: AUTO, NO_LABELS, FOLDER, LIST, JSON
    with a field, or the extension of members.

    Raises ValueError when the file is no uncompressed tar, is cut short, holds no sample or a label that is none.
    """
    notes = Notes()
    found = members(tar, notes)
    try:
        samples = grouping.group(found, notes)
        if not samples:
            kinds = Counter(posixpath.splitext(member.name)[1] or "without extension" for member in found)
            only = f", only {', '.join(f'{count} {kind}' for kind, count in kinds.most_common(4))}" if kinds else ""
            only += "; a tar of tars is for `mae-dist data pack imagenet`" * (".tar" in kinds)
            raise ValueError(f"holds no samples (files named KEY.{', .'.join(grouping.IMAGES)}){only}")
        with tar.open("rb") as stream:
            read = _label_reader(source, stream)
            chosen = [read(key, sample) for key, sample in samples.items()]
            fields = _fields(next((sample["json"] for sample in samples.values() if "json" in sample), None), stream)
    except ValueError as error:
        raise ValueError(f"{tar}: {error}") from error
    if not idx.write(index, samples.values()):
        notes.add("DALI cannot read the index of a tar with spaces or line ends in its names", tar.name)
    shard = Shard(
        tar.name, len(samples), sum(label != labels.NONE for label in chosen), tar.stat().st_size, sha256(tar)
    )
    has_members = any(grouping.label_of(sample) for sample in samples.values())
    plain = not has_members if source == NO_LABELS else source == AUTO
    return Indexed(
        shard, chosen, plain and not any(isinstance(label, str) for label in chosen), notes,
        Counter(extension for sample in samples.values() for extension in others(sample)), fields,
        frozenset(posixpath.dirname(key) for key in samples),
    )  # fmt: skip


def others(sample: Members) -> set[str]:
    """The extensions of a sample's members that are neither image nor label."""
    return sample.keys() - {grouping.image_of(sample), grouping.label_of(sample)}


def other_members(index: Path) -> Counter[str]:
    """How many members of a tar are neither image nor label, by extension, from its index."""
    return Counter(extension for sample in idx.read(index) for extension in others(sample))


def _label_reader(source: str, stream: BinaryIO) -> Callable[[str, Members], Label]:
    """What finds the label of a sample by its key and members."""

    def read(key: str, sample: Members) -> Label:
        if source == NO_LABELS:
            return labels.NONE
        if source == FOLDER:
            return posixpath.dirname(key) or labels.NONE
        if source in (LIST, labels.NAME):
            name = sample[grouping.image_of(sample) or ""].name
            return name if source == LIST else labels.class_in_name(name) or labels.NONE
        wanted = "json" if source.startswith(JSON) else source.lower().lstrip(".")
        extension = grouping.label_of(sample) if source == AUTO else _extension(sample, wanted)
        if extension is None:
            return labels.NONE
        entry = sample[extension]
        try:
            content = _content(stream, entry)
            if source.startswith(JSON):
                return labels.of_json(content, source.removeprefix(JSON))
            return labels.of_npy(content) if extension.endswith("npy") else labels.of_text(content)
        except ValueError as error:
            raise ValueError(f"{entry.name} {error}") from error

    return read


def _extension(sample: Members, wanted: str) -> str | None:
    if wanted in sample:
        return wanted
    return next((extension for extension in sample if extension.endswith(f".{wanted}")), None)


def _content(stream: BinaryIO, entry: Entry) -> bytes:
    if entry.size > labels.MOST_BYTES:
        raise ValueError(f"has {entry.size:,} bytes, more than any label")
    return os.pread(stream.fileno(), entry.size, entry.offset)


def _fields(entry: Entry | None, stream: BinaryIO) -> tuple[str, ...]:
    """The fields of a .json member that may hold labels: those named so, else all with a whole number or a text."""
    if entry is None or entry.size > labels.MOST_BYTES:
        return ()
    fields = labels.fields_of(_content(stream, entry))
    return tuple(name for name in fields if name.rpartition(".")[2].lower() in labels.NAMES) or fields
