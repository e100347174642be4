"""Ranks on many machines. Two of them are network namespaces of this one, with names, interfaces and an /etc/hosts of
their own: as on many clusters, each machine's /etc/hosts gives its own name an address of loopback, and there are two
networks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from running import MAE, SETTINGS, finish_ranks, losses, start_forked, start_rank, start_ranks

from mae_dist import dist, interfaces, rendezvous
from mae_dist.run import checkpoint, events

NETWORKS = {"management0": "10.77.1", "data0": "10.77.2"}
START = """
hostname node$1; mount --bind $2 /etc/hosts; ip link set lo up; echo ready; exec sleep 600
"""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[int]]:
    """Two machines: process ids whose namespaces they are."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("network namespaces need root and iproute2")
    unshare = ["unshare", "--net", "--uts", "--mount"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine forbids network namespaces (unshare): a container needs CAP_SYS_ADMIN")
    started = []
    try:
        for number, other in ((1, 2), (2, 1)):
            hosts = tmp_path / f"hosts{number}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n{NETWORKS['data0']}.{other} node{other}\n")
            command = [*unshare, "bash", "-ec", START, "-", str(number), str(hosts)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        first, second = (process.pid for process in started)
        for name, network in NETWORKS.items():
            on(first, "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", str(second))
            for number, pid in ((1, first), (2, second)):
                on(pid, "ip", "address", "add", f"{network}.{number}/24", "dev", name)
                on(pid, "ip", "link", "set", name, "up")
        yield [first, second]
    finally:
        for process in started:
            process.kill()
            process.wait()


def on(machine: int, *command: str) -> None:
    """Run a command in the network of a machine."""
    subprocess.run(["nsenter", "-t", str(machine), "--net", *command], check=True)


def enter(machine: int) -> None:
    """Move this process to a machine."""
    for kind in ("net", "uts", "mnt"):
        with open(f"/proc/{machine}/ns/{kind}") as namespace:
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0


def test_ranks_on_two_machines_whose_names_are_loopback(machines: list[int], tiny_data: Path, tmp_path: Path) -> None:
    run, log, ranks = tmp_path / "run", tmp_path / "log", []
    argv = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=2", "machine.timeout=60"]
    argv.remove("machine.processes=1")
    for number, machine in enumerate(machines):
        place = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29501}
        place = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "node1"}
        ranks.append(start_rank(argv, place, log, partial(enter, machine)))
    finish_ranks(ranks, log, timeout=120)
    assert len(losses(run)) == 2
    assert [start["ranks"] for start in events.of(run, "start")] == [2]


def test_interface_of_an_address() -> None:
    for host in ("localhost", "127.0.1.1", "no.such.host.invalid"):
        address = interfaces.address_towards(host)
        assert interfaces.is_loopback(address)
        assert interfaces.with_address(address) == "lo"
    assert interfaces.with_address("192.0.2.1") is None
    assert interfaces.with_address("2001:db8::1") is None
    assert interfaces.is_loopback("::1")


def test_unknown_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib9")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    here = f"GLOO_SOCKET_IFNAME=lo,ib9: {socket.gethostname()} has no ib9, only .*lo"
    with pytest.raises(ValueError, match=here):
        rendezvous._choose_interface(torch.distributed.HashStore(), 0, 2)


@pytest.mark.parametrize(("here", "num_checks"), [(0, 1023), (5, 1)])
def test_roll_call_of_1024_ranks(here: int, num_checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first survivor asks for every other rank once, all others for one."""
    checks = []

    class Store(torch.distributed.HashStore):
        def check(self, keys: list[str]) -> bool:
            checks.append(keys)
            return super().check(keys)

    store = Store()
    for rank in {*range(1024)} - {here, 7, 900}:
        store.set(f"here/{rank}", "")
    store.add("here", 1021)
    for name, value in {"_store": store, "ROLL_CALL": 0.1, "rank": lambda: here, "world": lambda: 1024}.items():
        monkeypatch.setattr(dist, name, value)
    blame = "ranks 7, 900 did not answer at step 3: hung or gone; the same command resumes from the last checkpoint"
    assert dist._find_missing_ranks("step 3") == ("" if here else blame)
    assert len(checks) == num_checks


def exchange(place: dict[str, str], path: Path) -> None:
    """A rank of several: agrees in rounds, and loads a checkpoint that rank 0 alone can read."""
    os.environ.update(place)
    dist.setup(60)
    dist.RING = 1
    for largest in (-3, 0, 2**40):
        for owner in range(dist.world()):
            assert dist.all_reduce_max(largest if dist.rank() == owner else largest - 1) == largest
    if not dist.is_main():
        path = path.with_name("nowhere")
    state = {"a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.bfloat16)}
    checkpoint.load(path, state)
    assert torch.equal(state["a"], torch.arange(6.0).view(3, 2))
    assert state["b"] == 7


def test_many_ranks_agree_in_rounds_and_rank_0_alone_reads_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001"
    state = {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(7, dtype=torch.bfloat16)}
    checkpoint.save(path, 1, checkpoint.share(state))
    world = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MAE_DIST_MEETING_FILE": str(tmp_path / "ranks")}
    ranks = [start_forked(exchange, world | {"RANK": str(rank)}, path) for rank in range(3)]
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * 3


@pytest.mark.gpu  # not yet run
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_connects_at_the_start(tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks with a GPU each: DDP, and the groups of HSDP, over communicators made before the first step."""
    for strategy in ("ddp", "hsdp"):
        run, log = tmp_path / strategy, tmp_path / "log"
        argv = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=2"]
        shards = ["machine.shards=1"] if strategy == "hsdp" else []
        ranks = start_ranks(2, *argv, f"machine.strategy={strategy}", *shards, log=log)
        finish_ranks(ranks, log)
        assert len(losses(run)) == 2
