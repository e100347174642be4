"""Seeded damage to files of all kinds: bytes, words of texts, nodes of JSON and YAML, members of archives."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, -(2**63), 1e308, float("nan"), float("inf"), 1e-300, 0.5, "", "x", [],
    {}, [[]], "${oc.env:HOME}", "???", "a\nb", "\x1b[2J", "<b>", "é" * 300, "9" * 5000, "../../../etc/passwd",
    "/etc/passwd", "/dev/zero", "-1", "nan", [1, 2, 3], {"a": {"b": 1}}, ["a", None], "x" * 100_000, "%s%n{0}", "~root",
    "a::b", "{1..99999999}", "**", "\ud800",
]  # fmt: skip
"""Values that are put in the place of one in JSON, YAML or a header."""
WORDS = [
    b"-1", b"0", b"99999999999999999999999", b"1e400", b"nan", b"null", b"[", b"}", b"\x00", b"\xff\xfe", b"\r", b"\n",
    b"../", b"/", b"?" * 3, b"${x}", b"!!python/object/apply:os.system [id]", b"&a [*a]", b"\x1b]0;t\x07", b"[" * 5000,
    b"1" * 5000, b"=", b":", b"- ", b"'", b'"', b"\xc3\xa9", b" ", b"\t",
]  # fmt: skip
"""Pieces that are put into texts."""


def mutated(content: bytes, name: str, chance: random.Random) -> bytes:
    """Another content for a file of this name."""
    kinds: list[Callable[[bytes, random.Random], bytes]] = [flipped, flipped, cut, overwritten, inserted, doubled]
    if name.endswith((".json", ".jsonl", ".yaml", ".csv", ".txt", ".idx", ".cls")):
        kinds += [worded, worded, worded]
    if name.endswith((".json", ".jsonl", ".yaml")):
        kinds += [lambda c, r: restructured(c, name, r)] * 6
    if name.endswith(".safetensors"):
        kinds += [reheaded] * 6
    if name.endswith((".tar", ".tar.gz", ".pth", ".npz")):
        kinds += [lambda c, r: repacked(c, name, r)] * 6
    if name.endswith(".npy"):
        kinds += [worded, worded]
    return chance.choice(kinds)(content, chance)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit changed."""
    if not content:
        return b"\x01"
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    """Cut short, often to nothing."""
    return content[: chance.choice([0, 1, chance.randrange(len(content) + 1)])]


def overwritten(content: bytes, chance: random.Random) -> bytes:
    """A block of noise, zeros or 255 in the place of another."""
    start, size = chance.randrange(len(content) + 1), chance.choice([1, 8, 64, 512])
    block = chance.choice([bytes(size), b"\xff" * size, chance.randbytes(size)])
    return content[:start] + block + content[start + size :]


def inserted(content: bytes, chance: random.Random) -> bytes:
    """A block more."""
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.randbytes(chance.choice([1, 7, 512])) + content[start:]


def doubled(content: bytes, chance: random.Random) -> bytes:
    """A piece twice, or once less."""
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:b] + content[a:] if chance.random() < 0.5 else content[:a] + content[b:]


def worded(content: bytes, chance: random.Random) -> bytes:
    """A hostile word in a text, in the place of a piece or between two."""
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.choice(WORDS) + content[start + chance.choice([0, 1, 5]) :]


def restructured(content: bytes, name: str, chance: random.Random) -> bytes:
    """JSON, JSON Lines or YAML in which a node is hostile, gone, or new."""
    if name.endswith(".jsonl"):
        lines = content.splitlines() or [b"{}"]
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(changed(json.loads(lines[number]), chance)).encode()
        return b"\n".join(lines) + b"\n"
    if name.endswith(".json"):
        return json.dumps(changed(json.loads(content), chance)).encode()
    return yaml.safe_dump(changed(yaml.safe_load(content), chance), sort_keys=False).encode("utf-8", "replace")


def changed(plain: Any, chance: random.Random) -> Any:
    """A JSON value in which one node is replaced, removed, doubled or put deeper."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        for key in keys:
            places.append((node, key))
            collect(node[key])

    collect(plain)
    if not places or chance.random() < 0.03:
        return chance.choice(HOSTILE)
    node, key = chance.choice(places)
    action = chance.randrange(10)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[chance.choice(["", "x", "a\nb", "__class__", "é"])] = node[key]
    elif action == 1:
        node.insert(key, node[key])
    elif action == 2:
        node[key] = [node[key]]
    elif action == 3 and isinstance(node[key], int | float):
        node[key] = node[key] * chance.choice([-1, 2, 1000, 10**9]) + chance.choice([0, 1])
    else:
        node[key] = chance.choice(HOSTILE)
    return plain


def reheaded(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, whose length fits."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(changed(json.loads(content[8 : 8 + length]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def repacked(content: bytes, name: str, chance: random.Random) -> bytes:
    """An archive, whole in itself, with a member that is damaged, renamed, removed, doubled or of another kind."""
    if name.endswith((".pth", ".npz")):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        stream = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
            warnings.simplefilter("ignore")
            for member, data in _changed_members(members, chance):
                archive.writestr(member, data)
        return stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive if info.isreg()]  # pyright: ignore
    stream, odd = io.BytesIO(), chance.randrange(3 * len(members))
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, (member, data) in enumerate(_changed_members(members, chance)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            if number == odd:
                info.type = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
                info.size, info.linkname = 0, chance.choice(["/etc/passwd", member, "../x", members[0][0]])
            archive.addfile(info, io.BytesIO(data) if info.size else None)
    return gzip.compress(stream.getvalue(), 1) if name.endswith(".gz") else stream.getvalue()


def _changed_members(members: list[tuple[str, bytes]], chance: random.Random) -> list[tuple[str, bytes]]:
    number, action = chance.randrange(len(members)), chance.randrange(8)
    name, data = members[number]
    if action == 0:
        members.pop(number)
    elif action == 1:
        members.insert(number, members[number])
    elif action == 2:
        end = Path(name).suffix
        odd = ["../../up" + end, "/abs" + end, "a" * 200 + end, "a b\t" + end, "é" + end, ".", "a..b" + end, "x/" * 90]
        members[number] = chance.choice(odd), data
    elif action == 3:
        pieces = [b"", b"9" * 30, b"-1", b"\xff" * 10, b"[" * 10_000, b"\x93NUMPY\x01\x00\xff\xff", b"%!PS-Adobe-3.0\n"]
        members[number] = name, chance.choice(pieces)
    else:
        members[number] = name, mutated(data, name if not name.endswith((".tar", ".pkl")) else "x", chance)
    return members
