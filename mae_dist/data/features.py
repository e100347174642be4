"""Features of a split, computed once and kept on disk: a `Source` of batches like those of `loader`.

    FOLDER/
      00000.npy          features of SHARD samples, float32 (n, *shape), memory-mapped
      00000.labels.npy   labels and whether the sample was unreadable, int64 (n, 2); written first
      .00000.npy.PID     a file that is being written

Shards have a fixed number of samples and are computed in fixed pieces, so their bits do not depend on the number of
ranks. A shard is written atomically, so after a kill only missing shards are computed. Knows no model: `fill` takes a
function from batches to features.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

from mae_dist.atomic import leftovers, replacing, sync
from mae_dist.batch import Batch
from mae_dist.data.index import ShardIndex
from mae_dist.data.loader import Plan, Source
from mae_dist.data.views import View
from mae_dist.errors import MachineFault, RankError
from mae_dist.watchdog import progress

SHARD = 512
"""Samples a shard."""
PIECE = 256
"""Samples of one forward pass."""


class Features:
    """Features of a split, an array of this `shape` for each sample, stored in `folder`; batches are on `device`."""

    def __init__(
        self, folder: Path, index: ShardIndex, shape: tuple[int, ...], device: torch.device, shard: int = SHARD
    ):
        self.folder, self.index, self.shape, self.device, self.shard = folder, index, shape, device, shard
        self.num_shards = -(-len(index) // shard)
        self.open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_bytes(self) -> int:
        """Size of all features on disk."""
        return len(self.index) * math.prod(self.shape) * 4

    def missing(self) -> list[int]:
        """Numbers of the shards that are missing or damaged."""
        return [number for number in range(self.num_shards) if not self._complete(number)]

    def remove_leftovers(self) -> None:
        """Remove what a killed process has left of shards; called by one rank, before any writes."""
        for path in leftovers(self.folder, ".npy"):
            path.unlink()

    def fill(
        self, source: Source, view: View, compute: Callable[[Batch], Tensor], rank: int = 0, world: int = 1
    ) -> None:
        """Compute this rank's share of the missing shards, with a progress bar on rank 0.

        ``compute`` maps a batch to its features (b, *shape). Raises RankError when one of a readable sample is not
        finite and MachineFault when a file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = [number for number in self.missing() if number % world == rank]
        batches = source.batches(((np.zeros_like(ids), ids) for n in mine for ids in self._pieces(n)), view)
        quiet = rank > 0 or not sys.stderr.isatty()
        for number in track(mine, "computing features", disable=quiet, transient=True):
            parts = [next(batches) for _ in self._pieces(number)]
            values = torch.cat([self._computed(compute, part) for part in parts])
            facts = torch.cat([torch.stack([part.labels, part.bad.long()], 1) for part in parts])
            try:
                self._write(f"{number:05d}.labels.npy", facts.cpu().numpy())
                self._write(f"{number:05d}.npy", values.cpu().numpy())
            except OSError as error:
                raise MachineFault(
                    f"{self.folder}: features cannot be written ({error.strerror or error}); make room and "
                    f"run the command again: it continues"
                ) from None

    def _computed(self, compute: Callable[[Batch], Tensor], batch: Batch) -> Float[Tensor, "b ..."]:
        values = compute(batch).float()
        progress()
        if not (finite := values.flatten(1).isfinite().all(1) | batch.bad).all():
            first = int(batch.ids[~finite][0])
            raise RankError(
                f"{self.index.sample_name(first)}: its features are not finite; try precision fp32, or other weights"
            )
        return values

    def batches(self, plan: Plan, _view: View, /) -> Iterator[Batch]:
        """Batches of a plan, in its order, with features as `images`; they were computed with the view of `fill`."""
        for epochs, ids in plan:
            values, facts = self._gather(ids)
            where = torch.from_numpy(ids)
            batch = Batch(values, facts[:, 0], where, torch.from_numpy(epochs), facts[:, 1].bool())
            progress()
            yield Batch(*(part.to(self.device) for part in batch))

    def _gather(self, ids: np.ndarray) -> tuple[Float[Tensor, "b ..."], Int[Tensor, "b 2"]]:
        values, facts = np.empty((len(ids), *self.shape), dtype=np.float32), np.empty((len(ids), 2), dtype=np.int64)
        shards = ids // self.shard
        for number in np.unique(shards):
            if number not in self.open:
                self.open[number] = self.arrays(number)
            here = shards == number
            rows = ids[here] - number * self.shard
            values[here], facts[here] = (part[rows] for part in self.open[number])
        return torch.from_numpy(values), torch.from_numpy(facts)

    def _ids(self, number: int) -> np.ndarray:
        return np.arange(number * self.shard, min((number + 1) * self.shard, len(self.index)), dtype=np.int64)

    def _pieces(self, number: int) -> list[np.ndarray]:
        ids = self._ids(number)
        return [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)]

    def arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard's features, and its labels and whether each sample was unreadable, memory-mapped."""
        return self._load(f"{number:05d}.npy"), self._load(f"{number:05d}.labels.npy")

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)

    def _complete(self, number: int) -> bool:
        if not all((self.folder / f"{number:05d}{end}").is_file() for end in (".npy", ".labels.npy")):
            return False
        try:
            kinds = [(array.dtype, array.shape) for array in self.arrays(number)]
        except Exception:  # a parser of Python's reads the header of a damaged file, and may raise anything
            return False
        count = len(self._ids(number))
        return kinds == [(np.float32, (count, *self.shape)), (np.int64, (count, 2))]

    def _write(self, name: str, array: np.ndarray) -> None:
        with replacing(self.folder / name) as work, work.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            sync(stream.fileno(), self.folder / name)
