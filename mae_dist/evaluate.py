"""Evaluation with exact counts: every sample of a split once, on any number of ranks.

Takes modules and batches, gives numbers; knows no file and no configuration.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist import dist
from mae_dist.batch import Batch

CHUNK = 1024
"""Test features compared with all training features at once."""


@torch.no_grad()
def mean_loss(objective: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean per-sample loss over all ranks."""
    objective.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        total += torch.stack(
            [objective(batch).loss.double().sum(), torch.tensor(float(batch.size), device=device).double()]
        )
    objective.train()
    loss, count = dist.sum_(total).tolist()
    return loss / count


@torch.no_grad()
def accuracy(objective: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """{"top1", "top5" (percent), "num_test_images"} of an objective that predicts logits."""
    objective.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for batch in batches:
        counts += hits(objective(batch).prediction, batch.labels)
    objective.train()
    return percentages(dist.sum_(counts))


def hits(scores: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]) -> Int[Tensor, 3]:
    """Counts of [label is first, label is among the first five, samples]; NaN scores hit nothing."""
    first = scores.nan_to_num(-torch.inf).topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
    first &= scores.isfinite().all(1, keepdim=True)
    return torch.stack([first[:, 0].sum(), first.any(1).sum(), first.new_tensor(len(labels), dtype=torch.int64)])


def percentages(counts: Int[Tensor, 3]) -> dict[str, float]:
    """Counts as `hits` gives them -> percent."""
    top1, top5, total = counts.tolist()
    return {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "num_test_images": total}


@torch.no_grad()
def features(
    backbone: nn.Module, dim: int, batches: Iterable[Batch], device: torch.device
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """This rank's features (`dim` numbers each) and labels; none, where its part of the split is empty."""
    backbone.eval()
    values, labels = [torch.zeros(0, dim, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for batch in batches:
        values.append(backbone(batch.images).float())
        labels.append(batch.labels)
    return torch.cat(values), torch.cat(labels)


def knn(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, k: int, temperature: float
) -> Int[Tensor, 3]:
    """`hits` of nearest neighbours by cosine, votes exp(similarity / temperature) (Wu et al. 2018, section 3.4)."""
    bank, bank_labels = nn.functional.normalize(train[0], dim=1), train[1]
    counts = torch.zeros(3, dtype=torch.int64, device=bank.device)
    for queries, labels in zip(test[0].split(CHUNK), test[1].split(CHUNK), strict=True):
        similarity, nearest = (nn.functional.normalize(queries, dim=1) @ bank.T).topk(min(k, len(bank)), 1)
        votes = torch.zeros(len(queries), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], ((similarity - 1) / temperature).exp())
        counts += hits(votes, labels)
    return counts
