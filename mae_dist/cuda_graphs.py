"""Forward and backward passes as CUDA graphs: one call of the host launches all kernels of a micro-batch.

A small model's kernels take less time than the host needs to launch them one by one, and the GPU waits. What is
captured once is replayed on the next batch with the same kernels, in the same order, at the same addresses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_dist.batch import Batch

WARM_UP = 3
"""Passes before a capture, in which libraries choose their kernels, and torch.compile compiles."""


class Captured(NamedTuple):
    """A graph, the batch that it reads, and the loss and gradients that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedPasses:
    """`passes(batch)` as graphs: it computes a loss without waiting for the device, and adds its gradients to `.grad`
    of the `trained` parameters of `module`. A graph is captured for each shape of a batch that comes first in a step,
    and of one that comes after it, whose gradients are added.
    """

    def __init__(self, passes: Callable[[Batch], Tensor], module: nn.Module, trained: list[nn.Parameter]):
        self.passes, self.module, self.trained = passes, module, trained
        self.captured: dict[tuple[torch.Size, ...], Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.first: torch.Size | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, valid until the next call; gradients are in `.grad`, which the first micro-batch
        of a step finds empty.
        """
        shape = batch.images.shape
        if all(parameter.grad is None for parameter in self.trained):
            key, self.first = (shape,), shape
        else:
            assert self.first is not None
            key = (shape, self.first)
        if key not in self.captured:
            self.captured[key] = self._capture(batch)
        found = self.captured[key]
        for place, part in zip(found.batch, batch, strict=True):
            place.copy_(part, non_blocking=True)
        found.graph.replay()
        set_gradients(self.trained, found.gradients)
        return found.loss

    def _capture(self, batch: Batch) -> Captured:
        static, graph = Batch(*(part.clone() for part in batch)), torch.cuda.CUDAGraph()
        before, buffers = [parameter.grad for parameter in self.trained], list(self.module.buffers())
        values = [buffer.clone() for buffer in buffers]
        set_gradients(self.trained, [None] * len(before))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.passes(static)
                set_gradients(self.trained, [None] * len(before))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # of what the warm-up held, which the graph has no use for
        set_gradients(self.trained, before)
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.passes(static)
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        return Captured(graph, static, loss, [parameter.grad for parameter in self.trained])


def set_gradients(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    """Set `.grad` of each parameter."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
