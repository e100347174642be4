"""How ranks meet at the start: at one store, of this attempt alone, over an interface that all share, on devices that
go together.
"""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from mae_dist import devices, interfaces
from mae_dist.environment import MEETING_FILE
from mae_dist.errors import RankError, RankLost

LEAST_RENDEZVOUS = timedelta(seconds=60)
"""Time to wait for all ranks at the start, however short `machine.timeout` is: importing libraries reads gigabytes."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable: the network interface on which gloo listens."""


def meet(device: torch.device, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Wait for the other ranks: (store of this start alone, rank, world size). Raises RankLost where a rank does not
    come in time, and ValueError where the ranks' devices do not go together.
    """
    patience = max(timeout, LEAST_RENDEZVOUS)
    try:
        if file := os.environ.get(MEETING_FILE):
            number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = dist.FileStore(file, count)
            store.set_timeout(patience)
        else:
            store, number, count = next(dist.rendezvous("env://", timeout=patience))
        store = _of_this_attempt(store, number, count, patience)
        _choose_interface(store, number, count)
        agree_on_devices(store, number, count, device)
        return store, number, count
    except RuntimeError as error:  # of a file, torch has no type of its own
        here = os.environ["RANK"]
        what = f"rank {here} did not meet the others within {patience.total_seconds():g} s of its start"
        raise RankLost(f"{what}; the same command resumes from the last checkpoint") from error


def _of_this_attempt(store: dist.Store, number: int, count: int, patience: timedelta) -> dist.Store:
    """The part of `store` that no earlier attempt of these ranks has written to, under a random name by rank 0.

    torchrun keeps one store when it starts ranks again, with the addresses of the dead in it (pytorch#135712). Rank 0
    answers a rank only under a random word that this rank has just written, so no rank takes the name of an earlier
    attempt.
    """
    own = uuid.uuid4().hex
    if number == 0:
        store.set("attempt", own)
        for other in range(1, count):
            word = store.get(f"{own}/{other}").decode()  # waits for it
            store.set(f"{own}/{word}", "welcome")
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("attempt").decode()
        store.set(f"{name}/{number}", own)
        if store.check([f"{name}/{own}"]):
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RankLost(f"rank 0 does not answer rank {number} at the start; start again")


def _choose_interface(store: dist.Store, number: int, count: int) -> None:
    """Have gloo listen on the interface that leads to the other ranks, unless GLOO_SOCKET_IFNAME names one: that from
    which this machine reaches rank 0's; on rank 0's own machine, by whose name it may reach itself alone, that from
    which it reaches another one.
    """
    own = interfaces.LOCALHOST
    if os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        own = interfaces.address_towards(os.environ["MASTER_ADDR"])
        store.set(f"address/{number}", own)
        if interfaces.is_loopback(own):
            there = [address.decode() for address in store.multi_get([f"address/{n}" for n in range(count)])]
            own = next((interfaces.address_towards(a) for a in there if not interfaces.is_loopback(a)), own)
    if (given := os.environ.get(INTERFACE)) is None:
        os.environ |= {INTERFACE: name} if (name := interfaces.with_address(own)) else {}
    elif missing := [name for name in given.split(",") if name not in interfaces.names()]:
        here, host = ", ".join(interfaces.names()), socket.gethostname()
        raise RankError(f"environment variable {INTERFACE}={given}: {host} has no {missing[0]}, only {here}")


def agree_on_devices(store: dist.Store, number: int, count: int, device: torch.device) -> None:
    """Raise ValueError on all ranks where not all have a GPU of their own, or none has one."""
    store.set(f"device/{number}", devices.describe(device))
    if number == 0:
        described = [text.decode() for text in store.multi_get([f"device/{n}" for n in range(count)])]
        store.set("devices", devices.complaint(described) or devices.refuse_missing(device) or "fit")
    if (found := store.get("devices").decode()) != "fit":
        raise ValueError(found)
