"""The bytes of a tensor, for files and checksums."""

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in the order of its elements; not copied where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
