# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
"""Attention of short sequences on a GPU, as two kernels: straight from a linear layer's queries, keys and values that
lie side by side, and in the backward pass straight into their gradients.

Kernels for long sequences walk over keys block by block, and add up gradients of queries from several places, in an
order that changes. A masked autoencoder has so few tokens that all keys of a head fit into one program: the softmax is
computed at once, again in the backward pass, and every number is written once, in the same order each time.
"""

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
SMALLEST = 16
"""Fewest rows and columns of a matrix product in Triton."""


@triton.jit
def weights_of(q, k, key, n, scale):
    """Attention weights of queries (rows, channels) over all keys, in fp32; `scale` includes log2(e)."""
    scores = tl.where((key < n)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward_kernel(
    qkv, out, n, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS queries of one head of one sample."""
    sample, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    qkv += sample * n * 3 * HEADS * WIDTH + head * WIDTH
    out += sample * n * HEADS * WIDTH + head * WIDTH
    channel, key = tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    of_key = key[:, None] * 3 * HEADS * WIDTH + channel[None, :]
    is_key = (key < n)[:, None] & (channel < WIDTH)[None, :]
    is_query = (query < n)[:, None] & (channel < WIDTH)[None, :]
    q = tl.load(qkv + query[:, None] * 3 * HEADS * WIDTH + channel[None, :], mask=is_query, other=0.0)
    k = tl.load(qkv + HEADS * WIDTH + of_key, mask=is_key, other=0.0)
    weights = weights_of(q, k, key, n, scale)
    v = tl.load(qkv + 2 * HEADS * WIDTH + of_key, mask=is_key, other=0.0)
    found = tl.dot(weights.to(v.dtype), v).to(v.dtype)
    tl.store(out + query[:, None] * HEADS * WIDTH + channel[None, :], found, mask=is_query)


@triton.jit
def backward_kernel(
    qkv, d_out, d_qkv, n, scale, d_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program for one head of one sample, ROWS queries at a time."""
    sample, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    qkv += sample * n * 3 * HEADS * WIDTH + head * WIDTH
    d_qkv += sample * n * 3 * HEADS * WIDTH + head * WIDTH
    d_out += sample * n * HEADS * WIDTH + head * WIDTH
    channel, key = tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    of_key = key[:, None] * 3 * HEADS * WIDTH + channel[None, :]
    is_key = (key < n)[:, None] & (channel < WIDTH)[None, :]
    k = tl.load(qkv + HEADS * WIDTH + of_key, mask=is_key, other=0.0)
    v = tl.load(qkv + 2 * HEADS * WIDTH + of_key, mask=is_key, other=0.0)
    d_k = tl.zeros([KEYS, CHANNELS], tl.float32)
    d_v = tl.zeros([KEYS, CHANNELS], tl.float32)
    for first in range(0, n, ROWS):
        query = first + tl.arange(0, ROWS)
        of_query = query[:, None] * 3 * HEADS * WIDTH + channel[None, :]
        is_query = (query < n)[:, None] & (channel < WIDTH)[None, :]
        q = tl.load(qkv + of_query, mask=is_query, other=0.0)
        d_o = tl.load(d_out + query[:, None] * HEADS * WIDTH + channel[None, :], mask=is_query, other=0.0)
        weights = weights_of(q, k, key, n, scale)
        d_v += tl.dot(tl.trans(weights.to(d_o.dtype)), d_o)
        d_weights = tl.dot(d_o, tl.trans(v))
        d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])  # of the softmax
        d_scores = (d_scores * d_scale).to(q.dtype)
        tl.store(d_qkv + of_query, tl.dot(d_scores, k).to(q.dtype), mask=is_query)
        d_k += tl.dot(tl.trans(d_scores), q)
    tl.store(d_qkv + HEADS * WIDTH + of_key, d_k.to(k.dtype), mask=is_key)
    tl.store(d_qkv + 2 * HEADS * WIDTH + of_key, d_v.to(v.dtype), mask=is_key)


def forward(qkv: Tensor, out: Tensor, num_heads: int) -> None:
    """Write attention (b, n, h c) from packed `qkv` (b, n, 3 h c), both contiguous."""
    n, width, keys, channels = sizes(qkv, num_heads)
    rows = min(64, keys)
    forward_kernel[(qkv.shape[0] * num_heads, triton.cdiv(n, rows))](
        qkv, out, n, LOG2_E * width**-0.5, num_heads, width, keys, channels, rows, num_warps=4
    )


def backward(qkv: Tensor, d_out: Tensor, d_qkv: Tensor, num_heads: int) -> None:
    """Write the gradient (b, n, 3 h c) with respect to `qkv` from that of the result (b, n, h c); all contiguous."""
    n, width, keys, channels = sizes(qkv, num_heads)
    scale = width**-0.5
    rows, warps = (keys, 4) if keys <= 64 else (32, 8)  # the fastest on an H100
    backward_kernel[(qkv.shape[0] * num_heads,)](
        qkv, d_out, d_qkv, n, LOG2_E * scale, scale, num_heads, width, keys, channels, rows, num_warps=warps
    )


def sizes(qkv: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """Tokens, channels of a head, and both as the powers of two that a program computes with."""
    n, width = qkv.shape[1], qkv.shape[2] // 3 // num_heads
    return n, width, max(triton.next_power_of_2(n), SMALLEST), max(triton.next_power_of_2(width), SMALLEST)
