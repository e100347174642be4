"""The index of a tar, x.idx: a line a sample, `extension offset size name` for each member, as DALI's wds2idx v1.2.

Names that DALI cannot read, as they have spaces or line ends, are percent-encoded; the first line says so. A folder's
dataset.json may list a file of labels beside an index (see `labels`). Imports no torch.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from mae_dist.atomic import replacing
from mae_dist.data.shard_files import ChangedError

VERSION, QUOTED = "v1.2", "v1.2-quoted"
"""First word of an index, and of one that DALI does not read."""
SPACES = " \t\n\v\f\r"
AGAIN = "run `mae-dist data index` again"


class Entry(NamedTuple):
    """A member of a sample: its extension as it is written, and where its bytes are."""

    extension: str
    offset: int
    size: int
    name: str


Members = dict[str, Entry]
"""The members of a sample by their extensions in lower case."""


def write(path: Path, samples: Iterable[Members]) -> bool:
    """Write an index, atomically. Whether DALI can read it."""
    rows = [list(members.values()) for members in samples]
    plain = not any(space in entry.name for row in rows for entry in row for space in SPACES)
    lines = [f"{VERSION if plain else QUOTED} {len(rows)}"]
    for row in rows:
        words = ((*e[:3], e.name) if plain else (_quoted(e.extension), *e[1:3], _quoted(e.name)) for e in row)
        lines.append(" ".join(f"{extension} {offset} {size} {name}" for extension, offset, size, name in words))
    with replacing(path) as work:
        work.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
    return plain


def count(path: Path) -> int:
    """The number of samples of an index, from its first line."""
    with path.open("rb") as stream:
        return _head(path, stream.readline(100))[1]


def read(path: Path) -> Iterator[Members]:
    """The samples of an index. Raises ChangedError when it is damaged."""
    first, _, rest = path.read_bytes().partition(b"\n")
    version, expected = _head(path, first)
    lines = rest.decode("utf-8", "surrogateescape").split("\n")
    if lines.pop() != "" or len(lines) != expected:
        raise ChangedError(f"{path}: expected {expected} samples, found {len(lines)}; {AGAIN}")
    for number, line in enumerate(lines):
        words = line.split(" ")
        if version == QUOTED:
            words = [unquote(word, errors="surrogateescape") for word in words]
        try:
            entries = [
                Entry(extension, int(offset), int(size), name)
                for extension, offset, size, name in zip(*(words[k::4] for k in range(4)), strict=True)
            ]
        except ValueError as error:
            raise ChangedError(f"{path}: line {number + 2} is damaged; {AGAIN}") from error
        yield {entry.extension.lower(): entry for entry in entries}


def _quoted(text: str) -> str:
    return quote(text, errors="surrogateescape")


def _head(path: Path, line: bytes) -> tuple[str, int]:
    version, _, number = line.decode("ascii", "replace").strip().partition(" ")
    if version not in (VERSION, QUOTED) or not number.isdigit():
        raise ChangedError(f"{path}: expected an index {VERSION!r}, found {version[:20]!r}; {AGAIN}")
    return version, int(number)
