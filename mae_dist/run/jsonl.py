"""Small files on disk: JSON Lines that stay readable after a kill or on a full disk, and atomic writes. No torch.

The only place that reads, appends to and cuts a .jsonl file. A line counts if it is whole: a JSON object that ends with
a newline. Others, which a kill, a full disk or a bad disk leaves, are skipped. Long files are read from their end, so a
resume at step 10^6 takes no longer than one at step 10.
"""

import io
import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mae_dist.atomic import naming, open_own, replacing, sync, try_lock

Record = dict[str, Any]

STEP, EVALUATION, INTERVAL = "step", "evaluation", "interval"
"""Values of the field `kind` in a metrics.jsonl."""
NUMBERS = ("epoch", "lr", "loss", "loss_scale", "images_per_second", "bad")
"""Fields of a metrics.jsonl that are computed with."""
WAIT_FOR_LOCK = 5.0
"""Seconds that `append` waits for another process; a network file system may keep a dead one's lock for longer."""
_kept = set[Path]()
"""Files that another process has kept locked for so long."""
BLOCK = 2**16
"""Bytes that `backwards` reads at once."""
LONGEST_LINE, LARGEST = 2**24, 2**63
"""Bytes of a line, and the absolute value of a whole number, which a float must be able to hold."""


def parse(line: bytes) -> Record | None:
    """The record in a line with its newline; None for a line that is not whole, or of whose fields one has a value
    that such a record never has.
    """
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_sound(record) else None


def _is_sound(record: Record) -> bool:
    """Whether a record of metrics has a step and numbers, or an event its kind."""
    step = type(record.get("step", 0)) is int
    if any(type(value) is int and abs(value) > LARGEST for value in record.values()):
        return False
    if "kind" in record:
        numbers = all(isinstance(record.get(name, 0), int | float) for name in NUMBERS)
        return step and numbers and "step" in record
    return step and ("event" not in record or isinstance(record["event"], str))


def read(path: Path, most: int | None = None) -> list[Record]:
    """The records of a file, or of its last `most` bytes, oldest first; [] where there is no such file."""
    return read_counting(path, most)[0]


def read_counting(path: Path, most: int | None = None) -> tuple[list[Record], int]:
    """The records of a file, or of its last `most` bytes, and how many lines are damaged. A last line without newline,
    still being written say, does not count as damaged.
    """
    found = [*_records(path, most)]
    return [record for record in found if record is not None], found.count(None)


def _records(path: Path, most: int | None = None) -> Iterator[Record | None]:
    """The records of a file, None for each damaged line; a line beyond LONGEST_LINE is several."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        stream.seek(0 if most is None else max(0, stream.seek(0, os.SEEK_END) - most))
        while line := stream.readline(LONGEST_LINE):
            if (record := parse(line)) is not None or (line[-1:] == b"\n" and line.strip()):
                yield record


class Thinned:
    """Records of a file of any length, in the memory of twice `most`: each is the last of `every` (1, 2, 4, ...) in a
    row, with the unreadable samples (`bad`) of all of them.
    """

    def __init__(self, most: int):
        self.most, self.every = most, 1
        self.kept: list[Record] = []
        self.waiting: list[Record] = []

    def add(self, record: Record) -> None:
        """Add the next record."""
        self.waiting.append(record)
        if len(self.waiting) == self.every:
            self.kept.append(_last(self.waiting))
            self.waiting = []
        if len(self.kept) == 2 * self.most:
            self.kept = [*map(_last, zip(self.kept[::2], self.kept[1::2], strict=True))]
            self.every *= 2

    def records(self) -> list[Record]:
        """The records, in their order; the last one is always there."""
        return [*self.kept, *([_last(self.waiting)] if self.waiting else [])]


def _last(records: Sequence[Record]) -> Record:
    bad = sum(record.get("bad", 0) for record in records)
    return records[-1] | ({"bad": bad} if bad else {})


def read_thinned(path: Path, most: int) -> tuple[list[Record], int, int]:
    """The evaluations, intervals and other records of a metrics.jsonl, then its steps, of each kind at most twice
    `most` (see `Thinned`); how many lines are damaged; and how many steps each of the steps stands for.
    """
    kinds = {kind: Thinned(most) for kind in (EVALUATION, INTERVAL, "", STEP)}
    damaged = 0
    for record in _records(path):
        if record is None:
            damaged += 1
        else:
            kind = record.get("kind")
            kinds[kind if isinstance(kind, str) and kind in kinds else ""].add(record)
    return [record for kept in kinds.values() for record in kept.records()], damaged, kinds[STEP].every


def backwards(path: Path) -> Iterator[Record]:
    """The records in the last LONGEST_LINE bytes of a file, the newest first; none where there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        end, begun = stream.seek(0, os.SEEK_END), b""
        least = max(0, end - LONGEST_LINE)
        while end > least:
            start = max(least, end - BLOCK)
            stream.seek(start)
            lines = io.BytesIO(stream.read(end - start) + begun).readlines()
            begun, end = (lines.pop(0) if start else b""), start
            yield from filter(None, map(parse, reversed(lines)))


def steps(path: Path) -> list[Record]:
    """The training steps in a metrics.jsonl, oldest first."""
    return [record for record in read(path) if record.get("kind") == STEP]


def last_step(path: Path) -> int:
    """The last training step in a metrics.jsonl, read from its end; 0 where there is none."""
    return next((record["step"] for record in backwards(path) if record.get("kind") == STEP), 0)


def records_with(path: Path, key: str) -> list[Record]:
    """The records of a metrics.jsonl that have the field `key`, oldest first; other lines are not parsed."""
    found, word, place = [], f'"{key}": '.encode(), 0
    with _mapped(path) as content:
        while (place := content.find(word, place)) >= 0:
            start, end = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place) + 1 or len(content)
            record = parse(content[start:end])
            if record is not None and key in record and "kind" in record:
                found.append(record)
            place = end
    return found


def append(path: Path, *records: Record) -> None:
    """Append records in one write, on lines of their own even where the last line of the file is torn. Processes that
    append at the same time, also from other machines, wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open_own(path, append=True) as stream:
        _lock(stream, path)
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
        torn = stream.read(1) not in (b"\n", b"")
        stream.write(b"\n" * torn + b"".join(json.dumps(record).encode() + b"\n" for record in records))


def _lock(stream: IO[bytes], path: Path) -> None:
    """Lock a file until it is closed. Goes on without where the file system has no locks, or after WAIT_FOR_LOCK s,
    which are waited for once a file: who may read it can lock it for ever.
    """
    deadline = time.monotonic() + (0 if path in _kept else WAIT_FOR_LOCK)
    while not try_lock(stream):
        if time.monotonic() > deadline:
            _kept.add(path)
            return
        time.sleep(0.01)


def cut_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and damaged lines after the last record that stays.

    Records have a field `step`, which grows; evaluations of one step or an earlier one may follow it. Reads from the
    end as far as needed. What stays is written before the rest goes, so a kill in between loses no record.
    """
    open_own(path).close()
    evaluations: dict[bytes, None] = {}
    with _mapped(path) as content:
        end = size = len(content)
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            line, record = content[start:end], parse(content[start:end])
            if record is not None and record.get("step", math.inf) <= step:
                if record.get("kind") != EVALUATION:  # a step: whatever lies before it is older
                    break
                evaluations[line] = None  # once: an earlier cut may have been killed between its two writes
            end = start
    with open_own(path) as stream:
        stream.seek(end)
        stream.writelines(reversed(evaluations))
        if stream.tell() < size:
            stream.truncate()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file so that readers, also after a kill, find the old content or the new, never a part."""
    with replacing(path) as work, work.open("wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        stream.flush()
        sync(stream.fileno(), path)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, mapped where its file system can."""
    if not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:  # some file systems map no files
            yield stream.read()
            return
        with content:
            yield content
