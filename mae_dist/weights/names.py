"""Conversion of names between mae_dist and another format: a table of modules, and attention as one matrix or three."""

import torch
from torch import Tensor

MAX_BLOCKS = 100


def name_table(once: dict[str, str], blocks: dict[str, str], parts: dict[str, str]) -> dict[str, str]:
    """Build a table from mae_dist's modules (or tokens) to another format's.

    ``once``: modules outside of blocks; ``blocks``: prefixes of stacks of blocks, with `{}` for the number; ``parts``:
    modules of each block.
    """
    numbered = {
        own_prefix.format(number) + own: prefix.format(number) + other
        for own_prefix, prefix in blocks.items()
        for own, other in parts.items()
        for number in range(MAX_BLOCKS)
    }
    return once | numbered


def convert_name(name: str, table: dict[str, str], separator: str) -> tuple[str, str] | None:
    """Split a tensor's name into (its module as `table` has it, the parameter's own name or ""); None if not there."""
    if name in table:
        return table[name], ""
    module, _, leaf = name.rpartition(separator)
    return (table[module], leaf) if module in table else None


def join_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack `attn.q`, `attn.k`, `attn.v` as the rows of one `attn.qkv`, where all three exist with one shape."""
    joined = dict(state)
    for name in state:
        names = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        parts = [state[part] for part in names if part in state]
        if ".attn.q." in name and len(parts) == 3 and len({part.shape for part in parts}) == 1 and parts[0].ndim:
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
            for part in names:
                del joined[part]
    return joined


def split_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split every `attn.qkv` into `attn.q`, `attn.k` and `attn.v`, a third of its rows each."""
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = rows.clone()
        else:
            split[name] = tensor
    return split
