"""The files below a folder, read to its bottom: images, and what is none, counted by reason. Imports no torch."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mae_dist.errors import from_os_error

log = logging.getLogger(__name__)

AS_THEY_ARE = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "npy")
"""Kinds of files that are stored as they are."""
TO_PNG = ("bmp", "gif", "pbm", "pgm", "pnm", "ppm", "tif", "tiff")
"""Kinds that are stored as PNG, which more programs read, where PNG can hold their pixels (`reencode.as_png`)."""
NOT_READ = (
    "arw", "avif", "cr2", "dcm", "dng", "eps", "exr", "hdr", "heic", "heif", "ico", "j2k", "jp2", "jxl", "nef",
    "psd", "svg", "tga",
)  # fmt: skip
"""Kinds of images that are left out, each counted as an image that could not be packed."""
UNPACK = "unpack archives; write the images in arrays, tables and databases to files, as SOURCE/SPLIT/CLASS/1.png"
"""What to do with files that hold images, and are none."""
LISTS = ("csv", "json", "jsonl", "tsv", "txt")
"""Kinds of files that may hold labels or splits."""
OF_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found")
"""Names (in lower case) of files and folders that operating systems leave behind; hidden ones begin with a dot."""


OFTEN = 10_000
"""Folders after which a search says how far it is."""


class File(NamedTuple):
    """An image file: its path below the folder, a stamp that changes with its content, why it cannot be packed, and
    (device, inode), which files have in common that are links to the same one.
    """

    path: str
    stamp: str = ""
    problem: str = ""
    inode: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """Its extension, in lower case and without the dot."""
        return kind_of(self.path)


@dataclass
class Found:
    """What lies below a folder: the images, sorted by path; all folders; how many other files there are of each kind,
    and which of them may be lists; how many files and folders are hidden or of an operating system; and links that
    lead back.
    """

    files: list[File] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    lists: list[str] = field(default_factory=list)
    num_hidden: int = 0
    loops: list[str] = field(default_factory=list)


def kind_of(path: str) -> str:
    """The extension of a path in lower case, without the dot: '' if it has none."""
    return os.path.splitext(path)[1][1:].lower()


def is_image(path: str) -> bool:
    """Whether a path has the extension of an image."""
    return kind_of(path) in AS_THEY_ARE + TO_PNG + NOT_READ


def find(root: Path, tick: Callable[[int], None] = lambda _: None) -> Found:
    """All files below `root`. Links are followed, unless they lead back to a folder that they lie in. `tick` is called
    with the number of images found so far.

    Raises ValueError for a folder that this user may not read, a link to one that is not there, or the folder of the
    whole machine, and MachineFault where the storage fails.
    """
    if os.path.realpath(root) == "/":
        raise ValueError(f"--source {root}: is the whole machine; name the folder of the images")
    found = Found()
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while todo:
        folder, above = todo.pop()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise from_os_error(error, f"{root / folder}: cannot be read ({error.strerror})") from error
        if (here := (status.st_dev, status.st_ino)) in above:
            found.loops.append(folder)
            continue
        found.folders.append(folder)
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name.lower() in OF_SYSTEMS:
                found.num_hidden += 1
            elif (kept := _look_at(entry, path, found.others)) == "folder":
                todo.append((path, (*above, here)))
            elif isinstance(kept, File):
                found.files.append(kept)
            elif kind_of(path) in LISTS:
                found.lists.append(path)
        if len(found.folders) % OFTEN == 0:
            log.info("%s: %s folders so far, with %s images", root, f"{len(found.folders):,}", f"{len(found.files):,}")
        tick(len(found.files))
    found.files.sort()
    return found


def _look_at(entry: os.DirEntry[str], path: str, others: Counter[str]) -> File | str:
    """The image that an entry is, or 'folder', or 'other', which is counted."""
    try:
        status = entry.stat()
    except OSError as error:
        if not entry.is_symlink():
            raise from_os_error(error, f"{entry.path}: cannot be read ({error.strerror})") from error
        if is_image(path):
            return File(path, problem="broken link")
        if not kind_of(path):
            raise ValueError(f"{entry.path}: a broken link, perhaps to a folder; repair or remove it") from error
        others["broken links"] += 1
        return "other"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    kind = kind_of(path)
    if not is_image(path):
        others[f".{kind}" if kind else "without extension"] += 1
        return "other"
    problem = f".{kind} is not read: convert it to jpg or png" if kind in NOT_READ else ""
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif not status.st_size:
        problem = "empty file"
    return File(path, f"{status.st_size} {status.st_mtime_ns}", problem, (status.st_dev, status.st_ino))
