"""Loader: a batch is a function of its (epochs, ids); unreadable samples are replaced and logged, cut tars refused."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_types import Tars

from mae_dist import schema
from mae_dist.batch import Batch
from mae_dist.data import index, loader, shard_files
from mae_dist.data.order import Order, plan
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import View
from mae_dist.errors import MachineFault, RankError, WorkerLost

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)


def view(crop: str = "resized", size: int = 24, training: bool = True) -> View:
    return View(schema.ViewConfig(crop=crop), size, MEAN, STD, seed=3, training=training)  # pyright: ignore


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def steps(data: index.ShardIndex, first: int, last: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(plan(Order(1, data.counts, 2), range(first, last), 6, 2, 0, 1))


@pytest.mark.parametrize(("workers", "start"), [(0, 2), (1, 0), (2, 0), (2, 3)])
def test_loader_batches_are_identical_for_any_workers_and_resume_step(tars: Tars, workers: int, start: int) -> None:
    data = tars([4, 5, 3], size=None, extension="jpg")
    whole = list(loader.TarSource(data, CPU, 0).batches(steps(data, 0, 5), view()))
    batches = list(loader.TarSource(data, CPU, workers).batches(iter(steps(data, start, 5)), view()))
    assert len(whole) == 10
    assert len(batches) == 10 - 2 * start
    assert all(same(a, b) for a, b in zip(batches, whole[2 * start :], strict=True))
    for batch, (epochs, ids) in zip(whole, steps(data, 0, 5), strict=True):
        assert batch.ids.tolist() == ids.tolist()
        assert batch.epochs.tolist() == epochs.tolist()
        assert batch.labels.tolist() == (ids % 3).tolist()
        assert batch.images.shape == (3, 3, 24, 24)
        assert batch.images.dtype == torch.float32
        assert not batch.bad.any()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_stream_is_elastic_over_ranks_micro_batches_and_resume_step(tars: Tars, workers: int) -> None:
    """Every pixel, box, id and epoch of the global batch; 7 images a step, which none of the worlds divides."""
    data = tars([4, 5, 3], size=None, extension="jpg")
    order = Order(1, data.counts, 2)

    def stream(first: int, world: int, workers: int, micro: int) -> list[Batch]:
        ranks = [
            list(loader.TarSource(data, CPU, workers).batches(plan(order, range(first, 5), 7, micro, r, world), view()))
            for r in range(world)
        ]
        whole = []
        for step in range(5 - first):
            parts = [batch for batches in ranks for batch in batches[step * micro : (step + 1) * micro]]
            whole.append(Batch(*(torch.cat(part) for part in zip(*parts, strict=True))))
        return whole

    reference = stream(0, world=1, workers=0, micro=1)
    for world, first, micro in ((1, 0, 3), (2, 0, 1), (2, 3, 2), (3, 1, 1), (4, 0, 1), (4, 4, 1)):
        found = stream(first, world, workers, micro)
        assert all(same(a, b) for a, b in zip(found, reference[first:], strict=True)), (world, first, micro)


def test_loader_image_is_independent_of_its_batch(tars: Tars) -> None:
    data = tars([4, 4])
    epochs, ids = np.array([0, 0, 2, 0]), np.array([5, 1, 5, 7])
    for source in (loader.TarSource(data, CPU, 0), ResidentSource(data, CPU)):
        (together,) = source.batches([(epochs, ids)], view())
        for i in range(4):
            (alone,) = source.batches([(epochs[i : i + 1], ids[i : i + 1])], view())
            assert torch.allclose(alone.images[0], together.images[i], atol=1e-6)
        assert not torch.allclose(together.images[0], together.images[2], atol=1e-2)  # another epoch, another crop


@pytest.mark.parametrize("crop", ["resized", "pad"])
@pytest.mark.parametrize("training", [True, False])
def test_loader_in_memory_and_tar_source_agree(tars: Tars, crop: str, training: bool) -> None:
    data = tars([4, 5, 3], broken={2, 6})
    streamed = list(loader.TarSource(data, CPU, 0).batches(steps(data, 0, 4), view(crop, 32, training)))
    resident = list(ResidentSource(data, CPU).batches(steps(data, 0, 4), view(crop, 32, training)))
    for a, b in zip(streamed, resident, strict=True):
        assert same(Batch(b.images, *a[1:]), b)
        close = (a.images - b.images).abs() * torch.tensor(STD)[:, None, None] * 255 < 1.5
        assert (
            close.float().mean() > 0.98
        )  # the rest: Pillow clips saturated pixels in another order when boxes are high
        if crop == "pad" and training:
            assert close.all()


def test_loader_open_source_chooses_by_size(tars: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tars([3])
    assert isinstance(loader.open_source(data, CPU, 0), ResidentSource)
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 3 * 32 * 32 * 3 - 1)
    assert isinstance(loader.open_source(data, CPU, 0), loader.TarSource)


def test_loader_refuses_images_of_another_size_than_dataset_json(tars: Tars) -> None:
    data = tars([3])
    object.__setattr__(data.dataset, "image_size", (32, 31))
    with pytest.raises(ValueError, match=r"s0000.*32x32.*image_size in dataset.json is 32x31"):
        ResidentSource(data, CPU)


@pytest.mark.parametrize("kind", ["streamed", "resident"])
def test_loader_replaces_truncated_jpegs_by_the_next_sample(
    tars: Tars, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Sample 3 is the last of its shard: the first of its shard replaces it. 5 and 6 follow each other."""
    data = tars([4, 4], extension="jpg", broken={3, 5, 6})
    with caplog.at_level(logging.WARNING):
        source = loader.TarSource(data, CPU, 0) if kind == "streamed" else ResidentSource(data, CPU)
        ids = np.arange(8)
        (batch,) = source.batches([(np.zeros(8, dtype=np.int64), ids)], view("center", 32, training=False))
    assert batch.ids.tolist() == list(range(8))
    assert batch.bad.tolist() == [i in (3, 5, 6) for i in range(8)]
    replacements = [0, 1, 2, 0, 4, 7, 7, 7]
    assert batch.labels.tolist() == [i % 3 for i in replacements]
    assert torch.equal(batch.images, batch.images[replacements])
    others = [0, 1, 2, 4, 7]
    assert all(not torch.equal(batch.images[i], batch.images[j]) for i in others for j in others if i != j)
    for name in ("s0003.jpg in x-0.tar", "s0005.jpg in x-1.tar", "s0006.jpg in x-1.tar"):
        assert name in caplog.text
    assert "s0004" not in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_raises_for_a_tar_cut_after_indexing_and_names_it(
    tars: Tars, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = tars([4, 4])
    tar = Path(data.tars[1])
    tar.write_bytes(tar.read_bytes()[:-12_000])
    with pytest.raises(ValueError, match=r"^\S*x-1\.tar: has \d+ bytes now, \d+ before"):
        list(loader.TarSource(data, CPU, workers).batches(steps(data, 0, 2), view()))
    with pytest.raises(ValueError, match=r"x-1\.tar"):
        ResidentSource(data, CPU)
    with pytest.raises(ValueError, match="was changed or cut"):
        index.open_split(str(tar.parent), "train")
    assert "replaces it" not in caplog.text


@pytest.mark.parametrize("num", [1, 5, 16, 23])
def test_loader_evaluation_plan_has_each_sample_once(num: int) -> None:
    for world in (1, 2, 3, 7):
        shares = [list(loader.evaluation_plan(num, 4, rank, world)) for rank in range(world)]
        parts = [part for share in shares for part in share]
        assert [i for _, ids in parts for i in ids.tolist()] == list(range(num))
        assert all(len(ids) <= 4 and not epochs.any() for epochs, ids in parts)
        assert len({len(share) for share in shares}) == 1, "ranks that share a model compute together"


def test_loader_gives_an_empty_batch_for_an_empty_plan(tars: Tars) -> None:
    data, nothing = tars([4]), np.array([], dtype=np.int64)
    for source in (loader.TarSource(data, CPU, 0), ResidentSource(data, CPU)):
        (batch,) = source.batches([(nothing, nothing)], view(training=False))
        assert batch.images.shape == (0, 3, 24, 24)
        assert batch.size == 0


def test_loader_worker_killed_by_sigkill_is_worker_lost(tars: Tars) -> None:
    data = tars([6, 6], size=None, extension="jpg")
    others = multiprocessing.active_children()
    batches = loader.TarSource(data, CPU, 1).batches(iter(steps(data, 0, 500)), view())
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="a loader process of this rank was killed"):
        for _ in batches:
            pass


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("number", "wanted"), [(errno.EIO, MachineFault), (errno.EACCES, RankError)])
def test_loader_storage_fault_is_a_machine_fault_from_any_process(
    tars: Tars, workers: int, number: int, wanted: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    data = tars([4])
    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(shard_files, "PAUSES", ())
    with pytest.raises(wanted, match=rf"x-0.tar at byte \d+: cannot be read \({os.strerror(number)}") as caught:
        list(loader.TarSource(data, CPU, workers).batches(iter(steps(data, 0, 1)), view()))
    assert type(caught.value) is wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_names_each_unreadable_sample_once_over_all_passes(
    tars: Tars, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = tars([6, 6], size=None, broken={1, 2, 3, 7})
    source = loader.TarSource(data, CPU, workers)
    with caplog.at_level(logging.ERROR):  # the level of ranks that are not rank 0
        for _ in range(2):
            marks = [batch.bad for batch in source.batches(loader.evaluation_plan(12, 5, 0, 1), view(training=False))]
            assert torch.cat(marks).nonzero().flatten().tolist() == [1, 2, 3, 7]
    assert sorted(message.split()[1] for message in caplog.messages) == [f"s{i:04d}.png" for i in (1, 2, 3, 7)]


def test_loader_takes_following_shards_where_a_whole_shard_is_unreadable(tars: Tars) -> None:
    data = tars([2, 3, 3], broken={2, 3, 4, 5})
    for source in (loader.TarSource(data, CPU, 0), ResidentSource(data, CPU)):
        (batch,) = source.batches([(np.zeros(8, dtype=np.int64), np.arange(8))], view("center", 32, training=False))
        assert batch.bad.tolist() == [False] * 2 + [True] * 4 + [False] * 2
        places = [0, 1, 0, 0, 0, 6, 6, 7]  # the first of shard 2 is unreadable, too
        assert torch.equal(batch.images, batch.images[places])
        assert batch.labels.tolist() == [place % 3 for place in places]
