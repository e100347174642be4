"""Writes the tars of a split one after another, each with its index and a note that it is finished. Imports no torch.

In the folder WORK of a packing, `data/` holds tars and indexes, and `finished/` a small JSON file for each tar that is
complete: what a packing has to know to go on behind it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mae_dist.atomic import replacing
from mae_dist.data import index, indexing, labels, source_files
from mae_dist.data.tally import Tally

SHARD_BYTES = 3e9
"""Size of a tar's files from which on the next sample begins another tar."""


@dataclass(frozen=True)
class Finished:
    """A complete tar, the number of the first picture behind it, and the sums over the pictures before that which are
    not in earlier tars. ``label_counts`` is how many of its samples have each label from 0 on.
    """

    shard: index.Shard
    end: int
    tally: Tally
    label_counts: list[int]


class ShardWriter:
    """Context manager that writes the tars {split}-000000.tar, ... behind those that `work` has finished already.

    A tar has at most `shard_size` samples (None: any number) of one group, and ends when it has reached SHARD_BYTES.
    ``finished`` are the complete tars, ``end`` is the number of the first picture behind them. ``num_samples`` counts
    written pictures, and ``bad`` those that are left out, by reason.
    """

    def __init__(self, work: Path, split: str, shard_size: int | None):
        self.work, self.split, self.shard_size = work, split, shard_size
        self.finished = list(_finished(work, split))
        self.end = self.finished[-1].end if self.finished else 0
        self.num_samples = sum(done.shard.num_samples for done in self.finished)
        self.bad = sum((Counter(done.tally.bad) for done in self.finished), Counter[str]())
        self._tar: _Tar | None = None
        self._tally = Tally()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.file.close()

    def write(self, number: int, group: int, key: str, members: dict[str, bytes], tally: Tally, file: str) -> None:
        """Write picture `number` as a sample: `members` are its files by extension, `tally` is that of the picture, and
        ``file`` where it comes from, or empty.
        """
        if self._tar is not None and self._tar.is_full(self.shard_size, group):
            self.finish(number)
        if self._tar is None:
            self._tar = _Tar(self.work / "data" / f"{self.split}-{len(self.finished):06d}.tar", group)
        self._tar.write(key, members)
        self._tar.files += [(key, file)] if file else []
        self._tally += tally
        self.num_samples += 1

    def leave_out(self, tally: Tally) -> None:
        """Count a picture that cannot be packed."""
        self._tally += tally
        self.bad += Counter(tally.bad)

    def finish(self, end: int) -> None:
        """Finish the open tar, if there is one: picture `end` is the first behind it."""
        if self._tar is None:
            return
        path = self._tar.close()
        if self._tar.files:
            source_files.write(path, self._tar.files)
        built = indexing.build(path, path.with_suffix(".idx"))
        done = Finished(built.shard, end, self._tally, labels.counts([built.labels]))
        with replacing(_note(self.work, self.split, len(self.finished))) as note:
            note.write_text(json.dumps(asdict(done)))
        self.finished.append(done)
        self.end, self._tally, self._tar = end, Tally(), None


class _Tar:
    """A tar that is being written."""

    def __init__(self, path: Path, group: int):
        self.path, self.group, self.num_samples, self.num_bytes = path, group, 0, 0
        self.file = path.open("wb")
        self.files: list[tuple[str, str]] = []
        self.archive = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)

    def is_full(self, shard_size: int | None, group: int) -> bool:
        """Whether a sample of this group must go into another tar."""
        too_many = shard_size is not None and self.num_samples >= shard_size
        return too_many or self.num_bytes >= SHARD_BYTES or group != self.group

    def write(self, key: str, members: dict[str, bytes]) -> None:
        for extension, content in sorted(members.items()):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode, member.uname, member.gname = len(content), 0o444, "root", "root"
            self.archive.addfile(member, io.BytesIO(content))
            self.num_bytes += len(content)
        self.num_samples += 1

    def close(self) -> Path:
        """End the tar, and return its path."""
        self.archive.close()
        self.file.close()
        return self.path


def _note(work: Path, split: str, number: int) -> Path:
    return work / "finished" / f"{split}-{number:06d}.json"


def _finished(work: Path, split: str) -> Iterator[Finished]:
    """The complete tars of a split, up to the first that is not complete, or not there as it was written."""
    number = 0
    while (note := _note(work, split, number)).is_file():
        plain = json.loads(note.read_text())
        shard, tally = index.Shard(**plain["shard"]), Tally.from_json(plain["tally"])
        done = Finished(shard, plain["end"], tally, plain["label_counts"])
        tar = work / "data" / done.shard.tar
        if not tar.is_file() or tar.stat().st_size != done.shard.num_bytes:
            return
        yield done
        number += 1
