"""The members of a tar: name, offset and size of each, also of one with links, and of several joined into one.

One pass over the headers; nothing is unpacked. Links within the tar are followed. Tars joined by `cat`, and zeros in
the middle, are read on; what cannot be read is noted. Imports no torch.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mae_dist.errors import from_os_error

COMPRESSED = {
    b"\x1f\x8b": "gzip (gunzip)", b"BZh": "bzip2 (bunzip2)", b"\xfd7zXZ": "xz (unxz)",
    b"\x28\xb5\x2f\xfd": "zstd (unzstd)", b"\x04\x22\x4d\x18": "lz4 (lz4 -d)", b"PK\x03\x04": "zip (unzip, then tar)",
}  # fmt: skip
"""First bytes of a compressed file -> what it is, and what undoes it."""
MOST_LINKS = 40
"""Links that lead to one another."""
MOST_HEADER = 2**20
"""Bytes of a long name, or of a PAX header, in which it may be."""


class _Headers(io.BufferedReader):
    """A tar of which only headers are read, each no longer than MOST_HEADER; HeaderError for a longer one."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return super().read(size)


class Member(NamedTuple):
    """A file in a tar, of which tar of several that were joined: its bytes are `size` bytes at `offset`."""

    name: str
    offset: int
    size: int
    archive: int


class Notes(dict[str, tuple[int, str]]):
    """What is worth telling about tars: sentence -> (how often, the first example)."""

    def add(self, what: str, example: str, count: int = 1) -> None:
        """Count something."""
        before, first = self.get(what, (0, example))
        self[what] = before + count, first

    def update_from(self, other: Notes) -> None:
        """Add the counts of other tars."""
        for what, (count, example) in other.items():
            self.add(what, example, count)


def members(tar: Path, notes: Notes) -> list[Member]:
    """The files in an uncompressed tar, in its order; links to files in it have the bytes of these.

    Raises ValueError when it is no uncompressed tar, is cut short or damaged, and MachineFault when it cannot be read.
    """
    if tar.exists() and not tar.is_file():  # opening a pipe would wait for who writes into it
        raise ValueError(f"{tar}: is no regular file")
    try:
        with _Headers(tar.open("rb", buffering=0)) as stream:
            return _linked(tar, list(_scan(tar, stream, notes)), notes)
    except (tarfile.TarError, RecursionError) as error:
        what = f"not a complete uncompressed tar ({str(error)[:100]}); `mae-dist data pack` makes tars of images"
        raise ValueError(f"{tar}: {what}") from error
    except OSError as error:
        raise from_os_error(error, f"{tar}: cannot be read ({error.strerror or error})") from error


def _scan(tar: Path, stream: _Headers, notes: Notes) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The headers of a tar, each with the number of the joined tar that it is in."""
    size = stream.seek(0, 2)
    stream.seek(0)
    start = stream.read(8)
    if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
        raise ValueError(f"{tar}: compressed with {kind}; samples are read at byte offsets, so uncompress it")
    stream.seek(0)
    try:
        offset, number, ended, archive = 0, 0, False, tarfile.TarFile(fileobj=stream)
    except ValueError as error:  # as below, since it reads the first header, too
        raise tarfile.ReadError(str(error)) from error
    while offset < size:
        stream.seek(offset)
        block = stream.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            offset, ended = _end_of_zeros(stream, offset), True
            continue
        stream.seek(offset)
        try:
            info = tarfile.TarInfo.fromtarfile(archive)
        except (tarfile.HeaderError, ValueError) as error:
            if ended:
                notes.add("a tar has trailing bytes, which are not read", f"{size - offset} bytes in {tar.name}")
                return
            if len(block) < tarfile.BLOCKSIZE:
                raise ValueError(f"{tar}: cut short: it ends in a header at byte {offset}") from error
            raise ValueError(f"{tar}: not a complete uncompressed tar: damaged at byte {offset} ({error})") from error
        if ended:
            number += 1
            notes.add("tars were joined into one, and all are read", f"{tar.name} at byte {offset}")
        if info.size < 0 or archive.offset <= offset:
            raise ValueError(f"{tar}: damaged at byte {offset}: a member of {info.size} bytes")
        end = archive.offset - tarfile.BLOCKSIZE if info.issparse() else info.offset_data + info.size
        if info.isreg() and end > size:
            raise ValueError(f"{tar}: cut short: its last member ends at byte {end}, the file at {size}")
        yield info, number
        offset, ended = archive.offset, False
    if not ended and size:
        notes.add("a tar has no mark at its end and may have been cut short", tar.name)


def _end_of_zeros(stream: _Headers, offset: int) -> int:
    """Where the block begins that has the first byte from `offset` on that is not zero; the end if there is none."""
    stream.seek(offset)
    while chunk := stream.read(MOST_HEADER):
        if rest := chunk.lstrip(b"\0"):
            return (offset + len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(chunk)
    return offset


def _linked(tar: Path, found: list[tuple[tarfile.TarInfo, int]], notes: Notes) -> list[Member]:
    """The files among the headers, and the links with the bytes of the files that they lead to."""
    files = {(k, posixpath.normpath(i.name)): i for i, k in found if i.isreg() and not i.issparse()}
    links = {(k, posixpath.normpath(i.name)): _target(i) for i, k in found if i.issym() or i.islnk()}
    result = []
    for info, number in found:
        name = posixpath.normpath(info.name)
        if info.isdir():
            continue
        for _ in range(MOST_LINKS):
            name = name if (number, name) in files else links.get((number, name), name)
        target = info if info.isreg() and not info.issparse() else files.get((number, name))
        if target is None:
            kind = "sparse members are" if info.issparse() else "links to what is not in their tar, and devices, are"
            notes.add(f"{kind} left out", f"{info.name} in {tar.name}")
            continue
        if target is not info:
            notes.add("links to other members are followed", f"{info.name} in {tar.name}")
        result.append(Member(info.name, target.offset_data, target.size, number))
    return result


def _target(info: tarfile.TarInfo) -> str:
    """The name that a link leads to: that of a symbolic link is relative to its folder."""
    folder = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.normpath(posixpath.join(folder, info.linkname))
