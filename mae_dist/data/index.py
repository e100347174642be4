"""ShardIndex: where every sample of a split lies, as byte offsets into ordinary webdataset tars.

Beside `x.tar` lies `x.idx` (see `idx`), and one `dataset.json` for the folder (see `dataset`); `indexing` makes them.
Reading is random access (`os.pread`), so a position in the data is an integer and seeking is free. Offsets are loaded
per shard when first needed, so memory grows with the number of shards.

Knows no model, no view and no order. Unpickles nothing. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mae_dist.checksum import sha256
from mae_dist.data import idx, labels, places, quarantine
from mae_dist.data.cache import Cache
from mae_dist.data.classes import Merging
from mae_dist.data.dataset import FILE, Dataset, Parts, Shard, united
from mae_dist.data.grouping import image_of, label_of
from mae_dist.data.places import Paths
from mae_dist.data.remote import Remote
from mae_dist.data.shard_files import ChangedError, ShardFiles, persistently
from mae_dist.errors import from_os_error
from mae_dist.paths import is_url
from mae_dist.printed import counted

log = logging.getLogger(__name__)
MOST_COMPARED = 2**30
"""Bytes of tars whose checksums are compared when a split is opened."""
MOST_BYTES = 2**32
"""Bytes of an image file."""


@dataclass(frozen=True)
class Sample:
    """One stored sample: webdataset key, extension and bytes of its image file, and label (-1: none)."""

    key: str
    extension: str
    image: bytes
    label: int


@dataclass(frozen=True)
class _Table:
    """One shard's index, a row per sample: name and extension of the image, where image and label lie, and the labels,
    where they stand in a file of their own.
    """

    names: list[str]
    extensions: list[str]
    spans: np.ndarray  # int64 (rows, 4): image offset, image size, label offset, label size (-1: no label)
    labels: np.ndarray | None  # int64 (rows,)


class ShardIndex:
    """All samples of one split. The id of a sample is its position in the concatenation of the shards.

    ``left_out``: shard -> names of images of samples that do not count (see `quarantine`). Tars that are URLs are read
    through the `cache`.
    """

    def __init__(
        self, tars: Sequence[str | Path], indexes: Sequence[str | Path], shards: list[Shard], dataset: Dataset,
        left_out: dict[int, set[str]] | None = None, cache: Cache | None = None, parts: Parts | None = None,
    ):  # fmt: skip
        self.tars, self.indexes, self.shards, self.dataset = Paths(tars), Paths(indexes), shards, dataset
        self.left_out, self.cache = left_out or {}, cache or Cache.of(None)
        self.parts = parts or Parts([len(shards)], [None] * len(shards))
        self.counts = np.array([shard.num_samples for shard in shards], dtype=np.int64)
        self.files = ShardFiles(self.tars.texts, shards, self.cache)
        self._table = functools.lru_cache(maxsize=256)(self._read_table)
        self._rows = functools.lru_cache(maxsize=256)(self._kept_rows)
        for shard in self.left_out:
            self.counts[shard] = len(self._rows(shard))
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getstate__(self) -> tuple:
        return (self.tars, self.indexes, self.shards, self.dataset, self.left_out, self.cache, self.parts)

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # each worker opens its own file handles and tables

    def _read_table(self, shard: int) -> _Table:
        return persistently(lambda: _read_table(self.indexes[shard], self.shards[shard]), str(self.indexes[shard]))

    def _kept_rows(self, shard: int) -> np.ndarray:
        """Rows of the samples of a shard that are not left out."""
        return np.flatnonzero([name not in self.left_out[shard] for name in self._table(shard).names])

    @functools.cached_property
    def remotes(self) -> list[Remote | None]:
        """The tars that are fetched through the cache; None for those that are files."""
        return [shard.remote for shard in self.shards]

    @property
    def local_tars(self) -> Paths:
        """The tars that are files."""
        return Paths(tar for tar, remote in zip(self.tars.texts, self.remotes, strict=True) if remote is None)

    @property
    def counts_of_parts(self) -> list[np.ndarray]:
        """The numbers of samples in the shards of each data set; of one unless data.path is a list."""
        return np.split(self.counts, np.cumsum(self.parts.sizes)[:-1])

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a label."""
        left_out = [
            (shard, row) for shard, images in self.left_out.items()
            for row, name in enumerate(self._table(shard).names) if name in images
        ]  # fmt: skip
        return sum(s.num_labelled for s in self.shards) - sum(self._is_labelled(*place) for place in left_out)

    def _is_labelled(self, shard: int, row: int) -> bool:
        """Whether a sample has a label, if only one that cannot be read."""
        try:
            return self._label(shard, row) >= 0
        except ValueError:
            return True

    @property
    def fingerprint(self) -> str:
        """A short hash of the names, counts, sizes and known sha256 of the shards, of samples that are left out, and of
        how data sets are put together; independent of folders, but for those of tars that share a name and have no
        known sha256.
        """
        names = [os.path.basename(tar) for tar in self.tars.texts]
        uses = Counter(names)
        names = [
            f"{self.tars[shard].parent.name}/{name}" if uses[name] > 1 and not self.shards[shard].sha256 else name
            for shard, name in enumerate(names)
        ]
        rows = [
            f"{name} {s.num_samples} {s.num_bytes} {s.sha256}{s.labels and ' ' + s.labels}"
            for name, s in zip(names, self.shards, strict=True)
        ]
        rows += [f"{names[shard]} without {sorted(images)}" for shard, images in sorted(self.left_out.items())]
        if len(self.parts.sizes) > 1:
            rows.append(f"data sets of {self.parts.sizes} shards")
        rows += [f"classes {numbers}" for numbers in dict.fromkeys(str(n) for n in self.parts.labels if n is not None)]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def numbered_as(self, classes: list[str] | None) -> ShardIndex:
        """This split with the class numbers of another data set, by the names of its `classes`; as it is where one of
        them has no names. Raises ValueError for a class that is not among them.
        """
        own = self.dataset.classes
        if own is None or classes is None or own == classes:
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        if missing := [name for name in own if name not in numbers]:
            raise ValueError(
                f"{self.dataset.name}: its class {missing[0]} is none of the {len(classes)} classes that are trained; "
                f"data.accept=[unseen_classes] accepts it"
            )
        table = np.array([numbers[name] for name in own], dtype=np.int64)
        labels: list[np.ndarray | None] = [table if known is None else table[known] for known in self.parts.labels]
        dataset, parts = (
            replace(self.dataset, classes=classes, num_classes=len(classes)),
            self.parts._replace(labels=labels),
        )
        return ShardIndex(self.tars, self.indexes, self.shards, dataset, self.left_out, self.cache, parts)

    def described_by(self, dataset: Dataset) -> ShardIndex:
        """This split with other facts of its data set."""
        return ShardIndex(self.tars, self.indexes, self.shards, dataset, self.left_out, self.cache, self.parts)

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row of its index) of a sample id."""
        shard = int(self.ends.searchsorted(sample, "right"))
        row = sample - int(self.ends[shard] - self.counts[shard])
        return shard, int(self._rows(shard)[row]) if shard in self.left_out else row

    def neighbours(self, sample: int) -> Iterator[int]:
        """The ids that may replace an unreadable sample: the next ones of its shard, cyclically, and then, where that
        holds none that can be read, the first one of each following shard.
        """
        starts, shard = self.ends - self.counts, int(np.searchsorted(self.ends, sample, side="right"))
        first, count = int(starts[shard]), int(self.counts[shard])
        yield from (first + (sample - first + step) % count for step in range(1, count))
        shards = (np.arange(1, len(self.shards)) + shard) % len(self.shards)
        yield from starts[shards][self.counts[shards] > 0].tolist()

    def image_name(self, sample: int) -> str:
        """The name of a sample's image in its tar."""
        shard, row = self.locate(sample)
        return self._table(shard).names[row]

    def key(self, sample: int) -> str:
        """The key of a sample in webdataset's sense: the name of its image without the extension."""
        shard, row = self.locate(sample)
        table = self._table(shard)
        return table.names[row][: -len(table.extensions[row]) - 1]

    def sample_name(self, sample: int) -> str:
        """A sample's name for messages: 'a/b.jpg in x.tar'."""
        return f"{self.image_name(sample)} in {self.tars[self.locate(sample)[0]].name}"

    def read(self, sample: int) -> Sample:
        """Read one sample. Raises ValueError if its label is not a number, or not what dataset.json says of it, and
        what `ShardFiles.read` raises.
        """
        shard, row = self.locate(sample)
        table = self._table(shard)
        offset, size = (int(v) for v in table.spans[row, :2])
        if size > MOST_BYTES:
            raise ValueError(f"has {size:,} bytes, more than any image ({MOST_BYTES:,})")
        image = self.files.read(shard, offset, size)
        name, extension = table.names[row], table.extensions[row]
        return Sample(name[: -len(extension) - 1], extension.rpartition(".")[2], image, self._label(shard, row))

    def place_of_image(self, sample: int) -> tuple[int, int]:
        """The tar that a sample's image is in, and its first byte there: those of links to one image are the same."""
        shard, row = self.locate(sample)
        return shard, int(self._table(shard).spans[row, 0])

    def label(self, sample: int) -> int:
        """Read the label of one sample (-1: none). Raises as `read`."""
        return self._label(*self.locate(sample))

    def _stored_label(self, shard: int, row: int) -> int:
        table = self._table(shard)
        if table.labels is not None:
            return int(table.labels[row])
        offset, size = (int(v) for v in table.spans[row, 2:])
        if size < 0:
            return labels.NONE
        label = labels.of_text(self.files.read(shard, offset, min(size, labels.MOST_TEXT)))
        return _number_of_name(self.tars[shard]) if isinstance(label, str) else label

    def _label(self, shard: int, row: int) -> int:
        number, numbers, facts = self._stored_label(shard, row), self.parts.labels[shard], self.shards[shard]
        if number < 0 and facts.num_labelled >= facts.num_samples and (facts.sha256 or facts.remote):  # in dataset.json
            raise ValueError(f"has no label, but {FILE} says that all of its tar have one")
        most = self.dataset.num_classes if numbers is None else len(numbers)
        if most is not None and number >= most:
            raise ValueError(f"label {number}, but there are {most} classes")
        return number if number < 0 or numbers is None else int(numbers[number])


def open_split(
    path: str, split: str, cache: Cache | None = None, merging: Merging = "names", allow_outside: bool = False,
    checked: bool = False,
) -> ShardIndex:  # fmt: skip
    """Open a split: `path` names folders with a dataset.json, or tars with their .idx files beside them (see `paths`).

    Tars that `path` names, by themselves or by a folder without dataset.json, are the split, and `split` is ignored.
    Several places are one data set, in their order, with labels merged as `merging` says. Tars that are URLs are
    fetched through `cache`. Raises ValueError when a file is missing or changed, is named twice, or lies outside the
    folder of its data set, unless that is allowed; where another rank of this machine has `checked` the files, none of
    that is asked of the file system again.
    """
    split = places.evaluation_split(path, split)
    files = places.Files()
    parts = places.of_split(path, split, files)
    found = [place for part in parts for place in part]
    if not checked:
        places.refuse_outside(path, found, allow_outside, files)
        _check_files(path, found, files)
    shards = [place.shard or shard_of(Path(place.tar), Path(place.idx)) for place in found]
    left_out = _left_out([place.idx for place in found], shards)
    unmeasured = [*dict.fromkeys(place.dataset.name for place in found if place.dataset.mean is None)][:5]
    dataset, maps, problem = united([place.dataset for place in found] or [Dataset("")], shards, merging)
    together = Parts([len(part) for part in parts], maps, problem, places.mixed_splits(path, found), unmeasured)
    index = ShardIndex([p.tar for p in found], [p.idx for p in found], shards, dataset, left_out, cache, together)
    if left_out:
        log.info("%s: %d samples are left out (%s)", path, sum(map(len, left_out.values())), quarantine.FILE)
    if not len(index):
        why = f": {quarantine.FILE} leaves out all; remove its lines, or name another split" if left_out else ""
        raise ValueError(f"data.path={path}: the tars of split {split!r} hold no samples{why}")
    return index


def _check_files(path: str, found: Sequence[places.Place], files: places.Files) -> None:
    """Raise ValueError where a tar is missing, changed, not indexed or named twice. One stat a tar.

    Another tar of the same size is logged: the newest of those that are newer than their dataset.json are compared.
    """
    seen, newer, written = {}, list[tuple[int, str, Shard]](), functools.cache(_written)
    for tar, index, shard, *_ in found:
        status = None if shard is not None and is_url(shard.tar) else _status(tar)
        if (twin := seen.setdefault((status.st_dev, status.st_ino) if status else tar, tar)) is not tar:
            raise ValueError(f"data.path={path}: {twin} is in it twice" + (f", also as {tar}" if tar != twin else ""))
        if index not in files:
            raise ValueError(f"{tar}: not indexed yet; run `mae-dist data index '{path}'`")
        if shard is not None and status is not None and status.st_size != shard.num_bytes:
            raise ValueError(
                f"{tar}: {status.st_size} bytes, but {FILE} lists {shard.num_bytes}: it was changed or cut short; "
                f"restore it or index it again with `mae-dist data index`"
            )
        if status and shard and shard.sha256 and status.st_mtime_ns > written(index[: index.rfind("/") + 1]):
            newer.append((status.st_mtime_ns, tar, shard))
    if newer:
        log.info("%s: %s newer than %s, compared with it at each start, %d MiB at most, until you %s",
                 path, counted(len(newer), "tar"), FILE, MOST_COMPARED >> 20, idx.AGAIN)  # fmt: skip
    left = MOST_COMPARED
    for _, tar, shard in sorted(newer, reverse=True):
        if (left := left - shard.num_bytes) < 0:
            break
        if persistently(functools.partial(sha256, Path(tar)), tar) != shard.sha256:
            log.warning(
                "%s: is not the file that was indexed, though as large (`mae-dist data check`); %s", tar, idx.AGAIN
            )


def _written(folder: str) -> int:
    """When the dataset.json of a folder was written."""
    return os.stat(os.path.join(folder, FILE)).st_mtime_ns


def _left_out(indexes: Sequence[str], shards: list[Shard]) -> dict[int, set[str]]:
    """Shard -> images of samples that quarantine.txt beside its index names. Raises ValueError for unknown ones."""
    folders = dict.fromkeys([index[: index.rfind("/") + 1] for index in indexes])
    lines = [
        (os.path.join(folder, line.idx), line.image) for folder in folders for line in quarantine.read(Path(folder))
    ]
    numbers = {index: number for number, index in enumerate(indexes)} if lines else {}
    found: dict[int, set[str]] = {}
    for index, image in lines:
        if (number := numbers.get(index)) is not None:  # that of another split is not there
            found.setdefault(number, set()).add(image)
    for number, images in found.items():
        index = Path(indexes[number])
        if unknown := images.difference(_read_table(index, shards[number]).names):
            file = index.with_name(quarantine.FILE)
            raise ValueError(f"{file}: {index.name} has no image {min(unknown)!r}; remove that line")
    return found


def _status(tar: str) -> os.stat_result:
    try:
        status = os.stat(tar)
    except OSError as error:
        raise from_os_error(error, f"{tar}: cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{tar}: is no file")
    return status


def shard_of(tar: Path, index: Path) -> Shard:
    """The Shard of a tar that no dataset.json lists, from its index; sha256 is empty."""
    num_samples, num_labelled, _ = summary(index)
    return Shard(tar.name, num_samples, num_labelled, tar.stat().st_size, "")


def summary(index: Path) -> tuple[int, int, int]:
    """(samples, labelled samples, end of the last one in bytes) of an index. Raises ValueError where it is none."""
    spans = _read_table(index).spans
    return len(spans), int((spans[:, 3] >= 0).sum()), int((spans[:, ::2] + spans[:, 1::2]).max(initial=0))


@functools.cache
def _number_of_name(tar: Path) -> int:
    """NONE, with a warning: names of classes have numbers only where `mae-dist data index` has given them."""
    log.warning("%s: its labels are names, which count as none; %s", tar, idx.AGAIN)
    return labels.NONE


def _read_table(index: Path, shard: Shard | None = None) -> _Table:
    """A shard's index. Raises ChangedError where it does not fit the shard."""
    names, extensions, spans, end = [], [], [], 2**62 if shard is None else shard.num_bytes
    for members in idx.read(index):
        image, label = image_of(members), label_of(members)
        if image is None:
            raise ChangedError(f"{index}: sample {next(iter(members.values())).name!r} has no image; {idx.AGAIN}")
        names.append(members[image].name)
        extensions.append(image)
        spans.append((*members[image][1:3], *(members[label][1:3] if label else (0, -1))))
    places = (place for span in spans for place in (span[:2], span[2:]))
    if any(not 0 <= start <= start + max(size, 0) <= end for start, size in places):
        raise ChangedError(f"{index}: leads outside its tar; {idx.AGAIN}")
    if shard is not None and len(names) != shard.num_samples:
        raise ChangedError(f"{index}: has {len(names)} samples, not {shard.num_samples}; {idx.AGAIN}")
    table = np.array(spans, dtype=np.int64).reshape(-1, 4)
    known = labels.read(index, shard.labels, shard.num_samples) if shard and shard.labels else None
    return _Table(names, extensions, table, known)
