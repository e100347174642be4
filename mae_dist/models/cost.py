"""Cost of a forward pass in multiply-adds and in memory kept for the backward pass, counted without weights.

The module runs on the meta device, where tensors have shapes and no storage, so the code that trains is counted itself.
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
    """Cost of one forward pass.

    ``multiply_adds`` counts those of matrix products and convolutions, which the papers' tables call FLOPs.
    ``activations`` is the memory in bytes that autograd keeps for the backward pass, without parameters.
    """

    multiply_adds: int
    activations: int


def num_parameters(module: nn.Module) -> int:
    """Number of elements in all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count(module: nn.Module, *inputs: Any) -> Cost:
    """Cost of `module(*inputs)`, all on the meta device; with a batch of one it is the cost per image.

    Attention is counted as the fused kernels compute it: they keep queries, keys, values, the result and one number a
    row, but not the attention matrix.
    """
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FusedAttention(), Counter() as counter:
        module(*inputs)
    return Cost(counter.flops // 2, sum(storage.nbytes() for storage in kept.values()))


def of_depths(measure: Callable[..., Cost], *depths: int) -> Cost:
    """`measure(*depths)`, extrapolated from depths 1 and 2, as every further block of a stack costs the same."""
    shallow = [min(depth, 1) for depth in depths]
    total = base = measure(*shallow)
    for number, depth in enumerate(depths):
        if depth > 1:
            deeper = measure(*shallow[:number], 2, *shallow[number + 1 :])
            total = Cost(*(t + (depth - 1) * (d - b) for t, d, b in zip(total, deeper, base, strict=True)))
    return total


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of all operations, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FusedAttention(TorchFunctionMode):
    """Replaces torch's attention, which is not fused on the meta device, by `Fused`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = Fused.apply if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """The two matrix products of attention, keeping what a fused kernel keeps; its values have no meaning."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = (
            (q @ k.transpose(2, 3) @ v).transpose(1, 2).contiguous().transpose(1, 2)
        )  # heads side by side in memory
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:3]))
        return result
