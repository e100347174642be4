"""Order: the order of samples in training, a pure function of (seed, shard sizes, window, position).

Each epoch permutes the shards, then the samples within each run of `window` shards, so that reads stay near each
other. Epochs follow each other without a gap: position p of the stream is sample p mod N of epoch p // N, and step k
of a run takes the positions k * global_batch up to (k + 1) * global_batch. Ranks, workers and micro-batches divide
that range among them. Memory grows with the number of shards, and with the samples of a window. Imports no torch.

With repeated augmentation (Hoffer et al. 2020) each pass over the data takes every sample `repeats` times, as different
epochs of it, so that all that is drawn for it differs. Samples are repeated two by two, a b a b a b c d c d ...: copies
stay near each other, and none is the partner that mixing gives to another (`objectives.mixing`).

With weights, several data sets are mixed (`Mixture`); each has an order and epochs of its own.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from mae_dist import rng

KEPT_WINDOWS = 4
LONGEST_CYCLE = 10_000
"""Places of the longest cycle of a Mixture."""


class Order:
    """The infinite stream of (epoch, sample id) over shards with `counts` samples.

    A sample's epoch is how often it was taken before. ``left_out`` maps a sample id to the position from which on the
    next sample of its shard replaces it. ``repeats`` is the number of copies of repeated augmentation. ``first`` is the
    number of the first shard, and the id of the first sample.
    """

    def __init__(
        self, seed: int, counts: np.ndarray, window: int, left_out: dict[int, int] | None = None, repeats: int = 1,
        first: tuple[int, int] = (0, 0),
    ):  # fmt: skip
        self.seed, self.window, self.left_out, self.repeats = seed, window, left_out or {}, repeats
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first, self.starts = first[0], np.cumsum(self.counts) - self.counts + first[1]
        self.num_samples = int(self.counts.sum())
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, ids) at positions start to stop - 1 of the stream, int64 (stop - start,) each."""
        pair, place = np.divmod(np.arange(start, stop), 2 * self.repeats)
        copies, places = place // 2, 2 * pair + place % 2
        passes, ids = self._unrepeated(int(places.min()), int(places.max()) + 1)
        chosen = places - places.min()
        return passes[chosen] * self.repeats + copies, self._replaced(start, ids[chosen])

    def _unrepeated(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(passes over the data, ids) at these positions of the stream as it is without repeats and `left_out`."""
        passes, ids = [], []
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            _, ends = self._epoch(epoch)
            number = int(np.searchsorted(ends, place, side="right"))
            samples = self._samples(epoch, number)
            first = place - (int(ends[number - 1]) if number else 0)
            piece = samples[first : first + stop - start]
            ids.append(piece)
            passes.append(np.full(len(piece), epoch, dtype=np.int64))
            start += len(piece)
        return np.concatenate(passes), np.concatenate(ids)

    def _replaced(self, start: int, ids: np.ndarray) -> np.ndarray:
        """Replace the ids that are left out; `ids` are at positions from `start` on."""
        if not self.left_out:
            return ids
        return np.array([self._next(int(id_), start + i) for i, id_ in enumerate(ids)], dtype=np.int64)

    def _next(self, id_: int, position: int) -> int:
        if position < self.left_out.get(id_, position + 1):
            return id_
        shard = int(np.searchsorted(self.starts, id_, side="right")) - 1
        first, count = int(self.starts[shard]), int(self.counts[shard])
        for offset in range(1, count):
            other = first + (id_ - first + offset) % count
            if position < self.left_out.get(other, position + 1):
                return other
        raise ValueError(f"all {count} samples of shard {shard} are left out; see events.jsonl in the run's folder")

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards of an epoch, and the position at which each window ends."""

        def draw() -> tuple[np.ndarray, np.ndarray]:
            numbers = np.arange(len(self.counts)) + self.first
            shards = permutation(self.seed, rng.Purpose.SHARDS, epoch, numbers) - self.first
            sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
            return shards, np.cumsum(sizes)

        return _remember(self._epochs, epoch, draw)

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        """The permuted sample ids of one window of an epoch."""

        def draw() -> np.ndarray:
            shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
            ids = np.concatenate([np.arange(int(self.counts[s]), dtype=np.int64) + self.starts[s] for s in shards])
            return permutation(self.seed, rng.Purpose.SAMPLES, epoch, ids)

        return _remember(self._windows, (epoch, number), draw)


class Mixture(Order):
    """The infinite stream of (epoch, sample id) over several data sets, `parts`, as the counts of their shards.

    The stream is a row of cycles. In each, part i has exactly `weights[i]` (a whole number) places, in a random order,
    and goes on where it stopped in the cycle before. Sample ids are those of the concatenation of the parts.
    """

    def __init__(
        self, seed: int, parts: Sequence[np.ndarray], weights: Sequence[int], window: int,
        left_out: dict[int, int] | None = None, repeats: int = 1,
    ):  # fmt: skip
        super().__init__(seed, np.concatenate(parts), window, left_out, repeats)
        shards, self.orders = 0, list[Order]()
        for counts in parts:
            self.orders.append(Order(seed, counts, window, first=(shards, int(self.starts[shards]))))
            shards += len(counts)
        self.weights, self.cycle = weights, np.repeat(np.arange(len(weights)), weights)

    def _unrepeated(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        length = len(self.cycle)
        cycles = np.arange(start // length, -(-stop // length))
        numbers = np.tile(np.arange(length), len(cycles))
        words = rng.bits(self.seed, rng.Purpose.PARTS, np.repeat(cycles, length), numbers, 2)
        drawn = np.argsort(((words[:, 0] << 30) ^ words[:, 1]).reshape(-1, length), axis=1, kind="stable")
        places, skipped = self.cycle[drawn].reshape(-1), start - int(cycles[0]) * length
        passes, ids = np.empty((2, stop - start), dtype=np.int64)
        for part, (order, weight) in enumerate(zip(self.orders, self.weights, strict=True)):
            first = int(cycles[0]) * weight + int((places[:skipped] == part).sum())
            mine = np.flatnonzero(places[skipped : skipped + stop - start] == part)
            if len(mine):
                passes[mine], ids[mine] = order._unrepeated(first, first + len(mine))
        return passes, ids


def mixed(
    seed: int, parts: Sequence[np.ndarray], weights: Sequence[float], window: int,
    left_out: dict[int, int] | None = None, repeats: int = 1,
) -> Order:  # fmt: skip
    """The order over one data set or several: one concatenation of the `parts`, or with `weights` their Mixture.

    Raises ValueError for weights that are not one for each part, or that no cycle of LONGEST_CYCLE places has exactly.
    """
    if not weights:
        return Order(seed, np.concatenate(parts), window, left_out, repeats)
    given = f"data.weights=[{', '.join(f'{weight:g}' for weight in weights)}]"
    if len(weights) != len(parts):
        raise ValueError(f"{given}: data.path names {len(parts)} data sets, and each needs one weight: data.path=[A,B]")
    return Mixture(seed, parts, whole_weights(weights, given), window, left_out, repeats)


def whole_weights(weights: Sequence[float], given: str) -> list[int]:
    """The smallest whole numbers in the ratio of these decimal numbers. Raises ValueError, which begins with ``given``,
    where their sum exceeds LONGEST_CYCLE.
    """
    exact = [Fraction(str(float(weight))) for weight in weights]
    scale = Fraction(math.lcm(*(part.denominator for part in exact)), 1)
    whole = [int(part * scale) for part in exact]
    whole = [part // math.gcd(*whole) for part in whole]
    if sum(whole) > LONGEST_CYCLE:
        near = [max(1, round(100 * part / sum(whole))) for part in whole]
        raise ValueError(
            f"{given}: is the ratio {':'.join(map(str, whole))}, too fine to be kept; round it, like {near}"
        )
    return whole


def permutation(seed: int, purpose: rng.Purpose, epoch: int, values: np.ndarray) -> np.ndarray:
    """Permute `values` (int64 (n,)): sort them by 62 random bits of each, ties in the given order."""
    words = rng.bits(seed, purpose, epoch, values, 2)
    return values[np.argsort((words[:, 0] << 30) ^ words[:, 1], kind="stable")]


def share(total: int, rank: int, world: int, group: int = 1) -> tuple[int, int]:
    """The half-open range (first, last) of `total` items that belongs to a rank.

    Ranges of ranks are contiguous, differ in size by at most one `group`, and never divide a group.
    """
    groups = total // group
    return groups * rank // world * group, groups * (rank + 1) // world * group


def num_micro(global_batch: int, world: int, micro_batch: int, group: int = 1) -> int:
    """Number of micro-batches of a step, equal on all ranks although their shares may differ by one group."""
    groups = global_batch // group
    largest, smallest = -(-groups // world), groups // world
    return min(-(-largest // (micro_batch // group)), smallest)


def plan(
    order: Order, steps: range, global_batch: int, micro: int, rank: int, world: int, group: int = 1
) -> Iterator[tuple]:
    """(epochs, ids), int64 (b,) each, of this rank's micro-batches in the given steps, `micro` a step."""
    first, last = share(global_batch, rank, world, group)
    for step in steps:
        base = step * global_batch + first
        for part in range(micro):
            a, b = share(last - first, part, micro, group)
            yield order.at(base + a, base + b)


def _remember(cache: OrderedDict, key, draw):
    if key not in cache:
        while len(cache) >= KEPT_WINDOWS:
            cache.popitem(last=False)
        cache[key] = draw()
    return cache[key]
