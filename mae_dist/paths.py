"""What the text of a path means: `~` and variables, lists, webdataset's `::`, braces, patterns and URLs.

    [A, B]              several data sets: the parts of the text (`parts`); quotes hold an A that has a comma
    A::B                one data set from several places
    x-{000..146}.tar    braces as in a shell: {a,b}, {1..9}
    A/**/x-*.tar        patterns as in `glob`; ** is any number of folders
    ~/x, $VAR/x         in a setting (`with_variables`)

A name that exists as it stands is never read in another way. Imports no torch.
"""

import glob
import math
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from mae_dist.errors import from_os_error

MOST_FOLDERS = 10_000
"""Folders in which tars are looked for: more are not a data set, but a disk."""
MOST_NAMES = 1_000_000
"""Names that one text may have braces for."""
HOME = re.compile(r"(^|::|=|[\[,]\s*)(~[\w.-]*)(?=/|::|[,\]]|$)")
VARIABLE = re.compile(r"\$(\w+)")
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
ELEMENT = re.compile(r"""(?:"[^"]*"|'[^']*'|\{(?:[^{}]|\{[^{}]*\})*\}|[^,])+""")
BESIDE_TARS = (".idx", ".json", ".npy", ".resident", ".lock", ".png", ".txt", ".md", ".csv", ".yaml")
"""Ends of names that a pattern does not mean, as they lie beside tars."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
"""Ends of names of compressed tars."""
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""Words in the names of tars -> the split that they are of."""


def with_variables(text: str) -> str:
    """Replace ~ where a path begins, and $VAR, as a shell does, but in names that exist as they stand. Raises
    ValueError for an unknown variable.
    """
    names = [name for part in parts(text) for name in (part, *_pieces(part)) if "$" in name or "~" in name]
    kept = "|".join(re.escape(name) for name in names if os.path.exists(name))
    pieces = re.split(f"({kept})", text) if kept else [text]
    return "".join(piece if number % 2 else _with_variables(piece) for number, piece in enumerate(pieces))


def _with_variables(text: str) -> str:
    if unknown := [name for name in VARIABLE.findall(text) if name not in os.environ]:
        raise ValueError(f"the environment has no variable {unknown[0]}; set it, or write the path out")
    text = HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), text)
    return VARIABLE.sub(lambda found: os.environ[found[1]], text)


def parts(text: str) -> list[str]:
    """The elements of a list `[A, B]`; any other text is one part."""
    if not (text.startswith("[") and text.endswith("]")) or os.path.exists(text):
        return [text]
    elements = (element.strip() for element in ELEMENT.findall(text[1:-1]))
    return [re.sub(r"""^(["'])(.*)\1$""", r"\2", element) for element in elements if element]


def listed(elements: list[str]) -> str:
    """The text of which these are the `parts`."""
    quoted = [f'"{element}"' if len(ELEMENT.findall(element)) > 1 else element for element in elements]
    return quoted[0] if len(quoted) == 1 and parts(quoted[0]) == elements else f"[{', '.join(quoted)}]"


def absolute(text: str) -> str:
    """The text with absolute paths. URLs stay."""
    pieces = [[piece if is_url(piece) else str(Path(piece).absolute()) for piece in _pieces(p)] for p in parts(text)]
    return listed(["::".join(part) for part in pieces])


def is_url(name: str) -> bool:
    """Whether a name is that of a file elsewhere, such as s3://bucket/x.tar."""
    return "://" in name and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def names(part: str) -> list[str]:
    """The existing files and folders, and the URLs, that a part names: places and braces in their order, the matches
    of a pattern sorted. Raises ValueError for what is not there.
    """
    return [name for piece in _pieces(part) for name in _names(piece)]


def tars_in(folder: str, one_split: bool = True) -> list[str]:
    """The tars of a folder and its subfolders, sorted. ValueError when there are none, or those of several splits where
    ``one_split`` is asked for, a compressed one, a folder that may not be read, or more than MOST_FOLDERS.
    """
    found = sorted(_tars_below(folder))
    if packed := next((tar for tar in found if not tar.lower().endswith(".tar")), None):
        raise ValueError(f"{packed}: is compressed; uncompress it, or name the tars to read, like '{folder}/*.tar'")
    if not found:
        raise ValueError(f"{folder}: no tars there; of a folder of images `mae-dist data pack folder` makes some")
    splits = splits_in([os.path.relpath(tar, folder) for tar in found])
    if one_split and len(splits) > 1:
        raise ValueError(
            f"{folder}: holds tars of several splits ({', '.join(splits)}); name those of one, for example "
            f"'{folder}/**/*{splits[0]}*.tar'"
        )
    return found


def _tars_below(top: str) -> Iterator[str]:
    """The tars below a folder, compressed ones too."""
    for folder, entries in _folders_below(top):
        for entry in entries:
            if entry.name.lower().endswith((".tar", *COMPRESSED)) and not entry.is_dir():
                yield os.path.join(folder, entry.name)


def _folders_below(top: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """A folder and all below it, with what is in each; hidden ones are left out, and those of links are read once.
    Raises ValueError for one that may not be read, and where there are more than MOST_FOLDERS.
    """
    todo, seen = [top], set[tuple[int, int]]()
    while todo:
        folder = todo.pop()
        try:
            status = os.stat(folder)
            entries = [] if (status.st_dev, status.st_ino) in seen else [*os.scandir(folder)]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise from_os_error(error, f"{folder}: cannot be read ({error.strerror})") from error
        seen.add((status.st_dev, status.st_ino))
        if len(seen) > MOST_FOLDERS:
            raise ValueError(
                f"{top}: has more than {MOST_FOLDERS:,} folders; name tars, like {os.path.join(top, 'x-*.tar')}"
            )
        kept = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "lost+found"]
        yield folder, kept
        todo += [os.path.join(folder, entry.name) for entry in kept if entry.is_dir()]


def splits_of(text: str) -> list[str]:
    """The splits (train, val, test) that a text speaks of, in its order."""
    return [SPLITS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in SPLITS]


def splits_in(tars: list[str]) -> list[str]:
    """The splits that the names of tars speak of, each once; of several in a name the last."""
    return list(dict.fromkeys(found[-1] for tar in tars if (found := splits_of(tar))))


def _pieces(part: str) -> list[str]:
    return [part] if os.path.exists(part) else re.split(r"::(?![^\[/]*\])", part)  # not within http://[::1]/


def _names(piece: str) -> list[str]:
    if os.path.exists(piece):
        return [piece]
    if piece.startswith("pipe:"):
        raise ValueError(f"{piece}: commands are not run; name files")
    ranges = (abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(piece))
    try:
        few = math.prod(ranges) <= MOST_NAMES  # braceexpand makes all of a range at once
        expanded = list(islice(braceexpand(piece), MOST_NAMES + 1)) if few else []
    except ValueError:  # unbalanced braces
        few, expanded = True, [piece]
    if not few or len(expanded) > MOST_NAMES:
        raise ValueError(f"{piece}: its braces stand for more than {MOST_NAMES:,} names")
    found = [[name] if is_url(name) or os.path.exists(name) else _matches(name) for name in expanded]
    if missing := [name for name, matches in zip(expanded, found, strict=True) if not matches]:
        what = "no file matches" if glob.has_magic(missing[0]) else "no such folder or file"
        what = "its brackets do not match; write [A, B]" if piece.count("[") != piece.count("]") else what
        more = f" ({len(missing)} of {len(expanded)} names are missing)" if len(expanded) > 1 else ""
        raise ValueError(f"{missing[0]}: {what}{more}")
    return [name for matches in found for name in matches]


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    pattern = re.sub(r"(?<![^/])(\*\*/)+", "**/", f"{pattern}/*.tar" if pattern.endswith("**") else pattern)
    return sorted({name for name in _glob(pattern) if not name.lower().endswith(BESIDE_TARS)})


def _glob(pattern: str) -> Iterator[str]:
    """The matches of a pattern, in which ** is any number of folders, as `_folders_below` finds them."""
    found = re.fullmatch(r"(?:(.*?)/)?\*\*/(.*)", pattern)
    if found is None:
        yield from glob.iglob(pattern)
        return
    top, rest = found.groups()
    for start in [os.curdir if top is None else "/"] if not top else glob.iglob(top):
        for folder, _ in _folders_below(start) if os.path.isdir(start) else ():
            below = os.path.join("" if folder == os.curdir else glob.escape(folder.removeprefix("./")), rest)
            yield from _glob(below)
