"""Evaluation: exact counts, whatever the batches, ties and NaNs; nearest neighbours as a plain loop finds them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mae_dist import evaluate
from mae_dist.batch import Batch
from mae_dist.objectives import Output

CPU = torch.device("cpu")


def hits(scores: list[list[float]], labels: list[int]) -> list[int]:
    return evaluate.hits(torch.tensor(scores), torch.tensor(labels)).tolist()


def test_hits_counts_first_and_among_five() -> None:
    row = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4]  # in order: 1 3 5 6 4 2 0
    assert hits([row] * 7, list(range(7))) == [1, 5, 7]
    assert hits([row], [1]) == [1, 1, 1]
    assert hits([row], [4]) == [0, 1, 1]
    assert hits([row], [2]) == [0, 0, 1]


def test_hits_with_fewer_than_five_classes() -> None:
    assert hits([[0.1, 0.9, 0.2]] * 3, [0, 1, 2]) == [1, 3, 3]
    assert hits([[0.0]], [0]) == [1, 1, 1]


def test_a_tie_is_won_by_one_class_only() -> None:
    assert hits([[0.5] * 8] * 8, list(range(8))) == [1, 5, 8]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_hit_nothing(value: float) -> None:
    assert hits([[value] * 3] * 3, [0, 1, 2]) == [0, 0, 3]
    assert hits([[0.1, value, 0.3]] * 3, [0, 1, 2]) == [0, 0, 3]


def test_samples_without_label_hit_nothing() -> None:
    assert hits([[0.3, 0.2]], [-1]) == [0, 0, 1]


def test_percentages() -> None:
    numbers = {"top1": 12.5, "top5": 37.5, "num_test_images": 8}
    assert evaluate.percentages(torch.tensor([1, 3, 8]), 8) == numbers
    assert evaluate.percentages(torch.tensor([1, 3, 8]), 10) == numbers | {"num_unreadable": 2}
    with pytest.raises(ValueError, match="none of the 10 test images can be read"):
        evaluate.percentages(torch.tensor([0, 0, 0]), 10)


class Linear(nn.Module):
    """A stand-in for an objective: logits are pixels, the loss is their sum; counts in which mode it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, batch: Batch) -> Output:
        self.modes.append(self.training)
        logits = batch.images.flatten(1)
        return Output(logits.sum(1), logits)


def batches(size: int, unreadable: int = 0) -> list[Batch]:
    """23 samples, and before each of the first `unreadable` an unreadable one with the image of another."""
    images = torch.randn(23, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(23)
    rows = torch.tensor([row for i in range(23) for row in ([22 - i, i] if i < unreadable else [i])])
    bad = torch.tensor([mark for i in range(23) for mark in ([True, False] if i < unreadable else [False])])
    return Batch(images[rows], (ids % 9)[rows], ids[rows], torch.zeros_like(rows), bad).split(size)


@pytest.mark.parametrize(("size", "unreadable"), [(1, 2), (5, 0), (5, 7), (23, 1)])
def test_accuracy_and_mean_loss_do_not_depend_on_the_batches_nor_on_unreadable_samples(
    size: int, unreadable: int
) -> None:
    objective = Linear().train()
    (whole,) = batches(23)
    logits = whole.images.flatten(1)
    expected = 100 * (logits.argmax(1) == whole.labels).double().mean().item()
    found = evaluate.percentages(evaluate.accuracy(objective, batches(size, unreadable), CPU), 23)
    assert found["top1"] == pytest.approx(expected)
    assert found["num_test_images"] == 23
    loss, count = evaluate.mean_loss(objective, batches(size, unreadable), CPU)
    assert (loss, count) == (pytest.approx(logits.sum(1).mean().item(), rel=1e-6), 23)
    assert not any(objective.modes)
    assert objective.training


def neighbours_by_loop(
    bank: list, bank_labels: list[int], query: list, num_classes: int, k: int, t: float
) -> list[float]:
    def cosine(a: list, b: list) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    near = sorted(((cosine(query, f), label) for f, label in zip(bank, bank_labels, strict=True)), reverse=True)[:k]
    return [sum(math.exp(s / t) for s, label in near if label == c) for c in range(num_classes)]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (1000, 0.2)])
def test_knn_is_a_plain_loop(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (60, 40))
    bank_labels, labels = (torch.randint(0, 4, (n,), generator=generator) for n in (60, 40))
    votes = [neighbours_by_loop(bank.tolist(), bank_labels.tolist(), q, 4, k, temperature) for q in queries.tolist()]
    top1 = sum(max(range(4), key=vote.__getitem__) == label for vote, label in zip(votes, labels.tolist(), strict=True))
    counts = evaluate.knn((bank.float(), bank_labels), (queries.float(), labels), 4, k, temperature)
    assert counts.tolist() == [top1, 40, 40]
    assert 0 < top1 < 40


def test_knn_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = ((torch.randn(n, 6, generator=generator), torch.randint(0, 9, (n,))) for n in (60, 40))
    whole = evaluate.knn(bank, queries, 9, 10, 0.07)
    for chunk in (1, 7, 40):
        monkeypatch.setattr(evaluate, "CHUNK", chunk)
        assert evaluate.knn(bank, queries, 9, 10, 0.07).tolist() == whole.tolist()


def test_features_are_in_the_order_of_the_batches() -> None:
    (whole,) = batches(23)
    pixels = whole.images.flatten(1)
    backbone = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    values, labels = evaluate.features(backbone, pixels.shape[1], batches(5, unreadable=3), torch.device("cpu"))
    assert torch.equal(values, pixels)  # and nothing was dropped out
    assert torch.equal(labels, whole.labels)


def test_a_rank_without_samples_has_no_features() -> None:
    values, labels = evaluate.features(nn.Identity(), 12, [], torch.device("cpu"))
    assert values.shape == (0, 12)
    assert labels.shape == (0,)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 1e4, 1e-8])
def test_ridge_of_features_that_are_all_the_same_gives_the_shares_of_the_classes(scale: float) -> None:
    """A backbone that has collapsed: nothing to learn, and no reason to end without a result."""
    generator = torch.Generator().manual_seed(0)
    row, labels = scale * torch.rand(1, 7, generator=generator), torch.arange(90) % 9 % 4
    ridge = evaluate.Ridge(7, 4, CPU)
    for marks in labels.split(31):
        ridge.add(row.expand(len(marks), -1), marks)
    weight, bias = ridge.solve((1e-6, 1.0))
    shares = labels.bincount(minlength=4) / 90
    assert ((row.double() @ weight)[:, 0] + bias - shares).abs().max() < 1e-3
