"""Features of a split, computed once and kept on disk: a source of batches like those of `loader`.

    FOLDER/
      00000.npy          features of SHARD samples, float32 (n, width); mapped into memory, not read
      00000.labels.npy   their labels and whether they are bad, int64 (n, 2); written first
      .00000.npy         one that is being written

Shards are of a fixed number of samples and computed in fixed pieces, so that their bits depend on neither the number of
ranks nor on who computes them; a shard is whole or not there, so that a start after a kill goes on. Knows no model: it
is given a function from images to features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

from mae_dist.batch import Batch
from mae_dist.data.index import ShardIndex
from mae_dist.data.loader import Plan, Source
from mae_dist.data.views import View
from mae_dist.dist import RankError

SHARD = 512
"""Samples a shard."""
PIECE = 256
"""Samples that are computed at once."""


class Features:
    """The features of a split, `width` numbers a sample, in `folder`, given on `device`."""

    def __init__(self, folder: Path, index: ShardIndex, width: int, device: torch.device, shard: int = SHARD):
        self.folder, self.index, self.width, self.device, self.shard = folder, index, width, device, shard
        self.num_shards = -(-len(index) // shard)
        self.open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_bytes(self) -> int:
        """What all features take on disk."""
        return len(self.index) * self.width * 4

    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        return [number for number in range(self.num_shards) if not self._whole(number)]

    def fill(
        self, source: Source, view: View, compute: Callable[[Tensor], Tensor], rank: int = 0, world: int = 1
    ) -> None:
        """Compute this rank's part of what is missing, with a bar on rank 0.

        Raises RankError where a feature is not finite or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = [number for number in self.missing() if number % world == rank]
        batches = source.batches(((np.zeros_like(ids), ids) for n in mine for ids in self._pieces(n)), view)
        quiet = rank > 0 or not sys.stderr.isatty()
        for number in track(mine, "computing features", disable=quiet, transient=True):
            parts = [next(batches) for _ in self._pieces(number)]
            values = torch.cat([compute(part.images).float() for part in parts])
            if not (finite := values.isfinite().all(1)).all():
                first = number * self.shard + int((~finite).nonzero()[0])
                raise RankError(
                    f"{self.index.describe(first)}: its features are not finite; try train.precision=fp32, or look at "
                    f"the run that init_from= names"
                )
            facts = torch.cat([torch.stack([part.labels, part.bad.long()], 1) for part in parts])
            try:
                self._write(f"{number:05d}.labels.npy", facts.cpu().numpy())
                self._write(f"{number:05d}.npy", values.cpu().numpy())
            except OSError as error:
                raise RankError(
                    f"{self.folder}: features cannot be written ({error.strerror or error}); make room, the same "
                    f"command goes on"
                ) from None

    def batches(self, plan: Plan, view: View) -> Iterator[Batch]:  # noqa: ARG002  (the one that they were computed in)
        """The batches of a plan, in its order, with features in the place of images."""
        for epochs, ids in plan:
            values, facts = self._gather(ids)
            where = torch.from_numpy(ids)
            batch = Batch(values, facts[:, 0], where, torch.from_numpy(epochs), facts[:, 1].bool())
            yield Batch(*(part.to(self.device) for part in batch))

    def _gather(self, ids: np.ndarray) -> tuple[Float[Tensor, "b width"], Int[Tensor, "b 2"]]:
        values, facts = np.empty((len(ids), self.width), dtype=np.float32), np.empty((len(ids), 2), dtype=np.int64)
        shards = ids // self.shard
        for number in np.unique(shards):
            if number not in self.open:
                self.open[number] = self._load(f"{number:05d}.npy"), self._load(f"{number:05d}.labels.npy")
            here = shards == number
            rows = ids[here] - number * self.shard
            values[here], facts[here] = (part[rows] for part in self.open[number])
        return torch.from_numpy(values), torch.from_numpy(facts)

    def _ids(self, number: int) -> np.ndarray:
        return np.arange(number * self.shard, min((number + 1) * self.shard, len(self.index)), dtype=np.int64)

    def _pieces(self, number: int) -> list[np.ndarray]:
        ids = self._ids(number)
        return [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)]

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)

    def _whole(self, number: int) -> bool:
        try:
            shapes = [self._load(f"{number:05d}{end}").shape for end in (".npy", ".labels.npy")]
        except (OSError, ValueError):
            return False
        return shapes == [(len(self._ids(number)), self.width), (len(self._ids(number)), 2)]

    def _write(self, name: str, array: np.ndarray) -> None:
        """Whole or not at all."""
        temporary = self.folder / f".{name}"
        try:
            with temporary.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
