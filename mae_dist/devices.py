"""Which device a rank computes on, whether those of all ranks go together, and whether it gives the same bits twice.

A rank whose GPU has failed would else train on its CPU, a hundred times slower, and make the others wait for it.
"""

import os
import platform
import resource
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from mae_dist import environment, gpus

CPU = "cpu"
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}  # fmt: skip
"""Environment variables under which cuBLAS, NCCL and torch.compile sum in a fixed order, which else depends on how long
they took or on sizes. One that is set already stays.
"""

MEASURED_SIDES, MEASURED_SECONDS = {"cpu": 512, "cuda": 8192}, 0.05
"""Side of the square matrices, by type of device, whose product is timed where no table knows the peak; how long."""


def name_of(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """The 16-bit precisions that the device has instructions for; without them fp32 is faster."""
    if device.type == CPU:
        return environment.fast_precisions()
    return ("fp16", *("bf16",) * torch.cuda.is_bf16_supported(including_emulation=False))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The most floating point operations a second that a device makes of matrix products in `dtype`: of a GPU that
    `gpus` lists that of the data sheet, else the best that is measured now.
    """
    known = gpus.find(name_of(device)) if device.type == "cuda" else None
    return measured_peak(device, dtype) if known is None else known.peak(dtype.itemsize)


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = MEASURED_SECONDS) -> float:
    """The best rate of a product of large square matrices, in floating point operations a second: on a CPU of the time
    that its threads had, so that a busy machine has the same peak.
    """
    side, on_cpu = MEASURED_SIDES[device.type], device.type == "cpu"
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    a = torch.randn(side, side, device=device).to(dtype)
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        began = clock()
        product = a @ a
        if device.type == "cuda":
            product[0, 0].item()
        times.append(clock() - began)
    return 2 * side**3 * threads / min(times)


def memory_used() -> int:
    """Bytes at most of this process's GPU, or of the process where it uses none, so far."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def of_rank(local_rank: int) -> torch.device:
    """The device of the rank with this number on its machine: its GPU, or the CPU where torch finds none. A launcher
    may show each rank its own GPU alone.
    """
    if not torch.cuda.is_available():
        return torch.device(CPU)
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def describe(device: torch.device) -> str:
    """The machine, and "cpu" or the UUID of the GPU, for `complaint`."""
    what = CPU if device.type == CPU else str(torch.cuda.get_device_properties(device).uuid)
    return f"{socket.gethostname()} {what}"


def asked_for(environ: Mapping[str, str]) -> str:
    """The environment variable that gives this process GPUs, with its value; empty where none does."""
    for name, none in (("CUDA_VISIBLE_DEVICES", ("", "-1", "NoDevFiles")), ("SLURM_GPUS_ON_NODE", ("", "0"))):
        if name in environ:
            return "" if environ[name] in none else f"{name}={environ[name]}"
    return ""


def refuse_missing(device: torch.device) -> str:
    """Why a process that was given GPUs may not compute on `device`; empty where it may."""
    given = asked_for(os.environ)
    if device.type != CPU or not given:
        return ""
    return (
        f"{given} gives {socket.gethostname()} GPUs, but torch finds none that works: see what `nvidia-smi` prints "
        "there; CUDA_VISIBLE_DEVICES= (empty) trains on CPUs"
    )


def complaint(descriptions: Sequence[str]) -> str:
    """What is wrong with the devices of all ranks, in rank order as `describe` gives them; empty where nothing is."""
    places = [text.rpartition(" ") for text in descriptions]
    first_of: dict[str, int] = {}
    without = next((n for n, (_, _, what) in enumerate(places) if what == CPU), None)
    if without is not None and any(what != CPU for _, _, what in places):
        having = next(n for n, (_, _, what) in enumerate(places) if what != CPU)
        return (
            f"rank {without} on {places[without][0]} finds no GPU that works, but rank {having} on {places[having][0]} "
            "has one: see what `nvidia-smi` prints there, or leave that machine out; CUDA_VISIBLE_DEVICES= (empty) on "
            "all machines trains on CPUs"
        )
    for number, (host, _, what) in enumerate(places):
        if what != CPU and first_of.setdefault(what, number) != number:
            return (
                f"ranks {first_of[what]} and {number} on {host} have the same GPU: start no more processes on a "
                "machine than it has GPUs (machine.processes, torchrun --nproc-per-node, srun --ntasks-per-node)"
            )
    return ""


def set_deterministic(enabled: bool) -> None:
    """Have torch take only algorithms that give the same bits twice, or any; before it first uses a GPU.

    torch raises RuntimeError where an operation has no such algorithm.
    """
    if enabled != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: 1.3 s of a core
        torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore  (it would fill what is written anyway)
    for name, value in DETERMINISTIC.items() if enabled else ():
        os.environ.setdefault(name, value)
