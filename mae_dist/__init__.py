"""mae_dist: masked autoencoder pretraining, probing and fine-tuning on any number of ranks, from ordinary tars."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from mae_dist.trained import Trained

__version__ = "0.1.0"


def load(path: str | os.PathLike[str]) -> Trained:
    """The trained model in a run, RUN@STEP, an export, or a file of timm, transformers, Flax or the official MAE code,
    on the CPU: an object with `model`, `transform`, `features`, `reconstruct` and `predict`, see `trained.Trained`.

    Raises ValueError, in one sentence, where there is none. What a file does not record is assumed, with a warning.
    """
    from mae_dist.trained import load  # imports torch

    return load(path)
