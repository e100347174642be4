"""Order: local permutations, one stream for any number of ranks, and random access to any position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mae_dist.data.order import KEPT_WINDOWS, Mixture, Order, mixed, num_micro, plan, share, whole_weights

COUNTS = np.array([5, 1, 7, 6, 3, 9, 2])
NUM = int(COUNTS.sum())


def flat(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    return [pair for epochs, ids in parts for pair in zip(epochs.tolist(), ids.tolist(), strict=True)]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_order_of_each_epoch_is_a_permutation_and_epochs_differ(window: int) -> None:
    order = Order(0, COUNTS, window)
    epochs = [order.at(e * NUM, (e + 1) * NUM) for e in range(4)]
    for number, (epoch, ids) in enumerate(epochs):
        assert epoch.tolist() == [number] * NUM
        assert sorted(ids.tolist()) == list(range(NUM))
        assert ids.tolist() != list(range(NUM))
    for (_, a), (_, b) in itertools.combinations(epochs, 2):
        assert a.tolist() != b.tolist()
    assert Order(1, COUNTS, window).at(0, NUM)[1].tolist() != epochs[0][1].tolist()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_order_window_contains_only_ids_of_its_shards(window: int) -> None:
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    for epoch in range(3):
        shards = shard_of[Order(4, COUNTS, window).at(epoch * NUM, (epoch + 1) * NUM)[1]]
        met: set[int] = set()
        while len(shards):
            here: list[int] = []
            for shard in shards:
                if shard not in here and len(here) == window:
                    break
                here += [shard] if shard not in here else []
            size = int(COUNTS[here].sum())
            assert len(here) == min(window, len(COUNTS) - len(met))
            assert set(shards[:size].tolist()) == set(here)  # a window is whole shards
            assert not met & set(here)
            met |= set(here)
            shards = shards[size:]


def test_order_of_any_slice_equals_the_slice_of_the_whole() -> None:
    whole = flat([Order(2, COUNTS, 2).at(0, 4 * NUM)])
    order = Order(2, COUNTS, 2)
    for a, b in [(0, 1), (NUM - 1, NUM + 1), (3 * NUM, 4 * NUM), (5, 3 * NUM + 2), (NUM, NUM + 3), (17, 40)]:
        assert flat([order.at(a, b)]) == whole[a:b]  # backwards and forwards: what is cached does not matter


@pytest.mark.parametrize("global_batch", [8, 10, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_order_shares_of_all_ranks_make_the_stream_elastic(global_batch: int, world: int, micro_batch: int) -> None:
    """33 samples an epoch, 9 steps: some batches straddle two epochs."""
    stream = flat([Order(6, COUNTS, 3).at(0, 9 * global_batch)])
    micro = num_micro(global_batch, world, micro_batch)
    plans = [list(plan(Order(6, COUNTS, 3), range(9), global_batch, micro, rank, world)) for rank in range(world)]
    assert {len(p) for p in plans} == {9 * micro}
    assert all(len(ids) == len(epochs) >= 1 for p in plans for epochs, ids in p)
    union = [part for step in range(9) for p in plans for part in p[step * micro : (step + 1) * micro]]
    assert flat(union) == stream
    assert {epoch for epoch, _ in stream} == set(range(-(-9 * global_batch // NUM)))


@pytest.mark.parametrize("step", [0, 1, 4, 8])
def test_order_resume_by_seeking_equals_continuing(step: int) -> None:
    whole = list(plan(Order(6, COUNTS, 3), range(9), 10, 2, 1, 3))
    later = list(plan(Order(6, COUNTS, 3), range(step, 9), 10, 2, 1, 3))
    assert [flat([part]) for part in later] == [flat([part]) for part in whole[2 * step :]]


def test_order_shares_are_contiguous_and_nearly_equal() -> None:
    for total, world in itertools.product(range(40), range(1, 9)):
        ranges = [share(total, rank, world) for rank in range(world)]
        assert [i for a, b in ranges for i in range(a, b)] == list(range(total))
        sizes = [b - a for a, b in ranges]
        assert max(sizes) - min(sizes) <= 1


def test_order_micro_batches_are_nonempty_and_within_the_limit() -> None:
    for global_batch, world, micro_batch in itertools.product(range(1, 40), range(1, 9), (1, 2, 3, 7, 64)):
        if world > global_batch:
            continue
        micro = num_micro(global_batch, world, micro_batch)
        for rank in range(world):
            first, last = share(global_batch, rank, world)
            sizes = [b - a for a, b in (share(last - first, part, micro) for part in range(micro))]
            assert min(sizes) >= 1
            assert max(sizes) <= micro_batch + (micro == global_batch // world)  # where shares are 1 and 2, 2 at once


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_order_repeated_augmentation_takes_each_sample_repeats_times_as_different_epochs(repeats: int) -> None:
    """A pass of 33 samples: an odd number, so pairs straddle passes."""
    plain = flat([Order(2, COUNTS, 2).at(0, 4 * NUM)])
    stream = flat([Order(2, COUNTS, 2, repeats=repeats).at(0, 4 * NUM * repeats)])
    assert len(set(stream)) == len(stream)  # no two have the same draws
    blocks = [stream[i : i + 2 * repeats] for i in range(0, len(stream), 2 * repeats)]
    for a, b, block in zip(plain[::2], plain[1::2], blocks, strict=True):
        assert block == [(epoch * repeats + copy, id_) for copy in range(repeats) for epoch, id_ in (a, b)]
    assert all(block[i][1] != block[i + 1][1] for block in blocks for i in range(0, len(block), 2))  # mixing's pairs
    for epoch in range(4 * repeats):
        assert sorted(id_ for e, id_ in stream if e == epoch) == list(range(NUM))


@pytest.mark.parametrize(("world", "micro_batch", "group"), [(1, 3, 1), (3, 2, 1), (2, 4, 2), (5, 100, 2)])
def test_order_repeated_augmentation_is_elastic(world: int, micro_batch: int, group: int) -> None:
    """Batches of 10 end within the copies of a sample (repeats 3), and shares within them too."""
    stream = flat([Order(6, COUNTS, 3, repeats=3).at(0, 90)])
    micro = num_micro(10, world, micro_batch, group)
    plans = [
        list(plan(Order(6, COUNTS, 3, repeats=3), range(4, 9), 10, micro, rank, world, group)) for rank in range(world)
    ]
    union = [part for step in range(5) for p in plans for part in p[step * micro : (step + 1) * micro]]
    assert flat(union) == stream[40:]


def test_order_leaves_a_sample_out_from_a_position_on_among_its_copies_too() -> None:
    stream = flat([Order(2, COUNTS, 2, repeats=3).at(0, 12 * NUM)])
    first = next(i for i, (_, id_) in enumerate(stream) if id_ == 8)
    left_out = flat([Order(2, COUNTS, 2, {8: first + 1}, repeats=3).at(0, 12 * NUM)])
    assert left_out[: first + 1] == stream[: first + 1]
    assert [id_ for _, id_ in left_out].count(8) == 1
    assert [epoch for epoch, _ in left_out] == [epoch for epoch, _ in stream]
    assert {b for (_, a), (_, b) in zip(stream, left_out, strict=True) if a != b} == {9}  # the next one of its shard


def test_order_memory_grows_with_shards_and_one_window() -> None:
    """1e5 shards of 1e4 samples: 1e9 ids, of which one window is resident."""
    order = Order(0, np.full(100_000, 10_000), 4)
    order.at(123_456_789, 123_456_789 + 64)

    def resident() -> int:
        shards = sum(a.nbytes for pair in order._epochs.values() for a in pair)
        return shards + sum(a.nbytes for a in order._windows.values()) + order.counts.nbytes + order.starts.nbytes

    assert len(order._windows) == 1
    assert resident() < 8 * (4 * 100_000 + 4 * 10_000)
    for step in range(20):
        order.at(step * 40_000, step * 40_000 + 1)
    assert len(order._windows) == KEPT_WINDOWS


def test_order_golden_numbers() -> None:
    """If this fails, every earlier run has become irreproducible."""
    epochs, ids = Order(3, np.array([5, 4, 7, 6]), 2).at(0, 44)
    assert epochs.tolist() == [0] * 22 + [1] * 22
    assert ids.tolist() == [
        7, 17, 16, 20, 21, 5, 18, 8, 19, 6, 13, 3, 1, 11, 15, 12, 9, 2, 4, 10, 0, 14,
        4, 6, 0, 3, 1, 8, 7, 5, 2, 21, 11, 9, 18, 20, 13, 17, 14, 12, 16, 15, 19, 10,
    ]  # fmt: skip


PARTS = [np.array([5, 4]), np.array([3]), np.array([2, 2, 6])]


def part_of(ids: np.ndarray) -> np.ndarray:
    return np.searchsorted([9, 12, 22], ids, side="right")


def test_order_mixture_has_exact_counts_in_every_cycle_in_a_random_order() -> None:
    epochs, ids = Mixture(3, PARTS, [2, 1, 1], 2).at(0, 400)
    cycles = part_of(ids).reshape(-1, 4)
    assert (np.sort(cycles, axis=1) == [0, 0, 1, 2]).all()
    assert len(np.unique(cycles, axis=0)) == 12, "all orders of a cycle occur"
    for part, size in enumerate((9, 3, 10)):  # each part has epochs of its own: all its samples once in each
        mine = part_of(ids) == part
        taken = ids[mine][: mine.sum() // size * size].reshape(-1, size)
        assert (np.sort(taken, axis=1) == np.arange(size) + (0, 9, 12)[part]).all()
        assert (epochs[mine] == np.arange(mine.sum()) // size).all()
        assert len(np.unique(taken, axis=0)) > 1, "another order in each epoch"


def test_order_mixture_is_independent_of_resume_position_and_ranks() -> None:
    whole = flat([Mixture(2, PARTS, [3, 2, 5], 2).at(0, 300)])
    order = Mixture(2, PARTS, [3, 2, 5], 2)
    for a, b in ((250, 300), (0, 1), (17, 117), (117, 117 + 40), (9, 10)):
        assert flat([order.at(a, b)]) == whole[a:b]
    plans = [list(plan(Mixture(2, PARTS, [3, 2, 5], 2), range(9), 10, 2, rank, 3)) for rank in range(3)]
    steps = [batch for step in range(9) for rank in plans for batch in rank[2 * step : 2 * step + 2]]
    assert flat(steps) == whole[:90]


def test_order_mixture_repeats_and_leaves_out_as_order_does() -> None:
    plain, repeated = flat([Mixture(2, PARTS, [1, 1, 2], 2).at(0, 200)]), Mixture(2, PARTS, [1, 1, 2], 2, repeats=2)
    stream = flat([repeated.at(0, 400)])
    assert [stream[4 * pair : 4 * pair + 2] for pair in range(100)] == [
        [(2 * epoch, id_) for epoch, id_ in plain[2 * pair : 2 * pair + 2]] for pair in range(100)
    ]
    left_out = flat([Mixture(2, PARTS, [1, 1, 2], 2, {10: 50}).at(0, 200)])
    assert left_out[:50] == plain[:50]
    assert [id_ for _, id_ in left_out[50:]] == [11 if id_ == 10 else id_ for _, id_ in plain[50:]]


def test_order_mixture_golden_numbers() -> None:
    epochs, ids = Mixture(3, PARTS, [2, 1, 1], 2).at(0, 16)
    assert ids.tolist() == [7, 17, 3, 11, 1, 2, 16, 9, 10, 4, 0, 13, 5, 20, 8, 11]
    assert epochs.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_order_weights_are_whole_numbers_or_refused() -> None:
    assert whole_weights([2.0, 1.0], "") == [2, 1]
    assert whole_weights([0.7, 0.3], "") == [7, 3]
    assert whole_weights([4, 2, 6], "") == [2, 1, 3]
    assert whole_weights([1e-3, 1], "") == [1, 1000]
    with pytest.raises(
        ValueError, match=r"data.weights=\[0.333333, 0.666667\]: is the ratio .* round it, like \[33, 67\]"
    ):
        mixed(0, PARTS[:2], [0.333333, 0.666667], 2)
    with pytest.raises(ValueError, match=r"data.weights=\[1\]: data.path names 3 data sets"):
        mixed(0, PARTS, [1], 2)
    assert flat([mixed(4, PARTS, [], 2).at(0, 50)]) == flat([Order(4, np.concatenate(PARTS), 2).at(0, 50)])
