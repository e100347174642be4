"""What GPUs can do by their makers' data sheets: matrix products a second, and memory. Imports no torch."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """TFLOP/s of matrix products in 16 bits (sums in fp32) and in fp32 (not TF32), without sparsity; GB of memory, the
    least where there are several.
    """

    part: str
    half: float
    single: float
    memory: float

    def peak(self, num_bytes: int) -> float:
        """Floating point operations a second of numbers of so many bytes."""
        return 1e12 * (self.half if num_bytes == 2 else self.single)


GPUS = [
    Gpu("B200", 2250, 80, 180), Gpu("GH200", 989, 67, 96), Gpu("H200", 989, 67, 141), Gpu("H100 PCIe", 756, 51, 80),
    Gpu("H100 NVL", 835, 60, 94), Gpu("H100", 989, 67, 80), Gpu("A100", 312, 19.5, 40), Gpu("A30", 165, 10.3, 24),
    Gpu("A40", 149.7, 37.4, 48), Gpu("A10G", 70, 35, 24), Gpu("A10", 125, 31.2, 24), Gpu("L40S", 362, 91.6, 48),
    Gpu("L40", 181, 90.5, 48), Gpu("L4", 121, 30.3, 24), Gpu("V100", 125, 15.7, 16), Gpu("T4", 65, 8.1, 16),
    Gpu("RTX 6000 Ada", 364, 91.1, 48), Gpu("RTX A6000", 154.8, 38.7, 48), Gpu("RTX 5090", 209.5, 104.8, 32),
    Gpu("RTX 4090", 165.2, 82.6, 24), Gpu("RTX 3090", 71, 35.6, 24), Gpu("MI300X", 1307, 163.4, 192),
]  # fmt: skip
"""By a part of their names; a name is looked up from the first row on."""
SLICE = re.compile(r"\bMIG\b|\d+g\.\d+gb")
"""In the name of a part of a GPU, of which the data sheets say nothing."""


def find(name: str) -> Gpu | None:
    """The GPU that torch, SLURM or a user calls `name` ("NVIDIA A100-SXM4-80GB", "a100_80gb", "gpu:a100"), with the
    memory that the name says; None where it is none of these, or a part of one.
    """
    if SLICE.search(name):
        return None
    words = re.sub(r"[\W_]+", " ", name)
    known = (gpu for gpu in GPUS if re.search(rf"\b{gpu.part.replace(' ', ' ?')}\b", words, re.I))
    found, memory = next(known, None), re.search(r"\b(\d+) ?GB\b", words, re.I)
    if found is None or memory is None or float(memory[1]) > 2 * found.memory:  # a GH200's 480 GB are its CPU's
        return found
    return found._replace(memory=float(memory[1]))


def are_alike(one: str, other: str) -> bool:
    """Whether two names are of one device, or of the same row."""
    first, second = find(one), find(other)
    return one == other or (first is not None and second is not None and first.part == second.part)
