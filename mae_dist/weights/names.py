"""How names of one house become those of another: a dictionary of modules, and attention in one matrix or in three."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BLOCKS = 100


def dictionary(once: dict[str, str], blocks: dict[str, str], parts: dict[str, str]) -> dict[str, str]:
    """Our module (or token) -> theirs. ``blocks``: stacks of blocks, `{}` being the number; ``parts``: of each."""
    numbered = {
        ours.format(number) + mine: theirs.format(number) + yours
        for ours, theirs in blocks.items()
        for mine, yours in parts.items()
        for number in range(MOST_BLOCKS)
    }
    return once | numbered


def lookup(name: str, table: dict[str, str], separator: str) -> tuple[str, str] | None:
    """(module in the other house, the parameter's own name or "") of a name; None where the table has it not."""
    if name in table:
        return table[name], ""
    module, _, leaf = name.rpartition(separator)
    return (table[module], leaf) if module in table else None


def join_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`attn.q`, `attn.k`, `attn.v` as the rows of one `attn.qkv`, where all three are there, in one shape."""
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
    """The inverse."""
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = rows.clone()
        else:
            split[name] = tensor
    return split
