"""Devices: ranks without a GPU among others, and two ranks on one GPU, are refused in a sentence before any work."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from mae_dist import devices, dist, rendezvous

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("descriptions", "expected"),
    [
        (["a cpu"], ""),
        (["a cpu", "b cpu"], ""),
        (["a GPU-1", "a GPU-2", "b GPU-3"], ""),
        (["a GPU-1", "my host cpu"], "rank 1 on my host finds no GPU that works, but rank 0 on a has one"),
        (["a cpu", "b GPU-1", "b GPU-1"], "rank 0 on a finds no GPU that works, but rank 1 on b has one"),
        (["a GPU-1", "a GPU-2", "a GPU-1"], "ranks 0 and 2 on a have the same GPU: start no more processes"),
    ],
)
def test_devices_that_do_not_go_together_are_named_by_rank_and_machine(descriptions: list[str], expected: str) -> None:
    found = devices.complaint(descriptions)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "2"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
    ],
)
def test_devices_asked_for_are_those_of_the_launcher_unless_the_user_hides_them(
    environ: dict[str, str], expected: str
) -> None:
    assert devices.asked_for(environ) == expected


def refusals(monkeypatch: pytest.MonkeyPatch, *ranks: torch.device) -> list[str]:
    """What ranks with these devices are told when they meet in a store."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    store, told = dist.dist.HashStore(), [""] * len(ranks)

    def meet(number: int) -> None:
        try:
            rendezvous.agree_on_devices(store, number, len(ranks), ranks[number])
        except ValueError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_devices_are_refused_on_every_rank_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu = torch.device("cpu")
    assert refusals(monkeypatch, cpu, cpu) == ["", ""]
    for ranks, expected in (((CUDA, cpu), "rank 1 on"), ((CUDA, CUDA), "ranks 0 and 1 on")):
        first, second = refusals(monkeypatch, *ranks)
        assert first == second
        assert first.startswith(expected)


def test_devices_asked_for_and_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that has failed: one process would train on the CPU, a hundred times slower, without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (told,) = refusals(monkeypatch, devices.of_rank(0))
    assert told.startswith("CUDA_VISIBLE_DEVICES=0 gives ")


def test_devices_of_ranks_that_see_one_gpu_each_are_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.of_rank(3) == CUDA


def test_deterministic_settings_leave_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    try:
        devices.set_deterministic(True)
        found = {name: os.environ[name] for name in devices.DETERMINISTIC}
        assert found == devices.DETERMINISTIC | {"NCCL_ALGO": "Tree"}
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        devices.set_deterministic(False)
        for name in devices.DETERMINISTIC:
            os.environ.pop(name, None)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_of_a_gpu_is_described_by_its_uuid() -> None:
    assert len(devices.describe(CUDA).rpartition(" ")[2]) >= 32


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", (989, 67)), ("NVIDIA H100 PCIe", (756, 51)), ("NVIDIA A100-SXM4-40GB", (312, 19.5)),
        ("NVIDIA A10G", (70, 35)), ("NVIDIA L40S", (362, 91.6)), ("Tesla V100-SXM2-16GB", (125, 15.7)),
    ],
)  # fmt: skip
def test_device_peak_is_that_of_the_data_sheet(
    name: str, tera: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = tuple(devices.peak_flops(CUDA, dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32))
    assert found == pytest.approx(tera)


def test_device_peak_of_a_cpu_is_measured() -> None:
    assert 1e7 < devices.peak_flops(torch.device("cpu"), torch.float32) < 1e14
