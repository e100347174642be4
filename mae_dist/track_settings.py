"""Checks of what a run measures of itself and keeps by it: settings that contradict each other. Imports no torch."""

import math

from mae_dist.schema import PretrainConfig, ProbeConfig, RunConfig

ONLINE = {"knn": "knn_top1", "ridge": "ridge_top1", "rankme": "rankme"}
"""Words of track.online -> the number in an evaluation."""


def needs_labels(config: RunConfig) -> bool:
    """Whether the evaluations of a pretraining need labels, and a test split."""
    return isinstance(config, PretrainConfig) and bool({"knn", "ridge"} & {*config.track.online})


def measured(config: RunConfig) -> list[str]:
    """The numbers in an evaluation of a run by which a checkpoint can be the best."""
    if isinstance(config, PretrainConfig):
        return ["test_loss", *(ONLINE[word] for word in dict.fromkeys(config.track.online))]
    if isinstance(config, ProbeConfig) and config.heads.active:
        return ["held_out_top1"]
    return ["test_top1", "test_top5"]


def check(config: RunConfig) -> None:
    """Refuse a best checkpoint by a number that is not measured, or not on the way, and a band that is none
    (ValueError).
    """
    check_band(config)
    best, known = config.checkpoint.keep_best, measured(config)
    if best is not None and best not in known:
        word = next((word for word, name in ONLINE.items() if name == best), "")
        add = f", or track.online=[{word}], which measures it" if word and isinstance(config, PretrainConfig) else ""
        raise ValueError(f"checkpoint.keep_best={best}: this run measures {', '.join(known)}; choose one of them{add}")
    if best is not None and config.track.evaluate_every is None:
        raise ValueError(
            f"checkpoint.keep_best={best}: is measured at the end only; give track.evaluate_every, in epochs"
        )


def check_band(config: RunConfig, origin: str = "") -> None:
    """Refuse a track.band that is none (ValueError, which begins with ``origin``)."""
    end = 0.0
    for row in config.track.band:
        numbers = len(row) == 3 and all(type(n) in (int, float) and math.isfinite(n) for n in row)
        if not numbers or row[0] <= end or row[1] > row[2]:
            raise ValueError(
                f"{origin}track.band: {[*row]} must be [epoch, low, high], epochs above 0 and rising, low at most high"
            )
        end = row[0]
