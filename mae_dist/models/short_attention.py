"""Attention of short sequences as one operator of torch, whose kernels are in `attention_kernels`.

It is an operator because torch.compile and autograd then take it as a whole. Triton comes with torch for CUDA, and is
imported when the operator runs first.
"""

import importlib.util

import torch
from torch import Tensor

LONGEST = WIDEST = 128
"""Most tokens, and most channels of a head, for which it is used: more do not fit into a program."""


def fits(device: torch.device) -> bool:
    """Whether the kernels run on a device: an NVIDIA GPU that multiplies bf16 (Ampere or newer), with Triton there."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def takes(qkv: Tensor, num_heads: int) -> bool:
    """Whether it is used for these queries, keys and values (b, n, 3 h c), on a device that `fits`."""
    return qkv.element_size() == 2 and qkv.shape[1] <= LONGEST and qkv.shape[2] <= 3 * num_heads * WIDEST


@torch.library.custom_op("mae_dist::short_attention", mutates_args=(), schema="(Tensor qkv, int num_heads) -> Tensor")
def short_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention (Vaswani et al. 2017, eq. 1) from 16-bit queries, keys and values side by side, (b, n, 3 h c), as
    a linear layer gives them; the results of all heads side by side, (b, n, h c). The softmax is computed in fp32.
    """
    from mae_dist.models import attention_kernels

    out = result_of(qkv, num_heads)
    attention_kernels.forward(qkv.contiguous(), out, num_heads)
    return out


@short_attention.register_fake
def result_of(qkv: Tensor, num_heads: int) -> Tensor:  # noqa: ARG001
    """The result without its values."""
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op(
    "mae_dist::short_attention_backward", mutates_args=(), schema="(Tensor qkv, Tensor d_out, int num_heads) -> Tensor"
)
def short_attention_backward(qkv: Tensor, d_out: Tensor, num_heads: int) -> Tensor:
    """The gradient (b, n, 3 h c) with respect to `qkv` from that of the result."""
    from mae_dist.models import attention_kernels

    qkv = qkv.contiguous()
    d_qkv = torch.empty_like(qkv)
    attention_kernels.backward(qkv, d_out.contiguous(), d_qkv, num_heads)
    return d_qkv


@short_attention_backward.register_fake
def _(qkv: Tensor, d_out: Tensor, num_heads: int) -> Tensor:  # noqa: ARG001
    return qkv.new_empty(qkv.shape)


def _keep(ctx, inputs, output) -> None:  # noqa: ARG001
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, d_out: Tensor) -> tuple[Tensor, None]:
    return short_attention_backward(ctx.saved_tensors[0], d_out, ctx.num_heads), None


short_attention.register_autograd(_backward, setup_context=_keep)
