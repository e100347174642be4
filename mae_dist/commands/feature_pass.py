"""What `embed` and `predict` share: an array for every image of a split, by a trained model, on any number of ranks.

    FOLDER/
      computed.json   what was computed: of which weights and data, how
      parts/          finished parts, see `Features`; removed at the end
      NAME.npy        float32, a row for each sample of the split, in its order; NaN where the image is unreadable

Parts have a fixed number of samples and are computed alike by any rank, so the bytes do not depend on how many there
are, and after a kill the same command computes only what is missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_dist import dist, environment, launcher, parallel, paths, small_files, watchdog
from mae_dist.atomic import remove, replacing, sync
from mae_dist.batch import Batch
from mae_dist.cli import Parser
from mae_dist.data import source_files, split_checks
from mae_dist.data.changes import Changes
from mae_dist.data.features import SHARD, Features
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.loader import open_source
from mae_dist.data.pixels import ChannelsError, Decoding
from mae_dist.run import jsonl
from mae_dist.stages.images import check_first_images
from mae_dist.trained import Trained
from mae_dist.weights import files

FACTS, PARTS = "computed.json", "parts"
LIMIT = 3600.0
"""Seconds without progress, or in which a rank waits for the others, after which a process is ended: a part of one rank
may take minutes on a CPU.
"""
RESTARTS = 3


def parser(verb: str, description: str) -> Parser:
    """The arguments that both verbs have."""
    found = Parser(prog=f"mae-dist {verb}", description=description)
    found.add_argument("run", metavar="RUN", help="run, RUN@STEP, export, or a checkpoint file of others")
    found.add_argument("data", metavar="DATA", help="as data.path: a folder of `mae-dist data`, or indexed tars")
    found.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder; the same command resumes")
    found.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the model (fp32)")
    found.add_argument("--processes", type=_from(1), help="ranks on this machine (default: one per GPU, or one)")
    found.add_argument("--workers", type=_from(0), default=4, help="data loading processes per rank (4)")
    return found


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} or more")
        return int(text)

    return number


def on_ranks(argv: Sequence[str], processes: int | None, work: Callable[[], None]) -> int:
    """Call `work` on each rank that a launcher has started, or start ranks here that run `mae-dist ARGV`; the exit
    status.
    """
    os.environ.update(environment.of_user() | environment.of_ranks(os.environ))
    number = 1 if dist.launched() else launcher.processes_here(processes)
    if number > 1:
        return launcher.spawn([*argv], number, RESTARTS)
    launcher.limit_threads(dist.local_world())
    with watchdog.watching(LIMIT), dist.name_lost_ranks(lambda: f"the work of {argv[0]}"):
        work()
    return 0


def open_data(trained: Trained, data: str, split: str) -> tuple[ShardIndex, Decoding]:
    """The split that is read, and how its images are decoded: for the channels of the model, with the white value that
    the data set was packed with. Raises ValueError where images cannot be read so.
    """
    index = open_split(paths.with_variables(data), split)
    split_checks.refuse_mixed(index, f"DATA={data}")
    settings = trained.config.data
    white = index.dataset.white if index.dataset.is_packed else settings.white
    how = Decoding(settings.channels, white, trained.config.view.exif, settings.max_pixels)
    try:
        check_first_images(index, how)
    except ChannelsError as error:
        raise ValueError(f"DATA={data}: {trained.name} takes images of {settings.channels} channels: {error}") from None
    return index, how


@dataclass(frozen=True)
class Pass:
    """An array of this `shape` for every sample of `index`, in the folder `out`; `facts` says what it is, and the file
    `last`, which is written at the end, that it is finished.
    """

    out: Path
    trained: Trained
    index: ShardIndex
    how: Decoding
    shape: tuple[int, ...]
    facts: dict[str, Any]
    last: str

    @property
    def features(self) -> Features:
        return Features(self.out / PARTS, self.index, self.shape, self.trained.device, SHARD)

    def compute(self, function: Callable[[Tensor], Tensor], precision: str, workers: int) -> bool:
        """Compute what is missing, all ranks together; ``function`` maps images (b, c, h, w) to arrays (b, *shape).
        Whether there is something left to do on this rank: on rank 0, unless all was finished before.
        """
        if not dist.run_on_rank0(self._begin):
            return False
        features, device, changes = self.features, self.trained.device, Changes()

        def rows(batch: Batch) -> Tensor:
            found = function(batch.images).float()
            return found.masked_fill(batch.bad.view(-1, *[1] * len(self.shape)), torch.nan)

        if features.missing():
            quiet = not dist.is_main()
            source = open_source(self.index, device, workers, quiet=quiet, how=self.how, changes=changes)
            with torch.no_grad(), parallel.autocast(precision, device):
                features.fill(source, self.trained.transform.view, rows, dist.rank(), dist.world())
        changes.log_new()
        dist.barrier()
        return dist.is_main()

    def _begin(self) -> bool:
        """Open the folder, or open it again; False where all is finished. Raises ValueError where it holds other files
        or another computation, and where the disk has no room.
        """
        file, facts = self.out / FACTS, self.identity()
        if file.is_file():
            known = small_files.read_json(file)
            differs = [
                f"{name}: {known.get(name)} -> {value}" for name, value in facts.items() if known.get(name) != value
            ]
            if differs:
                raise ValueError(f"--out {self.out}: holds another computation ({'; '.join(differs)}); choose another")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out}: is not empty, and holds nothing that this command has begun")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            named = {"from": self.trained.name, "step": self.trained.step, "model": self.trained.config.model.name}
            jsonl.write_atomic(file, json.dumps(named | facts, indent=1) + "\n")
        if (self.out / self.last).is_file():
            return False
        features = self.features
        if features.folder.is_dir():
            features.remove_leftovers()
        missing = len(features.missing()) / max(1, features.num_shards)
        needed, free = int(features.num_bytes * (1 + missing)), shutil.disk_usage(self.out).free
        if needed > free:
            raise ValueError(
                f"--out {self.out}: takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room"
            )
        return True

    def identity(self) -> dict[str, Any]:
        """All that the arrays depend on, as values of JSON."""
        view, how = self.trained.transform.view, self.how
        facts = {"weights": files.digest(self.trained.source.state), "data": self.index.fingerprint}
        facts |= {"num_samples": len(self.index), "shape": [*self.shape], "image_size": [*view.size]}
        facts |= {"test_crop": view.settings.test_crop, "mean": [*view.mean], "std": [*view.std]}
        return facts | {"channels": how.channels, "white": how.white, "exif": how.upright} | self.facts

    def join(self, name: str) -> None:
        """Write the array of all samples into one file."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.index), *self.shape)}
        features = self.features
        with replacing(self.out / name) as work, work.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)  # pyright: ignore[reportArgumentType]
            for number in range(features.num_shards):
                watchdog.progress()
                stream.write(np.ascontiguousarray(features.arrays(number)[0]).data)
            stream.flush()
            sync(stream.fileno(), self.out / name)

    def samples(self) -> Iterator[tuple[int, int, bool]]:
        """(id, label or -1, whether its image can be read) of each sample."""
        features = self.features
        for number in range(features.num_shards):
            watchdog.progress()
            for sample, (label, bad) in enumerate(features.arrays(number)[1].tolist(), number * features.shard):
                if bad:  # its label is that of the sample in its place
                    label = -1
                    with suppress(ValueError):
                        label = self.index.label(sample)
                yield sample, label, not bad

    def conclude(self) -> None:
        """Remove the parts."""
        if (self.out / PARTS).is_dir():
            remove(self.out / PARTS)

    def place(self, sample: int) -> tuple[str, str, str]:
        """A sample's key, the name of its tar, and the file that it was packed from, empty where that is not known."""
        key, tar = self.index.key(sample), self.index.tars[self.index.locate(sample)[0]]
        return key, tar.name, source_files.read(tar).get(key, "")


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all. Names that are no UTF-8 keep their bytes."""
    with replacing(path) as work, work.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(head)
        table.writerows(rows)
        stream.flush()
        sync(stream.fileno(), path)
