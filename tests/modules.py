"""Modules for the tests of models, objectives and weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def randomised(module: M, deviation: float = 0.3) -> M:
    """The module with random numbers in all parameters except fixed positions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, deviation, generator=generator)
    return module
