"""`python docs/look_inside.py RUN IMAGE ... --out look.png`: what a pretrained model reconstructs, and where it looks.

Rows: originals, what the encoder sees, reconstructions, and for a ViT the attention of the class token in a block.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import mae_dist
from mae_dist import image_grid
from mae_dist.trained import Trained


@torch.no_grad()
def attention(m: Trained, images: Tensor, block: int) -> Tensor:
    """Attention of the class token to the patches in a block, the mean over heads: (b, rows, columns)."""
    layer: Any = m.model.blocks[block - 1].attn
    kept: list[Tensor] = []
    hook = layer.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    m.model(images)
    hook.remove()
    q, k, _ = rearrange(kept[0], "b n (three h d) -> three b h n d", three=3, h=layer.num_heads)
    scores = (q[:, :, :1] @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    return rearrange(scores[:, :, 0, 1:].mean(1), "b (r c) -> b r c", r=m.model.grid[0])


def heat(maps: Tensor) -> list[np.ndarray]:
    """Grey images (rows, columns, 1), each from 0 to its own largest value."""
    return list((255 * maps / maps.amax((1, 2), keepdim=True)).byte()[..., None].numpy())


def main() -> None:
    """Draw the picture that the command line describes."""
    parser = argparse.ArgumentParser(description="What a pretrained model reconstructs, and where it looks.")
    parser.add_argument("run")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--out", default="look.png")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--block", type=int, help="whose attention is drawn (the last)")
    options = parser.parse_args()
    m = mae_dist.load(options.run)
    images = m.transform(options.images)
    shown = m.reconstruct(images, options.seed)
    rows = [list(part) for part in (shown.original, shown.masked, shown.reconstructed)]
    if m.model.num_prefix:  # a Mixer has no attention
        rows.append(heat(attention(m, images, options.block or m.model.depth)))
    image_grid.sheet(rows, [f"{loss:.3f}" for loss in shown.loss.tolist()]).save(options.out)


if __name__ == "__main__":
    main()
