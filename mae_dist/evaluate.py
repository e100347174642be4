"""Evaluation with exact counts: every sample of a split once, on any number of ranks. Unreadable ones (`Batch.bad`),
in whose place a batch has others, count nowhere.

Takes modules and batches, gives numbers; knows no file and no configuration.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_dist import dist, rng
from mae_dist.batch import Batch
from mae_dist.watchdog import progress

CHUNK = 1024
"""Test features compared with all training features at once."""
RESAMPLES = 1000
RANK_EPS = 1e-7
"""What RankMe adds to each share."""
ROUNDING = 1e-12
"""What a variance from sums in float64 may be off by, as a share of the mean square."""


@torch.no_grad()
def mean_loss(
    objective: nn.Module, batches: Iterable[Batch], device: torch.device,
    each: Callable[[Batch, Tensor], None] = lambda *_: None,
) -> tuple[float, int]:  # fmt: skip
    """Mean per-sample loss over all ranks, and the number of samples. ``each`` is called with every batch and the
    objective's prediction.
    """
    objective.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        readable, (losses, prediction) = ~batch.bad, objective(batch)
        total += torch.stack([losses.double()[readable].sum(), readable.double().sum()])
        each(batch, prediction)
    objective.train()
    loss, count = dist.all_reduce_sum(total).tolist()
    if not count:
        raise ValueError("no test image can be read")
    return loss / count, int(count)


@torch.no_grad()
def accuracy(objective: nn.Module, batches: Iterable[Batch], device: torch.device) -> Int[Tensor, " 3"]:
    """`hits` over all ranks of an objective that predicts logits."""
    objective.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for batch in batches:
        prediction, readable = objective(batch).prediction, ~batch.bad
        counts += hits(prediction[readable], batch.labels[readable])
    objective.train()
    return dist.all_reduce_sum(counts)


def hits(scores: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]) -> Int[Tensor, " 3"]:
    """Counts of [label is first, label is among the first five, samples]; NaN scores hit nothing."""
    first = scores.nan_to_num(-torch.inf).topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
    first &= scores.isfinite().all(1, keepdim=True)
    return torch.stack([first[:, 0].sum(), first.any(1).sum(), first.new_tensor(len(labels), dtype=torch.int64)])


def percentages(counts: Int[Tensor, " 3"], num_images: int) -> dict[str, float]:
    """{"top1", "top5" (percent), "num_test_images"} from counts of `hits` over a split of `num_images`, and where some
    of these are unreadable their "num_unreadable". Raises ValueError where all are.
    """
    top1, top5, total = counts.tolist()
    if not total:
        raise ValueError(f"none of the {num_images} test images can be read")
    numbers: dict[str, float] = {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "num_test_images": total}
    return numbers | unreadable(total, num_images)


def unreadable(total: int, num_images: int) -> dict[str, float | int]:
    """{"num_unreadable"} of a split of `num_images` of which `total` counted; {} where that is none."""
    return {"num_unreadable": num_images - total} if total < num_images else {}


@torch.no_grad()
def features(
    module: nn.Module, dim: int, batches: Iterable[Batch], device: torch.device,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:  # fmt: skip
    """This rank's features (`dim` numbers each), which the module, or else its method `encode`, makes of images, and
    labels; both empty where its part of the split is. Leaves the module in evaluation mode.
    """
    module.eval()
    encode = encode or module
    values, labels = [torch.zeros(0, dim, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for batch in batches:
        readable = ~batch.bad
        values.append(encode(batch.images).float()[readable])
        labels.append(batch.labels[readable])
    return torch.cat(values), torch.cat(labels)


@torch.no_grad()
def input_statistics(
    layer: nn.Linear, objective: nn.Module, batches: Iterable[Batch], device: torch.device
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and standard deviation of each number that `layer` reads when `objective` is called, over the samples of all
    ranks. Raises ValueError when none can be read.
    """
    objective.eval()
    sums = torch.zeros(3, layer.in_features, dtype=torch.float64, device=device)
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        for batch in batches:
            objective(batch)
            x = seen.pop()[~batch.bad].double()
            sums += torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
    objective.train()
    count, total, squares = dist.all_reduce_sum(sums)
    if not count[0]:
        raise ValueError("none of the training images from which a fine-tuning starts can be read")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


def knn(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, k: int, temperature: float
) -> Int[Tensor, " 3"]:
    """`hits` of nearest neighbours by cosine, votes exp(similarity / temperature) (Wu et al. 2018, section 3.4)."""
    bank = nn.functional.normalize(train[0], dim=1), train[1]
    counts = torch.zeros(3, dtype=torch.int64, device=train[0].device)
    for queries, labels in chunks(test):
        counts += hits(votes(bank, queries, num_classes, k, temperature), labels)
    return counts


def chunks(samples: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, labels) of CHUNK samples after one another."""
    for rows, labels in zip(samples[0].split(CHUNK), samples[1].split(CHUNK), strict=True):
        progress()
        yield rows, labels


def votes(
    bank: tuple[Tensor, Tensor], queries: Float[Tensor, "b d"], num_classes: int, k: int, temperature: float
) -> Float[Tensor, "b classes"]:
    """Votes for each class of a query's k nearest neighbours in `bank` = (features of length 1, labels); see `knn`."""
    similarity, nearest = (nn.functional.normalize(queries, dim=1) @ bank[0].T).topk(min(k, len(bank[0])), 1)
    found = torch.zeros(len(queries), num_classes, device=queries.device)
    return found.scatter_add_(1, bank[1][nearest], ((similarity - 1) / temperature).exp())


class Ridge:
    """Ridge regression of one-hot labels on features in closed form (Hoerl and Kennard 1970), intercept unpenalised.

    Needs only sums over samples, in float64, so that every sample is seen once, by any rank.
    """

    def __init__(self, dim: int, num_classes: int, device: torch.device):
        self.gram = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(dim + 1, num_classes, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> None:
        """Add samples to this rank's sums."""
        x = nn.functional.pad(features.double(), (0, 1), value=1.0)
        self.gram += x.T @ x
        self.cross += x.T @ nn.functional.one_hot(labels, self.cross.shape[1]).double()

    def solve(self, penalties: Sequence[float]) -> tuple[Float[Tensor, "k d classes"], Float[Tensor, "k classes"]]:
        """Weights and intercepts for each penalty, a multiple of the features' mean variance; all ranks together.

        No penalty is less than the rounding of the variances, so that features which are all the same, of a backbone
        that has collapsed, give the classes' shares.
        """
        gram, cross = dist.all_reduce_sum(self.gram.clone()), dist.all_reduce_sum(self.cross.clone())
        count, mean, share = gram[-1, -1], gram[-1, :-1] / gram[-1, -1], cross[-1] / gram[-1, -1]
        covariance = gram[:-1, :-1] / count - torch.outer(mean, mean)
        penalty = torch.tensor(penalties, dtype=torch.float64, device=gram.device) * covariance.diagonal().mean()
        floor = ROUNDING * gram.diagonal()[:-1].mean() / count + torch.finfo(torch.float64).tiny
        penalty = torch.maximum(penalty, floor)
        identity = torch.eye(len(mean), dtype=torch.float64, device=gram.device)
        target = cross[:-1] / count - torch.outer(mean, share)
        weight = torch.linalg.solve(covariance + penalty[:, None, None] * identity, target.expand(len(penalty), -1, -1))
        return weight, share - mean @ weight


def linear_scores(
    rows: Float[Tensor, "b d"], weight: Float[Tensor, "k d classes"], bias: Float[Tensor, "k classes"]
) -> Float[Tensor, "b k classes"]:
    """Scores of several linear maps of the same features."""
    return torch.einsum("bd,kdc->bkc", rows.double(), weight) + bias


def ridge(
    train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int,
    penalties: Sequence[float],
) -> Int[Tensor, " 3"]:  # fmt: skip
    """`hits` over all ranks of ridge regression, with the penalty that is best on `held`; arguments are this rank's
    (features, labels).
    """
    sums = Ridge(train[0].shape[1], num_classes, train[0].device)
    for rows, labels in chunks(train):
        sums.add(rows, labels)
    weight, bias = sums.solve(penalties)

    def count(samples: tuple[Tensor, Tensor]) -> Int[Tensor, "k 3"]:
        counts = torch.zeros(len(weight), 3, dtype=torch.int64, device=weight.device)
        for rows, labels in chunks(samples):
            counts += torch.stack([hits(scores, labels) for scores in linear_scores(rows, weight, bias).unbind(1)])
        return dist.all_reduce_sum(counts)

    best = int(count(held)[:, 0].argmax())
    weight, bias = weight[best : best + 1], bias[best : best + 1]
    return count(test)[0]


def rankme(features: Float[Tensor, "n d"]) -> float:
    """Effective rank of the features of all ranks (RankMe, Garrido et al. 2023, equations 1 and 2): the exponential of
    the entropy of the singular values, as shares of their sum. They are the roots of the Gram matrix's eigenvalues, so
    that only sums over samples are needed.
    """
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(CHUNK):
        gram += rows.double().T @ rows.double()
    num_samples = int(dist.all_reduce_sum(torch.tensor(len(features), device=features.device)))
    singular = torch.linalg.eigvalsh(dist.all_reduce_sum(gram))[-num_samples:].clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + RANK_EPS
    return float((-share * share.log()).sum().exp())


def is_chance(top1: float, num_images: int, share: float) -> bool:
    """Whether a top-1 accuracy in percent is, within two standard errors, not above that of always guessing the most
    frequent class, which is this `share` of the images.
    """
    return top1 <= 100 * (share + 2 * math.sqrt(share * (1 - share) / num_images))


def bootstrap(num_hits: int, num_images: int, seed: int) -> tuple[float, float]:
    """95 % interval of a top-1 accuracy, in percent: percentiles over RESAMPLES of the test images (Efron 1979).

    A resample of hits and misses has a binomial number of hits, so that number is drawn.
    """
    words = rng.bits(seed, rng.Purpose.BOOTSTRAP, 0, np.zeros(1, dtype=np.int64), 4)[0]
    drawn = np.random.default_rng(words.tolist()).binomial(num_images, num_hits / num_images, RESAMPLES)
    low, high = np.percentile(100 * drawn / num_images, [2.5, 97.5])
    return float(low), float(high)
