"""Which network interface of this machine leads to another one. Imports no torch.

gloo takes the address of the machine's own name, which many systems map to 127.0.1.1, where no other machine finds it.
"""

import ipaddress
import socket
import struct
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

LOCALHOST, LOOPBACK = "127.0.0.1", "lo"
SIOCGIFADDR = 0x8915
"""Request of ioctl for the IPv4 address of an interface (netdevice(7))."""
IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def names() -> list[str]:
    """The interfaces of this machine."""
    return [name for _, name in socket.if_nameindex()]


def address_towards(host: str) -> str:
    """The address of this machine from which `host`, a name or an address, is reached; LOCALHOST where none is."""
    with suppress(OSError):
        for family, *_, place in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(place)  # chooses a route, and sends nothing
                return str(probe.getsockname()[0]).partition("%")[0]
    return LOCALHOST


def is_loopback(address: str) -> bool:
    """Whether only this machine itself is reached from an address."""
    return ipaddress.ip_address(address).is_loopback


def with_address(address: str) -> str | None:
    """The interface that has this address first of all; None where none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return LOOPBACK if LOOPBACK in names() else None
    if wanted.version == 6:
        rows = [line.split() for line in IPV6_ADDRESSES.read_text().splitlines()]
        return next((row[-1] for row in rows if row[0] == wanted.packed.hex()), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in names():
            with suppress(OSError):  # an interface without an address
                answer = ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20:24] == wanted.packed:
                    return name
    return None
