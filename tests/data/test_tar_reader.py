"""Tars of others: links, joined tars, bytes behind the end, sparse members, odd names; what is no tar is refused."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_dist.data.tar_reader import Notes, members


def tar(path: Path, files: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None, **how: int) -> Path:
    with tarfile.open(path, "w", **how) as archive:  # pyright: ignore
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def read(path: Path) -> tuple[dict[str, bytes], Notes]:
    """The members' bytes by name, with #ARCHIVE where several were joined, and the notes."""
    notes, content = Notes(), path.read_bytes()
    found = members(path, notes)
    names = [f"{m.name}#{m.archive}" if m.archive else m.name for m in found]
    return {name: content[m.offset : m.offset + m.size] for name, m in zip(names, found, strict=True)}, notes


def test_tar_links_have_the_bytes_of_the_files_they_lead_to(tmp_path: Path) -> None:
    links = {
        "hard": (tarfile.LNKTYPE, "d/a"), "d/soft": (tarfile.SYMTYPE, "../d/a"), "chain": (tarfile.SYMTYPE, "d/soft"),
        "gone": (tarfile.SYMTYPE, "nowhere"), "outside": (tarfile.SYMTYPE, "/etc/passwd"),
        "loop": (tarfile.SYMTYPE, "loop"),
    }  # fmt: skip
    found, notes = read(tar(tmp_path / "x.tar", {"./d/a": b"AAA", "b": b"B"}, links))
    assert found == {"./d/a": b"AAA", "b": b"B", "hard": b"AAA", "d/soft": b"AAA", "chain": b"AAA"}
    assert notes == {
        "links to other members are followed": (3, "hard in x.tar"),
        "links to what is not in their tar, and devices, are left out": (3, "gone in x.tar"),
    }


def test_tars_joined_by_cat_and_zeros_in_the_middle_are_read_whole(tmp_path: Path) -> None:
    parts = [tar(tmp_path / name, {"a": name.encode(), "b": b"-"}).read_bytes() for name in ("0", "1")]
    joined = tmp_path / "x.tar"
    for middle in (b"", bytes(512), bytes(3 << 20)):
        joined.write_bytes(parts[0] + middle + parts[1])
        found, notes = read(joined)
        assert found == {"a": b"0", "b": b"-", "a#1": b"1", "b#1": b"-"}
        assert notes == {
            "tars were joined into one, and all are read": (1, f"x.tar at byte {len(parts[0]) + len(middle)}")
        }


def test_tar_trailing_bytes_and_a_missing_end_are_noted(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a": b"A"})
    whole = path.read_bytes()
    path.write_bytes(whole + b"garbage " * 200)
    assert read(path) == ({"a": b"A"}, {"a tar has trailing bytes, which are not read": (1, "1600 bytes in x.tar")})
    path.write_bytes(whole[:1024])
    assert read(path) == ({"a": b"A"}, {"a tar has no mark at its end and may have been cut short": (1, "x.tar")})


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_names_are_read_in_all_formats(tmp_path: Path, how: int) -> None:
    """Spaces, line ends, bytes that are no UTF-8, and names longer than a header holds."""
    names = [
        "a b.png",
        "line\nend.png",
        os.fsdecode(b"caf\xe9.png"),
        "n" * 90 + "/" + "m" * 90 + ".png",
        "u\u2028v.png",
    ]
    names += [] if how == tarfile.USTAR_FORMAT else ["l" * 300 + ".png"]
    found, notes = read(tar(tmp_path / "x.tar", {name: name[:3].encode("utf-8", "surrogateescape") for name in names},
                            format=how))  # fmt: skip
    assert list(found) == names
    assert not notes


def test_tar_sparse_members_are_left_out_and_counted(tmp_path: Path) -> None:
    with (tmp_path / "hole.png").open("wb") as stream:
        stream.truncate(1 << 20)
        stream.write(b"end")
    (tmp_path / "a.png").write_bytes(b"A")
    command = ["tar", "-C", str(tmp_path), "--sparse", "-cf", str(tmp_path / "x.tar"), "hole.png", "a.png"]
    subprocess.run(command, check=True)
    found, notes = read(tmp_path / "x.tar")
    assert found == {"a.png": b"A"}
    assert notes == {"sparse members are left out": (1, "hole.png in x.tar")}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "empty"),
        (lambda _: b"hello" * 1000, "not a complete uncompressed tar"),
        (lambda whole: whole[:700], "cut short: its last member ends at byte 2512"),
        (lambda whole: whole[:2560] + whole[2560:2900], "cut short: it ends in a header at byte 2560"),
        (lambda whole: whole[:100], "not a complete uncompressed tar"),
        (lambda whole: whole[:2560] + b"?" * 512 + whole[3072:], "damaged at byte 2560"),
        (lambda whole: b"\x1f\x8b" + whole, "compressed with gzip .gunzip."),
        (lambda whole: b"\x28\xb5\x2f\xfd" + whole, "compressed with zstd"),
        (lambda whole: b"\xfd7zXZ\0" + whole, "compressed with xz"),
        (lambda whole: b"PK\x03\x04" + whole, "compressed with zip"),
    ],
)
def test_tar_that_is_damaged_or_none_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tar(tmp_path / "x.tar", {"a": bytes(2000), "b": b"B"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"x\.tar: .*{message}"):
        members(path, Notes())


def test_tar_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"x\.tar: is no regular file"):
        members(tmp_path / "x.tar", Notes())


def test_tar_with_hostile_headers_is_refused(tmp_path: Path) -> None:
    """A chain of long names without end, a size below 0, a header beyond all headers, and a map that is none."""
    path = tar(tmp_path / "x.tar", {"a": b"A"})
    whole, info = path.read_bytes(), tarfile.TarInfo("n" * 500)
    info.type, info.size = b"L", 500
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT)[-512:] + b"n" * 500 + bytes(12)) * 2000 + whole)
    with pytest.raises(ValueError, match=r"x\.tar: "):
        members(path, Notes())
    info = tarfile.TarInfo("a")
    info.size = -1024
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + whole)
    with pytest.raises(ValueError, match=r"x\.tar: damaged at byte 0: a member of -1024 bytes"):
        members(path, Notes())
    for key, value, message in (
        ("comment", "n" * 2**20, r"a header of 10\d+ bytes"), ("GNU.sparse.map", "0,,", "invalid literal"),
    ):  # fmt: skip
        info = tarfile.TarInfo("a")
        info.pax_headers = {key: value}
        for before in (b"", tar(tmp_path / "y.tar", {"a": b"A"}).read_bytes()[:1024]):
            path.write_bytes(before + info.tobuf(tarfile.PAX_FORMAT) + whole)
            with pytest.raises(ValueError, match=rf"x\.tar: not a complete uncompressed tar.*{message}"):
                members(path, Notes())
