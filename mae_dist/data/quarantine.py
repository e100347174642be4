"""quarantine.txt: samples that runs leave out of a data set, a line each; it lies beside the indexes of the tars.

    # index   image   reason, between tabs
    train-000003.idx	cat/0123.jpg	image file is truncated

Names are written as in JSON, without its quotes. `mae-dist data check --quarantine` writes it, an editor may. Imports
no torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mae_dist import small_files
from mae_dist.atomic import replacing

FILE = "quarantine.txt"
HEAD = "# samples that runs leave out: index, image and reason, between tabs"


class Line(NamedTuple):
    """A sample that is left out: the file name of its tar's index, the name of its image there, and why."""

    idx: str
    image: str
    reason: str


def read(folder: Path) -> list[Line]:
    """The lines of a folder's file; none where there is no file. Raises ValueError naming a line that is damaged."""
    file = folder / FILE
    if not file.exists():
        return []
    lines, found = small_files.read_text(file, small_files.MOST_LIST).splitlines(), []
    for number, line in enumerate(lines, 1):
        words = line.split("\t")
        if line.strip() and not line.startswith("#"):
            try:
                found.append(Line(words[0], json.loads(f'"{words[1]}"'), " ".join(words[2:])))
            except (IndexError, ValueError):
                message = f"{file}: line {number} is not an index, an image and a reason, between tabs"
                raise ValueError(message) from None
    return found


def add(folder: Path, lines: Iterable[Line]) -> Path:
    """Add samples to a folder's file, which is written whole or not at all; its path."""
    before = read(folder)
    known = {line[:2] for line in before}
    new = [Line(idx, image, " ".join(reason.split())) for idx, image, reason in lines]
    rows = [*before, *(line for line in new if line[:2] not in known)]
    with replacing(folder / FILE) as work:
        texts = (f"{idx}\t{json.dumps(image)[1:-1]}\t{reason}" for idx, image, reason in rows)
        work.write_text("\n".join([HEAD, *texts]) + "\n")
    return folder / FILE
