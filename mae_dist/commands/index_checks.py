"""What is odd about tars that are indexed, or may be a mistake: refused, or logged. Imports no torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_dist.data import folder_words, grouping, index, labels
from mae_dist.data.indexing import AUTO, FOLDER, JSON, NO_LABELS, Indexed
from mae_dist.data.tar_reader import Notes

log = logging.getLogger(__name__)

SHOWN = 5
"""Names that a message lists."""


def refuse_doubtful_folders(found: Sequence[Indexed]) -> None:
    """Raise ValueError where folders may be splits, or parts of samples, and not classes."""
    names = {label for item in found for label in item.labels if isinstance(label, str)}
    if doubt := folder_words.doubt(names):
        raise ValueError(
            f"--labels {FOLDER}: {doubt}; write --labels {FOLDER}:N if the folder at level N is the class (1 the "
            f"first in the tar, -1 the last), or name the tars of one split, or other labels"
        )


def report_doubtful_folders(found: Sequence[Indexed], split: str) -> None:
    """Log that folders in the tars may be splits, or parts of samples."""
    names = {name for tar in labels.of_folders([[*filter(None, item.folders)] for item in found]) for name in tar}
    if len(names) > 1 and (doubt := folder_words.doubt({str(name) for name in names})):
        log.warning("folders in the tars: %s; all their images become split %s", doubt, split)


def refuse_mixed_labels(
    found: Sequence[Indexed], before: index.Dataset, others: dict[str, list[index.Shard]], classes: Path | None
) -> None:
    """Raise ValueError where these labels are names and those of another split numbers; warn of the reverse."""
    labelled = {name: shards for name, shards in others.items() if any(shard.num_labelled for shard in shards)}
    names = [label for item in found for label in item.labels if isinstance(label, str)]
    if names and labelled and before.classes is None and classes is None:
        raise ValueError(
            f"{found[0].shard.tar}: its labels are names ({names[0][:40]!r}), and those of split "
            f"{next(iter(labelled))} are numbers; list the names in the order of the numbers with --classes FILE"
        )
    if before.classes and not names and any(s.labels for known in labelled.values() for s in known):
        log.warning("labels that are numbers are taken as places in the list of classes of %s", index.FILE)


def report_notes(found: Sequence[Indexed]) -> None:
    """Log what is odd about the tars, each kind once."""
    notes = Notes()
    for item in found:
        notes.update_from(item.notes)
    for what, (count, example) in notes.items():
        log.warning("%s: %d (%s)", what, count, example)


def report_labels(
    found: Sequence[Indexed], values: list[np.ndarray], split: str, classes: list[str] | None, source: str
) -> None:
    """Log which labels there are, classes that do not occur, and, where there are none, how to get some.

    Raises ValueError where labels were asked for and there are none.
    """
    present = np.unique(np.concatenate(values))
    present = present[present >= 0]
    if len(present) == 0:
        others, fields = Counter[str](), dict.fromkeys(name for item in found for name in item.fields)
        for item in found:
            others += item.others
        folders = sorted({folder for item in found for folder in item.folders if folder})
        ways = [f"--labels {JSON}{name}" for name in list(fields)[:SHOWN]]
        if len(folders) > 1:
            ways.append(f"--labels {FOLDER} ({len(folders)} folders in the tars: {', '.join(folders[:3])}, ...)")
        no_labels = {"json", *grouping.IMAGES} - {"npy"}
        kinds = (kind for kind, _ in others.most_common(SHOWN) if kind.rpartition(".")[2] not in no_labels)
        ways += [f"--labels {kind}" for kind in kinds]
        hint = f"; perhaps {' or '.join(ways)}" if ways else ""
        if source not in (AUTO, NO_LABELS):
            raise ValueError(f"--labels {source}: gives no sample a label{hint}")
        if source == AUTO:
            log.warning("no labels: no KEY.cls holds a class number%s; pretraining needs none", hint)
        return
    last = int(present[-1])
    if classes is not None:
        listed = ", ".join(f"{number} {name}" for number, name in list(enumerate(classes))[:SHOWN])
        log.info("classes: %d names (%s%s)", len(classes), listed, ", ..." if len(classes) > SHOWN else "")
    labelled = sum(int((value >= 0).sum()) for value in values)
    if split == "train" and 2 * len(present) > labelled > 4:
        log.warning("%s classes of %s images: these labels may be captions or ids", len(present), labelled)
    if split == "train" and len(present) <= last:
        log.warning(
            "only %s of the %s classes 0 to %s occur in split %s; a head gets all %s of them, so number them without "
            "gaps (--labels FILE) if that is not meant", f"{len(present):,}", f"{last + 1:,}", f"{last:,}", split,
            f"{last + 1:,}",
        )  # fmt: skip


def report_twins(shards: list[index.Shard], split: str, others: dict[str, list[index.Shard]]) -> None:
    """Log the tars whose bytes are in another tar, too."""
    seen = {shard.sha256: f"{shard.tar} of split {name}" for name, known in others.items() for shard in known}
    for shard in shards:
        if (twin := seen.setdefault(shard.sha256, f"{shard.tar} of split {split}")) != f"{shard.tar} of split {split}":
            log.warning("%s: has the same bytes as %s", shard.tar, twin)
