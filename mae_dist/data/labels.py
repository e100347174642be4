"""Labels of samples, from wherever they stand: .cls members, other members, folders in the tar, or a list in a file.

A label is a class number from 0, or the name of a class, which gets a number when all names are known. Where the labels
are not plain numbers in .cls members, they are kept beside the index as x.labels.npy: int64, one a sample, -1 for none.
Imports no torch.
"""

import functools
import hashlib
import io
import json
import posixpath
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist import small_files
from mae_dist.atomic import replacing
from mae_dist.data.dataset import MOST_CLASSES
from mae_dist.data.idx import AGAIN
from mae_dist.data.shard_files import ChangedError

Label = int | str
NONE = -1
"""The label of a sample that has none."""
NAME = "name"
"""Where --labels says that the class is in the name of an image's file (`class_in_name`)."""
MOST_TEXT = 1000
"""Bytes of a label that is a text."""
MOST_BYTES = 2**24
"""Bytes of a member that holds a label."""
NAMES = ("label", "class", "cls", "target", "category", "class_id", "class_name", "label_id", "y")
"""Names of columns and fields of labels, the best first."""
NUMBER = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?"
NUMBERS = re.compile(rf"{NUMBER}([\s,;|]+{NUMBER})*[\s,;|]*|[-+.]+")
"""Text that is no name of a class, but numbers or a mark: -2, 0.5, 1 2, -. The name 707-320 is one."""
ABSENT = ("", "-1", "nan", "none", "null", "<na>", "na", "n/a", "#n/a")
"""Labels, in lower case, that say that there is none."""


@functools.lru_cache(maxsize=4096)  # classes are fewer than samples
def of_text(content: bytes) -> Label:
    """The class number or name in the content of a member; NONE for what says that there is none. Raises ValueError."""
    short = f"{content[:20]!r}{'...' * (len(content) > 20)}"
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"holds {short}, expected a class number like 7") from error
    if text.lower() in ABSENT:
        return NONE
    if whole := re.fullmatch(r"([0-9]+)\.0+", text):  # as pandas and numpy write numbers of a column of floats
        text = whole[1]
    if re.fullmatch(r"[0-9]+", text):
        if len(text) > 20 or int(text) >= MOST_CLASSES:
            raise ValueError(f"holds {short}, more than the number of any class (below {MOST_CLASSES:,})")
        return int(text)
    if len(text) > 200 or NUMBERS.fullmatch(text) or not text.isprintable() or _is_json(text):
        raise ValueError(f"holds {short}, expected a class number like 7, or a name")
    return text


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object, list or quoted string, which would be a strange name of a class."""
    try:
        return text[0] in '{["' and json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def of_json(content: bytes, field: str) -> Label:
    """The label in a field of a JSON object; a.b is field b of the object a. NONE where there is no such field."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"holds no JSON ({str(error)[:60]})") from error
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return _of_value(value)


def fields_of(content: bytes) -> tuple[str, ...]:
    """The fields of a JSON object, and a.b of those in an object a, that hold a whole number or a text."""
    try:
        plain = json.loads(content)
    except (ValueError, RecursionError):
        return ()
    fields = {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
    inner = {f"{a}.{b}": value for a, b_to in fields.items() if isinstance(b_to, dict) for b, value in b_to.items()}
    return tuple(key for key, value in (fields | inner).items() if type(value) in (int, str))


def level_of(source: str) -> int | None:
    """N of the text `folder:N`: the folder that is the class, 1 for the first, -1 for the last. None for `folder`."""
    _, colon, number = source.partition(":")
    if colon and not re.fullmatch(r"-?[1-9]\d?", number):
        raise ValueError(
            f"--labels {source}: write folder:1 for the first folder, folder:2, ..., or folder:-1 for the last"
        )
    return int(number) if colon else None


def class_in(folders: Sequence[str], level: int) -> str | None:
    """The folder that is the class (see `level_of`) among those above an image; None where there are not so many."""
    place = level - 1 if level > 0 else level
    return folders[place] if -len(folders) <= place < len(folders) else None


def class_in_name(path: str) -> str | None:
    """The class in the name of a file: what is before the number at its end, as in cat.12.jpg; None where that is
    nothing.
    """
    stem = posixpath.splitext(posixpath.basename(path))[0]
    return re.sub(r"[\W_]*\d+\W*$", "", stem) or None


def of_folders(
    folders: Sequence[Sequence[Label]], level: int | None = None, known: Collection[str] = ()
) -> list[list[Label]]:
    """The classes of samples in these folders, of several tars, by `level`; without it the names of the first folders
    that are not common to all, or of the first that are all ``known`` classes; of a single folder, its own name.
    """
    every = sorted({folder for tar in folders for folder in tar if isinstance(folder, str)})
    if level is None and every:
        common = posixpath.dirname(every[0]) if len(every) == 1 else posixpath.commonpath(every)
        first = len(common.split("/")) + 1 if common else 1
        depths = range(1, 2 + max(folder.count("/") for folder in every))
        level = next((d for d in depths if {class_in(f.split("/"), d) for f in every}.issubset(known)), first)
    names = {folder: class_in(folder.split("/"), level or 1) or NONE for folder in every}
    return [[names[folder] if isinstance(folder, str) else NONE for folder in tar] for tar in folders]


def of_npy(content: bytes) -> Label:
    """The label in an array: one whole number, or a one-hot vector."""
    array = _array(content)
    if array.size == 1:
        return _of_value(array.item())
    if array.ndim == 1 and np.count_nonzero(array) == 1 and array.max() == 1:
        return int(array.argmax())
    raise ValueError(f"holds an array of shape {array.shape}, expected one number or a one-hot vector")


def names_of_file(path: Path) -> dict[str, int]:
    """Class name -> number, from a list of a name a line, or a JSON list or object (name to number, or the reverse).

    Of a line with several words the first is a name too, as in ImageNet's `n01440764 tench, Tinca tinca`. Numbers that
    count the lines, before or behind the names, are no part of them.
    """
    try:
        text = small_files.read_text(path, small_files.MOST_LIST)
    except ValueError as error:
        raise ValueError(f"--classes {error}") from error
    if text.lstrip()[:1] in ("{", "["):
        plain = _json_of(path, text)
        plain = dict(enumerate(plain)) if isinstance(plain, list) else plain
        pairs = [(key, value) if isinstance(value, int) else (value, key) for key, value in plain.items()]
    else:
        pairs = [(name, number) for number, name in enumerate(_without_numbers(text.splitlines()))]
    try:
        names = {str(name[0] if isinstance(name, list) else name): int(number) for name, number in pairs}
        if sorted(names.values()) != list(range(len(names))):
            raise ValueError("its numbers do not go from 0 without a gap")
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"--classes {path}: no list of class names ({str(error)[:80]})") from error
    return names


def _without_numbers(lines: Sequence[str]) -> list[str]:
    """The names in lines, without numbers that count them, from 0 or 1, in their first or last words."""
    lines = [line.strip() for line in lines if line.strip()]
    counted = [[*map(str, range(first, first + len(lines)))] for first in (0, 1)]
    for form in (r"(?P<number>\d+)[\s,:]+(?P<name>.*)", r"(?P<name>.*?)[\s,:]+(?P<number>\d+)"):
        rows = [*filter(None, (re.fullmatch(form, line) for line in lines))]
        if [row["number"] for row in rows] in counted and len({row["name"] for row in rows}) == len(lines):
            return [row["name"] for row in rows]
    return lines


def numbered(
    labels: Sequence[Sequence[Label]], known: dict[str, int] | None, fixed: bool
) -> tuple[list[np.ndarray], list[str] | None]:
    """The labels of several tars as numbers, int64, and the class names, if they have any.

    Names have the numbers that are ``known``; others, unless those are ``fixed``, the next ones in alphabetical order.
    Raises ValueError where some labels are names and others numbers.
    """
    every = {label for tar in labels for label in tar if label != NONE}
    names = sorted(label for label in every if isinstance(label, str))
    if not names:
        if known is not None and (beyond := [label for label in every if label >= len(known)]):  # pyright: ignore
            raise ValueError(f"label {beyond[0]} is none of the {len(known)} classes")
        return [np.array(tar, dtype=np.int64) for tar in labels], None if known is None else list(known)
    if len(names) < len(every):
        number = next(label for label in every if not isinstance(label, str))
        raise ValueError(f"some labels are names ({names[0]!r}) and some numbers ({number}); give one of them")
    mapping = dict(known or {})
    if fixed and (unknown := [name for name in names if name not in _with_first_words(mapping)]):
        raise ValueError(f"class {unknown[0]!r} is none of the {len(mapping)} known ones")
    lookup = _with_first_words(mapping)
    for name in names:
        if name not in lookup:
            lookup[name] = mapping[name] = len(mapping)
    values = [[label if isinstance(label, int) else lookup[label] for label in tar] for tar in labels]
    return [np.array(tar, dtype=np.int64) for tar in values], sorted(mapping, key=mapping.__getitem__)


def counts(labels: Sequence[Sequence[Any] | np.ndarray]) -> list[int]:
    """How many samples have each label from 0 on, over several tars."""
    every = np.concatenate([np.asarray(tar, dtype=np.int64) for tar in labels] or [np.zeros(0, dtype=np.int64)])
    return np.bincount(every[every >= 0]).tolist()


def file_of(index: Path) -> Path:
    """The file of labels beside an index."""
    return index.with_suffix(".labels.npy")


def write(index: Path, labels: np.ndarray) -> str:
    """Write the file of labels beside an index, atomically; return its hash."""
    stream = io.BytesIO()
    np.save(stream, labels.astype("<i8"))
    with replacing(file_of(index)) as work:
        work.write_bytes(stream.getvalue())
    return _hash(stream.getvalue())


def read(index: Path, expected: str, number: int) -> np.ndarray:
    """The labels beside an index of a `number` of samples, int64 (n,). Raises ChangedError when they have another hash,
    or are none.
    """
    path = file_of(index)
    content = path.read_bytes() if path.is_file() else b""
    if _hash(content) != expected:
        raise ChangedError(f"{path}: not the labels that dataset.json speaks of; {AGAIN}")
    array = _array(content)
    if array.shape != (number,) or array.dtype != np.int64:
        raise ChangedError(f"{path}: is of {array.dtype} {array.shape}, not a label a sample ({number}); {AGAIN}")
    return array


def _array(content: bytes) -> np.ndarray:
    """The array in a .npy file. Raises ValueError where there is none: a parser of Python's reads the header, and may
    raise anything.
    """
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise ValueError(f"holds no array ({str(error)[:60]})") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _with_first_words(mapping: dict[str, int]) -> dict[str, int]:
    return {name.split(maxsplit=1)[0]: number for name, number in mapping.items() if name} | mapping


def _of_value(value: Any) -> Label:
    if value is None:
        return NONE
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"holds {str(value)[:20]!r}, expected a class number like 7, or a name")
    return of_text(str(value).encode("utf-8", "surrogateescape"))


def _json_of(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({str(error)[:60]})") from error
