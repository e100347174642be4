"""The synsets of ImageNet's validation images, from any of the files in which people have them. Imports no torch.

The ground truth of ILSVRC2012 numbers synsets by ILSVRC's own ids, which are no ranks of the synsets sorted by WNID:
only `meta.mat` of the devkit, and `map_clsloc.txt` of later ones, say which synset an id is.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NUMBER = re.compile(r"_val_(\d{8})(?:\.|$)")
"""The number of a validation image in its name: its row in a list without names, counted from 1."""
ROW = re.compile(r"\S*_val_(?P<number>\d{8})[^,\s]*[,\s]+(?P<wnid>n\d{8})\b.*")
"""A row of LOC_val_solution.csv, or of a list like it."""
SYNSET = re.compile(r"(?P<wnid>n\d{8})(?:[,\s]+(?P<id>\d+)(?=\s))?(?:[,\s]+(?P<words>.+))?")
"""A row of a list of synsets: with ids, map_clsloc.txt; with words, LOC_synset_mapping.txt."""
DEVKIT = ("validation_ground_truth.txt", "meta.mat", "map_clsloc.txt")
"""How the names of the files end that are read in a devkit."""
EXPECTED = (
    "expected ILSVRC2012_devkit_t12.tar.gz; or a file with a synset for each image; or "
    "ILSVRC2012_validation_ground_truth.txt and the meta.mat or map_clsloc.txt that belongs to it"
)


@dataclass(frozen=True)
class Truth:
    """The synsets (WNIDs) of validation images by the number in their name, and the words for synsets, if known."""

    by_number: Mapping[int, str]
    names: Mapping[str, str] = field(default_factory=dict)

    def of(self, images: Sequence[str]) -> list[str]:
        """The synset of each of these images, called ILSVRC2012_val_00000001.JPEG and so on. Raises ValueError for
        another name, and where images and labels are not equally many.
        """
        numbers = [int(match[1]) if (match := NUMBER.search(name)) else 0 for name in images]
        if strange := [name for name, number in zip(images, numbers, strict=True) if number not in self.by_number]:
            raise ValueError(
                f"--val: {len(strange)} of {len(images)} images have no label, {strange[0]} first; there are "
                f"{len(self.by_number)} labels, for images called ILSVRC2012_val_00000001.JPEG, ..."
            )
        if len(set(numbers)) < len(self.by_number):
            raise ValueError(f"--val: has {len(set(numbers))} images, but there are {len(self.by_number)} labels")
        return [self.by_number[number] for number in numbers]


def read(files: Sequence[Path]) -> Truth:
    """The truth in a devkit (.tar.gz or its folder), a list of synsets, or the ground truth and a list of synsets with
    ids, in any order; a list with words gives names. Raises ValueError where synsets cannot be known for certain.
    """
    numbers: list[int] = []
    ids: dict[int, str] = {}
    names: dict[str, str] = {}
    by_number: dict[int, str] = {}
    lists: list[list[str]] = []
    for where, content in (pair for file in files for pair in _contents(file)):
        if where.endswith(".mat"):
            ids, names = _meta(where, content)
            continue
        lines = [line.strip() for line in _text(where, content).splitlines() if line.strip()]
        if lines and all(line.isdecimal() for line in lines):
            numbers = [int(line) for line in lines]
        elif len(rows := [row for line in lines if (row := ROW.fullmatch(line))]) >= max(1, len(lines) - 1):
            by_number = {int(row["number"]): row["wnid"] for row in rows}  # a line that fits not is the header
        elif lines and all(synsets := [SYNSET.fullmatch(line) for line in lines]):
            found = [row.groupdict() for row in synsets if row]
            names |= {row["wnid"]: row["words"].replace("_", " ") for row in found if row["words"]}
            if all(row["id"] for row in found):
                ids = {int(row["id"]): row["wnid"] for row in found}
            else:
                lists.append([row["wnid"] for row in found])
        else:
            raise ValueError(f"--val-labels {where}: no list of synsets and no ground truth; {EXPECTED}")
    return Truth(by_number or _by_number(numbers, ids, lists), names)


def _by_number(numbers: list[int], ids: dict[int, str], lists: list[list[str]]) -> dict[int, str]:
    if not numbers:
        if not lists:
            raise ValueError(f"--val-labels: names no synsets of images; {EXPECTED}")
        return dict(enumerate(max(lists, key=len), 1))
    if not ids and (in_order := next((wnids for wnids in lists if wnids != sorted(wnids)), None)):
        ids = dict(enumerate(in_order, 1))
    if not ids:
        raise ValueError(
            f"--val-labels: the ground truth has ILSVRC's ids, which are no ranks of a list sorted by WNID; {EXPECTED}"
        )
    if unknown := set(numbers) - set(ids):
        raise ValueError(f"--val-labels: the ground truth has the id {min(unknown)}, which is the id of no synset")
    return {number: ids[value] for number, value in enumerate(numbers, 1)}


def _contents(file: Path) -> list[tuple[str, bytes]]:
    """Name and content of a file; of a devkit, those of its ground truth and its synsets."""
    try:
        if file.is_dir():
            found = [inner for pattern in DEVKIT for inner in sorted(file.rglob(f"*{pattern}"))]
            return [(str(inner), inner.read_bytes()) for inner in found]
        if not tarfile.is_tarfile(file):
            return [(str(file), file.read_bytes())]
        with tarfile.open(file) as archive:
            members = [m for m in archive if m.isreg() and m.name.endswith(DEVKIT)]
            return [(f"{file}: {m.name}", stream.read()) for m in members if (stream := archive.extractfile(m))]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"--val-labels {file}: not complete ({error}); download it again") from error
    except OSError as error:
        raise ValueError(f"--val-labels {file}: cannot be read ({error.strerror or error})") from error


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--val-labels {where}: is no text; {EXPECTED}") from error


def _meta(where: str, content: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """WNID by id, and words by WNID, from the devkit's meta.mat."""
    try:
        from scipy.io import loadmat  # takes half a second
    except ImportError:
        raise ValueError(
            f"--val-labels {where}: is read by scipy, which is not installed; `pip install scipy`, or give "
            f"LOC_val_solution.csv, a file with a synset for each image, or map_clsloc.txt instead of meta.mat"
        ) from None
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"].reshape(-1)
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in synsets]
    except Exception as error:  # loadmat raises many kinds
        raise ValueError(f"--val-labels {where}: not the meta.mat of ILSVRC2012's devkit ({error})") from error
    return {number: wnid for number, wnid, _ in rows}, {wnid: words for _, wnid, words in rows}
