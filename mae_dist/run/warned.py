"""Warnings of a run: each is one sentence with the setting to change, logged once and recorded as an event `warn`.

Imports no torch.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mae_dist import config as configuration
from mae_dist import environment, hints
from mae_dist.run import events, jsonl, layout
from mae_dist.schema import PretrainConfig, ProbeConfig, RunConfig

log = logging.getLogger(__name__)

FEW_STEPS = 3
"""Steps an epoch below which the batch is too large for the data."""
USUAL_RATIO = 0.75
"""The mask ratio of He et al. 2022."""
USUAL_LR = {
    ("pretrain", "adamw"): (3e-5, 5e-3, 1.5e-4), ("pretrain", "muon"): (3e-5, 5e-3, 1.5e-4),
    ("finetune", "adamw"): (6e-5, 5e-3, 5e-4), ("finetune", "muon"): (6e-5, 5e-3, 5e-4),
    ("probe", "lars"): (0.01, 50.0, 0.1),
}  # fmt: skip
"""(Verb, optimizer) -> the least base_lr, the limit of its peak, and the base_lr of He et al. 2022. What lies outside
is about ten times off all recipes, or was already multiplied by the batch. With few images a step base_lr may be large,
with many the peak must not be.
"""


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


def of_settings(verb: str, config: RunConfig, num_samples: int, on_cpu: bool) -> Iterator[Warned]:
    """Settings that are possible, but seldom meant: a batch that is most of the data, a warmup that does not end, an lr
    that is far off, and 16 bits on a CPU like this machine's.
    """
    batch, precision = config.train.global_batch, config.train.precision
    settings, epochs = getattr(config, "optim", None), configuration.total_steps(config.train, num_samples)
    epochs *= batch / num_samples
    if settings is not None and num_samples < FEW_STEPS * batch:
        more = ", so that a step shows images more than once" if num_samples < batch else ""
        yield Warned(
            "train.global_batch",
            f"train.global_batch={batch}: an epoch of {num_samples} images is {num_samples / batch:.2g} steps{more}; a "
            f"smaller batch gives more",
        )
    if settings is not None and epochs and settings.warmup_epochs >= epochs:
        yield Warned(
            "optim.warmup_epochs",
            f"optim.warmup_epochs={settings.warmup_epochs:g}: the run has {epochs:.3g} epochs, so its lr does not "
            f"reach its peak before the end; set it to {epochs / 20:.2g}, or make the run longer",
        )
    if settings is not None and not (isinstance(config, ProbeConfig) and config.heads.active):
        yield from _of_lr(verb, config, settings.name, settings.base_lr, settings.peak_lr(batch))
    if on_cpu and precision not in ("fp32", *environment.fast_precisions()):
        yield Warned(
            "train.precision",
            f"train.precision={precision}: this CPU has no instructions for it; fp32 is faster",
        )


def _of_lr(verb: str, config: RunConfig, name: str, base_lr: float, peak: float) -> Iterator[Warned]:
    low, limit, usual = USUAL_LR.get((verb, name), (0.0, float("inf"), base_lr))
    if base_lr >= low and peak < limit:
        return
    what = f"is below the usual {low:g}" if base_lr < low else f"rises to {peak:g}, and usually stays below {limit:g}"
    yield Warned(
        "optim.base_lr",
        f"optim.base_lr={base_lr:g}: the lr, times train.global_batch={config.train.global_batch} / 256, {what} in "
        f"{verb} with {name}; set optim.base_lr={usual:g}, the paper's",
    )


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
                    f"track.band {word} at {end:g}",
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
