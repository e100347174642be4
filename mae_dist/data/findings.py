"""What is wrong with the tars of a data set together, from the reports of each: copies, labels, their order, channels.

Pure: reads no file. Imports no torch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_dist.data.check import Report
from mae_dist.data.tally import Tally
from mae_dist.data.tar_reader import Notes

UNREADABLE = "unreadable"
KINDS = {
    "tar": "tars or indexes that have changed, or are damaged",
    UNREADABLE: "samples that cannot be used",
    "copy": "images that are copies of another one of their split",
    "other label": "copies that have another label",
    "shared": "images that are also in another split",
    "labels": "labels of a split",
    "order": "order of samples",
    "channels": "channels",
}
"""Kinds of findings, in the order in which they are printed."""
SORTED = 0.75
"""Classes that are shuffled together, as a share of those of shuffled data, below which tars count as sorted."""


class Finding(NamedTuple):
    """Something wrong: its kind, its split, where it concerns one tar or image that, and a phrase."""

    kind: str
    split: str
    what: str
    tar: str = ""
    image: str = ""


class Checked(NamedTuple):
    """A tar that was checked: its path, its report, and the images that are in quarantine already."""

    tar: Path
    report: Report
    quarantined: frozenset[str]


@dataclass(frozen=True)
class Facts:
    """What a split holds, samples in quarantine and unreadable ones left out; ``classes`` maps label to images,
    ``notes`` is what indexing tells beside findings.
    """

    num_tars: int
    num_images: int
    num_unreadable: int
    num_quarantined: int
    num_unlabelled: int
    classes: dict[int, int]
    tally: Tally
    notes: Notes


def facts(tars: Sequence[Checked]) -> Facts:
    """Sums over the tars of a split."""
    labels, notes = Counter(label for tar in tars for _, label in _labels(tar)), Notes()
    for tar in tars:
        notes.update_from(Notes(tar.report.notes))
    return Facts(
        len(tars), labels.total(), sum(len(tar.report.unreadable.keys() - tar.quarantined) for tar in tars),
        sum(len(tar.quarantined) for tar in tars), labels.pop(-1, 0), dict(sorted(labels.items())),
        sum((tar.report.tally for tar in tars), Tally()), notes,
    )  # fmt: skip


def findings(
    splits: Mapping[str, Sequence[Checked]], num_classes: int | None, window: int, unlabelled: bool = False
) -> Iterator[Finding]:
    """Everything that is wrong with these splits. ``window``: data.shuffle_window; ``num_classes``: if known;
    ``unlabelled``: samples without a label cannot be used, in splits that have labels.
    """
    for split, tars in splits.items():
        for tar, report, quarantined in tars:
            yield from (Finding("tar", split, fault, str(tar)) for fault in report.faults)
            if unknown := quarantined.difference(report.names):
                what = f"quarantine.txt names {min(unknown)}, which its index lacks; remove that line"
                yield Finding("tar", split, what, str(tar))
            for image, reason in report.unreadable.items():
                if image not in quarantined:
                    yield Finding(UNREADABLE, split, reason, str(tar), image)
        found = facts(tars)
        for tar in tars if found.classes and unlabelled else ():
            missing = (image for image, label in _labels(tar) if label < 0)
            yield from (Finding(UNREADABLE, split, "has no label", str(tar.tar), image) for image in missing)
        total = num_classes or max(found.classes, default=-1) + 1
        total = total if split == "train" or "train" not in splits else 0  # others may lack classes
        yield from (Finding("labels", split, what) for what in _label_faults(found, total, unlabelled))
        yield from (Finding("order", split, what) for what in _order_faults(tars, found, window))
        flat = [str(channel) for channel, std in enumerate(found.tally.std or ()) if not std]
        if flat:
            yield Finding("channels", split, f"channel {', '.join(flat)} of all images has one value")
    yield from _copies(splits)
    yield from _unknown_classes(splits)


def _labels(tar: Checked) -> Iterator[tuple[str, int]]:
    """(image, label) of the samples that count."""
    return ((image, label) for image, label in tar.report.labels.items() if image not in tar.quarantined)


def _label_faults(found: Facts, total: int, unlabelled: bool) -> Iterator[str]:
    """Whether images lack labels, and which of `total` classes lack images. Where `unlabelled` ones cannot be used,
    those of a split with labels are named one by one.
    """
    if found.num_unlabelled and bool(found.classes) != unlabelled:
        hint = "" if unlabelled else " (--unlabelled lists them, and with --quarantine leaves them out)"
        yield f"{found.num_unlabelled} of {found.num_images} images have no label{hint}"
    if found.classes and (gaps := total - len(found.classes)) > 0:
        first = next(label for label in range(total) if label not in found.classes)
        yield f"{gaps} of {total} classes have no image, {first} first"


def _order_faults(tars: Sequence[Checked], found: Facts, window: int) -> Iterator[str]:
    """Whether the tars are sorted by class, so that those which are shuffled together lack most classes."""
    held = Counter(label for tar in tars for label in {label for _, label in _labels(tar) if label >= 0})
    if len(held) < 2 or len(tars) <= window:
        return
    sizes = np.array([found.classes[label] for label in held])
    if_shuffled = len(tars) * (1 - (1 - 1 / len(tars)) ** sizes)  # tars that would hold each class
    here, shuffled = (
        float((1 - (1 - window / len(tars)) ** spread).mean()) for spread in (np.array([*held.values()]), if_shuffled)
    )
    if here < SORTED * shuffled:
        yield (
            f"tars are sorted by class: data.shuffle_window={window} of {len(tars)} hold {here:.0%} of the classes, "
            f"shuffled ones {shuffled:.0%}; pack them anew, or raise data.shuffle_window"
        )


def _copies(splits: Mapping[str, Sequence[Checked]]) -> Iterator[Finding]:
    """Images whose files are the same, within a split and in several."""
    first: dict[int, tuple[str, str, str, int]] = {}
    for split, tars in splits.items():
        for tar in tars:
            for image, label in _labels(tar):
                here = split, str(tar.tar), image, label
                before = first.setdefault(tar.report.hashes[image], here)
                if before is here:
                    continue
                other = f"{before[2]} in {Path(before[1]).name}"
                if before[0] != split:
                    yield Finding("shared", split, f"is {other} of {before[0]}", *here[1:3])
                elif before[3] != label:
                    yield Finding("other label", split, f"label {label}; {other} has {before[3]}", *here[1:3])
                else:
                    yield Finding("copy", split, f"is {other}", *here[1:3])


def _unknown_classes(splits: Mapping[str, Sequence[Checked]]) -> Iterator[Finding]:
    """Labels of other splits that the training split lacks."""
    classes = {split: facts(tars).classes.keys() for split, tars in splits.items()}
    for split, labels in classes.items():
        if (known := classes.get("train")) and (missing := sorted(labels - known)):
            yield Finding("labels", split, f"{len(missing)} classes that train lacks, {missing[0]} first")
