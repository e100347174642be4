"""Placing an objective on the machine: precision and data parallelism, applied from outside the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_dist import dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(objective: nn.Module, device: torch.device) -> nn.Module:
    """Move the objective to the device and, with several ranks, wrap it in DDP. It keeps the parameters."""
    objective.to(device)
    if dist.world() == 1:
        return objective
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


def accumulate(module: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients meet on the last micro-batch of a step only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def precision(name: str, device: torch.device) -> AbstractContextManager:
    """The arithmetic of forward passes; weights and gradients stay fp32."""
    if name == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[name])
