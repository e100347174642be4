"""What a forward pass costs, in multiply-adds and in memory for the backward pass, counted without any weights.

A module is called on the meta device, where tensors have shapes and no storage, so that what is counted is the code
that trains and not a formula beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Cost(NamedTuple):
    """``multiply_adds``: those of matrix products and convolutions, which is what the papers' tables call FLOPs.
    ``activations``: bytes of different memory that autograd keeps until the backward pass, parameters not counted.
    """

    multiply_adds: int
    activations: int


def num_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count(module: nn.Module, *inputs: Any) -> Cost:
    """The cost of `module(*inputs)`, all of it on the meta device; of a batch of one, hence: per image.

    Attention is taken for what the fused kernels make of it: they keep queries, keys, values, the result and one number
    a row, and not the matrix of weights.
    """
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FusedAttention(), Counter() as counter:
        module(*inputs)
    return Cost(counter.flops // 2, sum(storage.nbytes() for storage in kept.values()))


def of_depths(measure: Callable[..., Cost], *depths: int) -> Cost:
    """`measure(*depths)` for stacks in which a block more always costs the same: shallow ones tell of any depth."""
    shallow = [min(depth, 1) for depth in depths]
    total = base = measure(*shallow)
    for number, depth in enumerate(depths):
        if depth > 1:
            deeper = measure(*shallow[:number], 2, *shallow[number + 1 :])
            total = Cost(*(t + (depth - 1) * (d - b) for t, d, b in zip(total, deeper, base, strict=True)))
    return total


class Counter(TorchDispatchMode):
    """Sums up torch's own formulas for the operations that are called."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FusedAttention(TorchFunctionMode):
    """Puts `Fused` in the place of torch's attention, which on the meta device is not fused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = Fused.apply if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """The two products of attention, and what a fused kernel keeps of them; for shapes only."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = (
            (q @ k.transpose(2, 3) @ v).transpose(1, 2).contiguous().transpose(1, 2)
        )  # heads side by side in memory
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:3]))
        return result
