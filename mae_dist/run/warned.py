"""Warnings of a run: each is one sentence with the setting to change, logged once and recorded as an event `warn`.

Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mae_dist import hints
from mae_dist.run import events, jsonl, layout
from mae_dist.schema import PretrainConfig, RunConfig

log = logging.getLogger(__name__)

FEW_STEPS = 3
"""Steps an epoch below which the batch is too large for the data."""
USUAL_RATIO = 0.75
"""The mask ratio of He et al. 2022."""


class Warned(NamedTuple):
    """What a warning is about, the same whenever it is found again, and its sentence."""

    about: str
    sentence: str


def warn(run: Path, step: int, found: Iterable[Warned]) -> None:
    """Log and record, on rank 0, the warnings that the run in the folder `run` has not had before."""
    known: set[str] | None = None
    for warned in found:
        known = {event["about"] for event in events.of(run, "warn")} if known is None else known
        if warned.about not in known:
            known.add(warned.about)
            log.warning("%s", warned.sentence)
            with suppress(OSError):  # the disk may be full, of which others speak
                events.append(run, "warn", step=step, about=warned.about, message=warned.sentence)


def outside_band(run: Path, config: RunConfig, before: float, epoch: float) -> Iterator[Warned]:
    """Of the rows of track.band that ended after the epoch `before`, `epoch` included, those that the mean training
    loss is outside of.
    """
    begin = 0.0
    for end, low, high in config.track.band:
        assert isinstance(config, PretrainConfig)  # no other verb reads the setting
        if before < end <= epoch:
            steps = jsonl.steps(run / layout.METRICS)
            losses = [step["loss"] for step in steps if begin < step["epoch"] <= end and "loss" in step]
            mean = sum(losses) / max(1, len(losses))
            if losses and not low <= mean <= high:
                word = "below" if mean < low else "above"
                yield Warned(
                    f"track.band {word}",
                    f"the mean loss of epochs {begin:g} to {end:g} is {mean:.3g}, {word} the recipe's {low:g} to "
                    f"{high:g} (track.band): compare with it, in this order, {', '.join(suspects(config, word))}",
                )
        begin = end


def suspects(config: PretrainConfig, word: str) -> list[str]:
    """Settings that put the loss below or above the band, the likeliest first: those that are unusual in that
    direction, then the others.
    """
    mae, below = config.mae, word == "below"
    unusual = {"mae.norm_pix": below and not mae.norm_pix, "mae.mask_ratio": below == (mae.mask_ratio < USUAL_RATIO)}
    unusual["mae.mask_ratio"] &= mae.mask_ratio != USUAL_RATIO
    values = {"mae.norm_pix": mae.norm_pix, "mae.mask_ratio": mae.mask_ratio, "optim.base_lr": config.optim.base_lr}
    names = [*values] if below else [*values][::-1]
    return [hints.given(name, values[name]) for name in sorted(names, key=lambda name: not unusual.get(name))]
