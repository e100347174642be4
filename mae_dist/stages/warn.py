"""What a run warns of beside its settings and curve: labels that are all the same, and a result that says nothing."""

from collections.abc import Iterator

from mae_dist import evaluate
from mae_dist.data.index import ShardIndex
from mae_dist.data.split_checks import label_counts
from mae_dist.run.warned import Warned


def of_labels(split: ShardIndex) -> Iterator[Warned]:
    """Labels that are all the same, where it is known how many there are of each."""
    counts = label_counts(split)
    if counts is not None and len(counts) == 1 and len(split) > 1:
        (label,) = counts
        yield Warned(
            "labels",
            f"all labels of the training split are {label}, so there is nothing to tell apart; check what "
            f"`mae-dist data show` draws, and index or pack again with other --labels",
        )


def of_chance(top1: float, num_images: int, test: ShardIndex, num_classes: int, what: str) -> Iterator[Warned]:
    """A top-1 accuracy in percent, after training, that guessing has as well."""
    counts = label_counts(test)
    share = max(counts.values()) / sum(counts.values()) if counts else 1 / num_classes
    if share < 1 and evaluate.is_chance(top1, num_images, share):
        yield Warned(
            f"{what} at chance",
            f"{what}: {top1:.4g} % of {num_images:,} test images is no better than always guessing one class "
            f"({100 * share:.3g} %): the labels may not belong to their images (`mae-dist data show` draws them), or "
            f"training was too short or its lr off (train.epochs, optim.base_lr)",
        )
