"""ShardIndex: where every sample of a split lies, as byte offsets into ordinary webdataset tars.

Beside `x.tar` lies `x.idx` in the format of DALI's wds2idx (v1.2 text: one line a sample, `ext offset size name` for
each member), and one `dataset.json` for the folder (see `Dataset`). An index is built in one pass over the headers of a
tar; nothing is unpacked. Reading is random access (`os.pread`), so a position in the data is an integer and seeking is
free. Offsets are loaded per shard when first needed, so memory grows with the number of shards.

Knows no model, no view and no order. Unpickles nothing. Imports no torch.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mae_dist.atomic import replacing

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "npy", "tif", "tiff", "bmp", "ppm", "pgm")
"""Extensions that hold an image, in order of preference: torchvision's, and npy."""
LABEL = "cls"
VERSION = "v1.2"
FORMAT = "mae_dist dataset 1"
FILE = "dataset.json"


class ChangedError(ValueError):
    """A shard differs from what its index or dataset.json says. No other sample replaces such a one."""


@dataclass(frozen=True)
class Shard:
    """One tar file: ``tar`` is its path, relative to dataset.json or absolute; ``sha256`` is empty if not computed."""

    tar: str
    num_samples: int
    num_labelled: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    ``splits`` maps a split's name to its shards; ``classes`` names the labels 0..n-1; ``image_size`` is (height, width)
    when all images share one; ``mean`` and ``std`` are channel statistics of the training split in 0..1; ``white`` is
    the stored value that is white, where pixels have more than 8 bits and packing was told so.
    """

    name: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    num_classes: int | None = None
    classes: list[str] | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    white: float | None = None

    def save(self, folder: Path) -> None:
        """Write dataset.json into `folder`, atomically."""
        with replacing(folder / FILE) as work:
            work.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Dataset:
        """Read dataset.json from `folder`. Raises ValueError when it is missing or has another format."""
        path = folder / FILE
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        if not path.is_file():
            tars = len(list(folder.glob("*.tar")))
            hint = f"found {tars} tars: run `mae-dist data index '{folder}/*.tar'`" if tars else "no tars there either"
            raise ValueError(f"data.path={folder}: no {FILE} in it ({hint})")
        try:
            plain = json.loads(path.read_text())
            if plain.pop("format") != FORMAT:
                raise ValueError("another format")
            plain["splits"] = {name: [Shard(**shard) for shard in shards] for name, shards in plain["splits"].items()}
            for name in ("image_size", "mean", "std"):
                plain[name] = None if plain[name] is None else tuple(plain[name])
            return Dataset(**plain)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a {FORMAT!r} file ({error}); make it anew with `mae-dist data index`"
            ) from error


@dataclass(frozen=True)
class Sample:
    """One stored sample: webdataset key, extension and bytes of its image file, and label (-1: none)."""

    key: str
    extension: str
    image: bytes
    label: int


@dataclass(frozen=True)
class _Table:
    """One shard's index, a row per sample: the name of the image, and where image and label lie (-1: no label)."""

    names: list[str]
    spans: np.ndarray  # int64 (rows, 4): image offset, image size, label offset, label size


class ShardIndex:
    """All samples of one split. The id of a sample is its position in the concatenation of the shards."""

    def __init__(self, tars: list[Path], indexes: list[Path], shards: list[Shard], dataset: Dataset):
        self.tars, self.indexes, self.shards, self.dataset = tars, indexes, shards, dataset
        self.counts = np.array([shard.num_samples for shard in shards], dtype=np.int64)
        self.ends = np.cumsum(self.counts)
        self._table = functools.lru_cache(maxsize=256)(lambda shard: _read_table(self.indexes[shard]))
        self._open = functools.lru_cache(maxsize=128)(_Handle)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> tuple:
        return (self.tars, self.indexes, self.shards, self.dataset)

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # each worker opens its own file handles and tables

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a label."""
        return sum(shard.num_labelled for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A short hash of the names, counts, sizes and known sha256 of the shards; independent of their folder."""
        rows = [f"{Path(s.tar).name} {s.num_samples} {s.num_bytes} {s.sha256}" for s in self.shards]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample id."""
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return shard, sample - int(self.ends[shard] - self.counts[shard])

    def neighbour(self, sample: int) -> int:
        """The id of the sample that replaces an unreadable one: the next of its shard, cyclically."""
        shard, row = self.locate(sample)
        return sample - row + (row + 1) % int(self.counts[shard])

    def sample_name(self, sample: int) -> str:
        """A sample's name for messages: 'a/b.jpg in x.tar'."""
        shard, row = self.locate(sample)
        return f"{self._table(shard).names[row]} in {self.tars[shard].name}"

    def read(self, sample: int) -> Sample:
        """Read one sample. Raises ValueError if its label is not a number, ChangedError if the tar is too short."""
        shard, row = self.locate(sample)
        table = self._table(shard)
        offset, size = (int(v) for v in table.spans[row, :2])
        image = self._open(str(self.tars[shard])).read(offset, size)
        key, extension = split_name(table.names[row])
        return Sample(key, extension.lower().rpartition(".")[2], image, self.label(sample))

    def label(self, sample: int) -> int:
        """Read the label of one sample (-1: none). Raises ValueError if it is not a number, ChangedError as `read`."""
        shard, row = self.locate(sample)
        offset, size = (int(v) for v in self._table(shard).spans[row, 2:])
        return -1 if offset < 0 else int(self._open(str(self.tars[shard])).read(offset, size))


class _Handle:
    """An open file for os.pread; it is closed when the cache drops it."""

    def __init__(self, path: str):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise ChangedError(f"{self.path}: ends inside a sample: it was changed or cut short after it was indexed")
        return content

    def __del__(self) -> None:
        os.close(self.descriptor)


def split_name(name: str) -> tuple[str, str]:
    """Split 'a/b.seg.png' into key and extension ('a/b', 'seg.png'), by the rule of webdataset and DALI."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def open_split(path: str, split: str) -> ShardIndex:
    """Open a split: `path` is a folder with dataset.json, or a glob of tars with their .idx files beside them.

    With a glob, its tars are the split and `split` is ignored. Raises ValueError when a file is missing or changed.
    """
    if not glob.has_magic(path) and not path.endswith(".tar"):
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"data.path={path}: no such folder; make one with `mae-dist data pack ... --out {path}`")
        dataset = Dataset.load(folder)
        if split not in dataset.splits:
            raise ValueError(f"{path}/{FILE}: has no split {split!r}, only {', '.join(sorted(dataset.splits))}")
        shards: list[Shard | None] = [*dataset.splits[split]]
        tars = [folder / shard.tar for shard in dataset.splits[split]]
        indexes = [folder / (tar.stem + ".idx") for tar in tars]
    else:
        tars = [Path(name) for name in sorted(glob.glob(path))]
        if not tars:
            raise ValueError(f"data.path={path}: no file matches")
        indexes = [tar.with_suffix(".idx") for tar in tars]
        folder = tars[0].parent
        dataset = Dataset.load(folder) if (folder / FILE).is_file() else Dataset(name=path)
        known = {folder / shard.tar: shard for listed in dataset.splits.values() for shard in listed}
        shards = [known.get(tar) for tar in tars]
    for tar, index, shard in zip(tars, indexes, shards, strict=True):
        if not tar.is_file():
            raise ValueError(f"{tar}: {FILE} lists it, but there is no such file")
        if not index.is_file():
            raise ValueError(f"{tar}: not indexed yet; run `mae-dist data index '{path}'`")
        if shard is not None and tar.stat().st_size != shard.num_bytes:
            raise ValueError(
                f"{tar}: {tar.stat().st_size} bytes, but {FILE} lists {shard.num_bytes}: it was changed or cut short; "
                f"restore it or index it again with `mae-dist data index`"
            )
    known_or_not = zip(tars, indexes, shards, strict=True)
    index = ShardIndex(tars, indexes, [s or _shard_of(tar, index) for tar, index, s in known_or_not], dataset)
    if not len(index):
        raise ValueError(f"data.path={path}: the tars of split {split!r} hold no samples")
    return index


def _shard_of(tar: Path, index: Path) -> Shard:
    """The Shard of a tar that no dataset.json lists, from its index; sha256 is empty."""
    labelled = int((_read_table(index).spans[:, 2] >= 0).sum())
    return Shard(tar.name, _count(index), labelled, tar.stat().st_size, "")


def build(tar: Path, index: Path) -> tuple[Shard, np.ndarray]:
    """Index one tar and write the index file atomically; return its Shard and its labels (int64 (n,), -1: none).

    Members of a sample need not be neighbours. Samples without an image are left out, with a warning. Raises ValueError
    when the file is no uncompressed tar, is cut short, or holds no sample.
    """
    samples: dict[str, dict[str, tuple[int, int, str]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, extension = split_name(member.name)
                if not member.isreg() or not key or key.endswith("/") or Path(member.name).name.startswith("."):
                    continue
                if any(space in member.name for space in " \t\n\r"):
                    raise ValueError(
                        f"{tar}: member {member.name!r} has a space in its name, which the index cannot hold"
                    )
                members = samples.setdefault(key, {})
                if extension.lower() in members:
                    raise ValueError(f"{tar}: contains {member.name} twice")
                members[extension.lower()] = (member.offset_data, member.size, member.name)
                if extension.lower() == LABEL:
                    labels[key] = _label(tar, member, archive)
    except tarfile.TarError as error:
        raise ValueError(f"{tar}: not a complete uncompressed tar ({error})") from error
    size = tar.stat().st_size
    end = max((offset + length for members in samples.values() for offset, length, _ in members.values()), default=0)
    if end > size:
        raise ValueError(f"{tar}: cut short: its last member ends at byte {end}, the file at {size}")
    kept = {key: members for key, members in samples.items() if _image_of(members) is not None}
    if len(kept) < len(samples):
        lost = next(key for key in samples if key not in kept)
        log.warning("%s: %d samples have no image and are left out, %s first", tar, len(samples) - len(kept), lost)
    if not kept:
        raise ValueError(f"{tar}: holds no samples (files named KEY.{', .'.join(IMAGES)})")
    lines = [f"{VERSION} {len(kept)}"]
    for members in kept.values():
        lines.append(" ".join(f"{ext} {offset} {length} {name}" for ext, (offset, length, name) in members.items()))
    with replacing(index) as work:
        work.write_text("\n".join(lines) + "\n")
    found = np.array([labels.get(key, -1) for key in kept], dtype=np.int64)
    return Shard(tar.name, len(kept), int((found >= 0).sum()), size, _sha256(tar)), found


def other_members(index: Path) -> Counter[str]:
    """How many members of a tar are neither image nor label, by extension, from its index."""
    return Counter(extension for members in _rows(index) for extension in members.keys() - {_image_of(members), LABEL})


def _label(tar: Path, member: tarfile.TarInfo, archive: tarfile.TarFile) -> int:
    stream = archive.extractfile(member)
    assert stream is not None
    text = stream.read()
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{tar}: {member.name} holds {text[:20]!r}, expected a class number like 7")
    return value


def _image_of(members: dict[str, tuple[int, int, str]]) -> str | None:
    plain = next((ext for ext in IMAGES if ext in members), None)
    return plain or next((ext for ext in members if ext.rpartition(".")[2] in IMAGES), None)


def _count(index: Path) -> int:
    with index.open() as stream:
        version, _, count = stream.readline().strip().partition(" ")
    if version != VERSION or not count.isdigit():
        raise ValueError(f"{index}: expected an index {VERSION!r}, found {version!r}; run `mae-dist data index` again")
    return int(count)


def _rows(index: Path) -> Iterator[dict[str, tuple[int, int, str]]]:
    count = _count(index)
    lines = index.read_text().splitlines()[1:]
    if len(lines) != count:
        raise ValueError(f"{index}: expected {count} samples, found {len(lines)}; run `mae-dist data index` again")
    for line in lines:
        words = line.split(" ")
        yield {
            ext.lower(): (int(offset), int(size), name)
            for ext, offset, size, name in zip(words[0::4], words[1::4], words[2::4], words[3::4], strict=True)
        }


def _read_table(index: Path) -> _Table:
    names, spans = [], []
    for members in _rows(index):
        image = _image_of(members)
        if image is None:
            raise ValueError(
                f"{index}: sample {next(iter(members.values()))[2]} has no image; run `mae-dist data index` again"
            )
        offset, size, name = members[image]
        names.append(name)
        spans.append((offset, size, *members.get(LABEL, (-1, 0))[:2]))
    return _Table(names, np.array(spans, dtype=np.int64).reshape(-1, 4))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
