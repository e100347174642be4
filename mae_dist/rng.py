"""Random draws as a pure function of (seed, purpose, epoch, ids): the counter-based generator Philox4x32-10.

NumPy and torch give identical bits on any device, because the rounds are written once, in 64-bit integer arithmetic
that both have. There is no state: anyone who knows (seed, purpose, epoch, id) can repeat a draw. Imports no torch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
"""

from enum import IntEnum
from typing import Any

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a draw is for. Each purpose has a stream of its own. Its number must never change, or runs would change."""

    SHARDS = 1
    SAMPLES = 2
    CROP = 3
    FLIP = 4
    MASK = 5
    DROP_PATH = 6
    SYNTHETIC = 7
    BLOCKS = 8
    AUGMENT = 9
    ERASE = 10
    MIX = 11
    HELD_OUT = 12
    BOOTSTRAP = 13
    ERASE_PIXELS = 14
    COLOR_JITTER = 15
    PARTS = 16


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of four counter words and two key words, int64 arrays (or, as keys, ints) of 32-bit values, which
    are broadcast together.

    The 32 x 32 -> 64 bit products may overflow into the sign of int64; shifting and masking recovers the high word. As
    c1 and c3 are not multiplied, what they have above 32 bits is masked when they are used.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & LOW, p1, ((p0 >> 32) ^ c3 ^ k1) & LOW, p0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1 & LOW, c2, c3 & LOW


def bits(seed: int, purpose: Purpose, epochs: Any, ids: Any, num: int) -> Any:
    """Random 32-bit words as int64 of shape (len(ids), num), NumPy or torch like `ids`.

    Word j of sample i is a function of (seed, purpose, epochs[i], ids[i], j). `epochs` is an array like `ids`, or an
    int.
    """
    blocks = -(-num // 4)
    if isinstance(ids, np.ndarray):
        ids = ids.astype(np.int64)
        block = np.arange(blocks, dtype=np.int64)
        stack = np.stack
    else:
        import torch

        block = torch.arange(blocks, dtype=torch.int64, device=ids.device)
        stack = torch.stack
    column = ids[:, None]
    epoch = epochs[:, None] if hasattr(epochs, "shape") and epochs.shape else epochs
    words = philox((block, epoch, column & LOW, column >> 32), (seed, int(purpose)))
    return stack(words, -1).reshape(len(ids), blocks * 4)[:, :num]


def uniform(seed: int, purpose: Purpose, epochs: Any, ids: Any, num: int) -> Any:
    """Uniform numbers in [0, 1), shape (len(ids), num), float64 of 32 random bits each, NumPy or torch like `ids`."""
    words = bits(seed, purpose, epochs, ids, num)
    return (words.astype(np.float64) if isinstance(words, np.ndarray) else words.double()) / 2.0**32
