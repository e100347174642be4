"""`python tests/bit_flips.py [--flips N] [--seed S] [--only TEXT]`: single bits of a run's folder, of a data set and of
an export of each format changed, N of each, and what comes of them.

Found: a verb that looks at it (see SUBJECTS) refuses it, or prints something else, up to numbers. Harmless: all that
mae_dist reads of it (tensors, records, settings, pixels, samples) is equal. Silent are the others, listed with their
file. The file is drawn first, each as often, since most bytes are those of a few.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).parents[1]))

import numpy as np
import torch
import yaml
from fuzz import check, run, words
from fuzz_inputs import make
from fuzz_mutations import flipped
from PIL import Image
from safetensors.torch import load_file

from mae_dist.data import index
from mae_dist.data.dataset import Dataset
from mae_dist.errors import MachineFault


class Subject(NamedTuple):
    """What has its bits changed: a file or a folder, the verbs that look at it, and what mae_dist reads of it, or of
    what these verbs have made of it.
    """

    name: str
    finders: tuple[str, ...]
    content: Callable[[Path], Any]


def samples(folder: Path) -> Any:
    """All samples of a data set, and what is known of them together."""
    dataset = Dataset.load(folder / "data")
    splits = {name: index.open_split(str(folder / "data"), name) for name in dataset.splits}
    read = {name: [astuple(split.read(number)) for number in range(len(split))] for name, split in splits.items()}
    return read, str(replace(dataset, splits={}))


def records(folder: Path) -> Any:
    """What the files of the runs in a folder hold; of checkpoints the tensors."""
    return {
        str(f.relative_to(folder)): _record(f) for f in sorted(folder.rglob("*")) if f.is_file() and f.name[0] != "."
    }


def _record(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    if file.suffix == ".png":
        return np.asarray(Image.open(file)).tobytes()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return yaml.safe_load(file.read_text()) if file.suffix in (".yaml", ".json") else file.read_bytes()


def imported(folder: Path) -> Any:
    """Weights and settings of the run that `import` has made."""
    made = folder / "new"
    tensors = {name: _record(made / name) for name in map(str, made.rglob("*.safetensors"))}
    return {Path(name).name: tensor for name, tensor in tensors.items()}, (made / "config.yaml").read_text()


LOOKING = ("ckpt verify run", "report run", "runs .", "logs run")
EXPORTS = {"timm": "ex.pth", "fb": "fb.pth", "npz": "ex.npz", "hf": "hf", "safetensors": "st"}
SUBJECTS = [
    Subject("run", LOOKING, records),
    Subject("data", ("data check data --workers 1",), samples),
    *(Subject(name, (f"import {name} --out new",), imported) for name in EXPORTS.values()),
]


class Flip(NamedTuple):
    """A changed bit: whose, in which file, at which byte, and what came of it: found, harmless or silent."""

    subject: str
    file: str
    byte: int
    ending: str


def flips(seed: int, number: int, only: Sequence[str] = ("",)) -> Iterator[Flip]:
    """Change `number` bits of each subject whose name contains one of these texts, one at a time."""
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    with TemporaryDirectory(prefix="flips-") as place:
        good, copy = Path(place) / "good", Path(place) / "copy"
        good.mkdir()
        make(good, {*EXPORTS.values()}, lambda argv: check(argv, run(argv, good)))
        for subject in SUBJECTS:
            if any(text in subject.name for text in only):
                usual = _looked_at(subject, good, copy)
                assert None not in usual, f"{subject.name} is not whole: {usual}"
                files = sorted(f for f in [good / subject.name, *(good / subject.name).rglob("*")] if f.is_file())
                chance = random.Random(f"{seed} {subject.name}")
                for _ in range(number):
                    file = chance.choice([file for file in files if file.stat().st_size])
                    before = file.read_bytes()
                    changed = flipped(before, chance)
                    byte = next(n for n, (a, b) in enumerate(zip(before, changed, strict=True)) if a != b)
                    printed, content = _looked_at(subject, good, copy, file, changed)
                    ending = "found" if printed != usual[0] else "harmless" if content == usual[1] else "silent"
                    yield Flip(subject.name, str(file.relative_to(good)), byte, ending)


def _looked_at(subject: Subject, good: Path, copy: Path, file: Path | None = None, changed: bytes = b"") -> Any:
    """(What the finders print, None where they refuse; the content, None where nothing can be read) of a copy in which
    a file is changed.
    """
    copy.mkdir()
    try:
        (shutil.copytree if (good / subject.name).is_dir() else shutil.copy2)(good / subject.name, copy / subject.name)
        if file is not None:
            (copy / file.relative_to(good)).write_bytes(changed)
        ended = [run(argv.split(), copy) for argv in subject.finders]
        printed = None if any(end.status for end in ended) else [words(end.output) for end in ended]
        try:
            return printed, subject.content(copy)
        except (ValueError, OSError, MachineFault, yaml.YAMLError):
            return printed, None
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def main() -> int:
    """Change bits, list those that nothing finds and that change what is read, and count all."""
    parser = argparse.ArgumentParser(description="Change single bits.")
    parser.add_argument("--flips", type=int, default=50, help="bits of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="subjects whose names contain one of these texts")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    for flip in flips(arguments.seed, arguments.flips, arguments.only):
        counts[flip.subject, flip.ending] += 1
        if flip.ending == "silent":
            print(f"silent: byte {flip.byte:,} of {flip.file}", flush=True)
    for subject in SUBJECTS:
        print(f"{subject.name:8s}", {kind: count for (name, kind), count in counts.items() if name == subject.name})
    return 0


if __name__ == "__main__":
    sys.exit(main())
