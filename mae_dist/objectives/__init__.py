"""Objectives: what is learned. Each is a module that holds a `backbone` and maps a Batch to per-sample losses."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Output(NamedTuple):
    """What an objective says of a micro-batch: each sample's loss, and its prediction (logits, or masked pixels)."""

    loss: Float[Tensor, " b"]
    prediction: Float[Tensor, "b ..."]
