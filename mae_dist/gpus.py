"""What GPUs can do by their makers' data sheets: matrix products a second, and memory. Imports no torch."""

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
    Gpu("B200", 2250, 80, 180), Gpu("GH200", 989, 67, 96), Gpu("H200", 989, 67, 141), Gpu("H200 NVL", 835, 60, 141),
    Gpu("H100", 989, 67, 80), Gpu("H100 PCIe", 756, 51, 80), Gpu("H100 NVL", 835, 60, 94), Gpu("A100", 312, 19.5, 40),
    Gpu("A30", 165, 10.3, 24), Gpu("A40", 149.7, 37.4, 48), Gpu("A10G", 70, 35, 24), Gpu("A10", 125, 31.2, 24),
    Gpu("L40S", 362, 91.6, 48), Gpu("L40", 181, 90.5, 48), Gpu("L4", 121, 30.3, 24), Gpu("V100", 125, 15.7, 16),
    Gpu("V100 PCIe", 112, 14, 16), Gpu("V100S", 130, 16.4, 32), Gpu("T4", 65, 8.1, 16),
    Gpu("RTX 6000 Ada", 364, 91.1, 48), Gpu("A6000 Ada", 364, 91.1, 48), Gpu("A6000", 154.8, 38.7, 48),
    Gpu("RTX 5090", 209.5, 104.8, 32),
    Gpu("RTX 4090", 165.2, 82.6, 24), Gpu("RTX 3090", 71, 35.6, 24), Gpu("MI300X", 1307, 163.4, 192),
    Gpu("MI300A", 980, 122.6, 128), Gpu("MI250X", 191.5, 47.9, 64), Gpu("MI250", 181, 45.3, 64),
    Gpu("MI250X MI250", 181, 45.3, 64), Gpu("MI210", 181, 45.3, 64),
]  # fmt: skip
"""By the words that their names have, in any order. A MI250's numbers are those of one of its two devices; torch calls
it and a MI250X "MI250X / MI250".
"""
JOINED = re.compile(r"(sxm|pcie|nvl|rtx|ada)")
"""Words that are written together with others, as in A100SXM4 and rtx4090."""
OTHERS = re.compile(r"[1-7]g(\d+(gb)?)?|\d+[abcq]|mig|grid|laptop|mobile|max|fhhl|d|ti|super")
"""Words in the name of a part of a GPU (MIG: 1g.5gb, a virtual one: 10C), or of a sibling that is slower or faster."""
MEMORY = re.compile(r"\b(\d{2,3}) ?gb?\b")


def find(name: str) -> Gpu | None:
    """The GPU that torch, SLURM or a user calls `name` ("NVIDIA A100-SXM4-80GB", "a100_80gb", "gpu:a100"), with the
    memory that the name says; None where it is none of these, a part of one, or one of several ("a100|h100").
    """
    text = " ".join(re.findall(r"[a-z0-9]+", JOINED.sub(r" \1 ", name.lower())))
    words = {*text.split()}
    fitting = [(gpu, {*gpu.part.lower().split()}) for gpu in GPUS if {*gpu.part.lower().split()} <= words]
    found = [gpu for gpu, own in fitting if not any(own < other for _, other in fitting)]
    if len(found) != 1 or any(map(OTHERS.fullmatch, words)):
        return None
    memory = MEMORY.search(text)
    if memory is None or found[0].part == "GH200" or float(memory[1]) > 2 * found[0].memory:  # a GH200's: its CPU's
        return found[0]
    return found[0]._replace(memory=float(memory[1]))


def fast_precisions(name: str) -> tuple[str, ...]:
    """The 16-bit precisions that a GPU of this name has instructions for: bf16 from Ampere on."""
    known = find(name)
    return ("fp16",) if known is not None and known.part.startswith(("V100", "T4")) else ("fp16", "bf16")


def are_alike(one: str, other: str) -> bool:
    """Whether two names are of one device, or of the same row."""
    first, second = find(one), find(other)
    return one == other or (first is not None and second is not None and first.part == second.part)
