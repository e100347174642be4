"""What is wrong with one tar of a data set: its size, checksum and index, and each of its samples.

A report is kept in the hidden folder .check beside the index, so that a stopped check goes on behind the last finished
tars, and a second one reads only those that have changed. `findings` compares tars with each other. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mae_dist import small_files
from mae_dist.atomic import replacing
from mae_dist.data.cache import Cache
from mae_dist.data.dataset import Dataset
from mae_dist.data.decode import decoded, own_channels
from mae_dist.data.index import ShardIndex, shard_of
from mae_dist.data.indexing import NO_LABELS, build
from mae_dist.data.pixels import Decoding
from mae_dist.data.places import Place
from mae_dist.data.remote import Refused
from mae_dist.data.shard_files import ChangedError, ShardFiles
from mae_dist.data.tally import Tally
from mae_dist.data.tar_reader import Notes
from mae_dist.errors import MachineFault

FORMAT = "mae_dist check 3"
"""Changes when other things are checked, or when they are kept in another way."""
FOLDER = ".check"


@dataclass(frozen=True)
class Report:
    """What a check has found in one tar.

    ``faults`` are of the tar as a whole. ``names`` are those of the images in its index, ``unreadable`` says of some
    why they cannot be used; of the others ``hashes`` has 64 bits of the BLAKE2 hash of the file, ``labels`` the label
    (-1: none). ``tally`` sums over the readable ones; ``notes`` is what else indexing tells.
    """

    key: str
    faults: list[str]
    names: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    tally: Tally = Tally()
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as work:
            work.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(file: Path, key: str) -> Report | None:
        """The report of a file; None where there is none with this key, where it is damaged, or another user's, who may
        have written anything.
        """
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, MachineFault):
            if file.stat().st_uid != os.getuid():
                return None
            plain = small_files.read_json(file)
            report = Report(tally=Tally.from_json(plain.pop("tally")), **plain)
            return report if report.key == key else None
        return None


def report_of(place: Place) -> Report:
    """The report of one tar, from its file where it has been checked and not changed since.

    Raises MachineFault or OSError when the storage fails.
    """
    folder, name = os.path.split(place.idx)
    key, file = _key(place), Path(folder, FOLDER, f"{name}.json")
    report = Report.load(file, key)
    if report is None:
        try:
            with _local(place) as local:
                report = check(local, key)
        except Refused as error:
            return Report(key, [str(error)])
        with suppress(OSError):  # a folder that may not be written costs a second check
            report.save(file)
    return report


@contextmanager
def _local(place: Place) -> Iterator[Place]:
    """The place with a tar on this machine: fetched, if it is a URL."""
    if place.shard is None or place.shard.remote is None:
        yield place
        return
    descriptor = Cache.of(None).open(place.shard.remote)
    try:
        tar = f"/proc/self/fd/{descriptor}"  # stays readable if another process makes room
        yield place._replace(tar=tar, shard=replace(place.shard, tar=os.path.basename(place.tar)))
    finally:
        os.close(descriptor)


def _key(place: Place) -> str:
    """A hash of what a report depends on: the tar and its index by size, time, inode, as a copy may be damaged, and
    whether this user may read them, and what dataset.json says.
    """
    found = [(path, os.stat(path)) for path in filter(os.path.isfile, (place.tar, place.idx))]
    files = [(s.st_size, s.st_mtime_ns, s.st_ino, os.access(path, os.R_OK)) for path, s in found]
    known = place.shard and asdict(place.shard), place.dataset.mean, place.dataset.white
    return hashlib.sha256(json.dumps([FORMAT, files, known]).encode()).hexdigest()


def _decoding(dataset: Dataset, data: ShardIndex) -> Decoding:
    """How the images of a data set are decoded: as dataset.json says, else with the channels of the first one."""
    channels = len(dataset.mean or ())
    if not channels:
        with suppress(ValueError):
            channels = own_channels(data.read(0))
    return Decoding(channels=channels or 3, white=dataset.white)


def check(place: Place, key: str = "") -> Report:
    """Read and decode all samples of one tar."""
    notes = Notes()
    tar, index = Path(place.tar), Path(place.idx)
    faults = [*_faults(place, notes)]
    if not all(file.is_file() and os.access(file, os.R_OK) for file in (tar, index)):
        return Report(key, faults)
    try:
        data = ShardIndex([tar], [index], [place.shard or shard_of(tar, index)], place.dataset)
        names = [data.image_name(row) for row in range(len(data))]
    except ValueError as error:
        return Report(key, [*faults, f"its index cannot be read ({error})"])
    there = replace(data.shards[0], num_bytes=tar.stat().st_size, sha256="")  # if another size was listed
    data.files = ShardFiles([tar], [there], data.cache)
    unreadable, hashes, labels, tallies = {}, {}, {}, []
    how = _decoding(place.dataset, data)
    for row, name in enumerate(names):
        try:
            sample = data.read(row)
            pixels, changes = decoded(sample, how=how)
            tallies.append(Tally.of(np.asarray(pixels), sample.label, changes))
        except ChangedError:
            unreadable[name] = "the tar ends before it does"
        except ValueError as error:
            unreadable[name] = " ".join(str(error).split())
        else:
            hashes[name] = int.from_bytes(hashlib.blake2b(sample.image, digest_size=8).digest())
            labels[name] = sample.label
    return Report(key, faults, names, unreadable, hashes, labels, sum(tallies, Tally()), notes)


def _faults(place: Place, notes: Notes) -> Iterator[str]:
    """What is wrong with a tar and its index, without a look at its images; what else is worth telling: to `notes`."""
    tar, index = Path(place.tar), Path(place.idx)
    if not tar.is_file():
        yield "there is no such file"
        return
    size, shard = tar.stat().st_size, place.shard
    if shard is not None and size != shard.num_bytes:
        yield f"{size} bytes, but dataset.json lists {shard.num_bytes}: it was changed or cut short"
    if not index.is_file():
        yield "not indexed yet; run `mae-dist data index`"
    with TemporaryDirectory() as folder:
        new = Path(folder) / index.name
        try:
            found = build(tar, new, NO_LABELS)
        except ValueError as error:
            yield str(error).removeprefix(f"{tar}: ")
            return
        notes.update_from(found.notes)
        if shard is not None and size == shard.num_bytes and shard.sha256 not in ("", found.shard.sha256):
            yield "its content is not what it was when dataset.json was written (sha256)"
        if not index.is_file():
            return
        if not os.access(index, os.R_OK):
            yield "its index cannot be read (no permission)"
            return
        rows, wanted = (set(file.read_bytes().splitlines()[1:]) for file in (index, new))
        if rows != wanted:
            differ = f"{len(wanted - rows)} samples of the tar are not in it, {len(rows - wanted)} are not in the tar"
            yield f"its index is not that of this tar ({differ}); run `mae-dist data index` again"
