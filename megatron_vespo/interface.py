"""The network interface on which the parts of a run listen for each other."""

import socket
from dataclasses import dataclass

import psutil

from megatron_vespo.errors import ConfigError


@dataclass(frozen=True)
class Interface:
    """`address`: its IPv4 address on this host."""

    name: str
    address: str

    def environment(self) -> dict[str, str]:
        """For a process whose gloo and NCCL groups shall listen there and nowhere else."""
        return {"GLOO_SOCKET_IFNAME": self.name, "NCCL_SOCKET_IFNAME": f"={self.name}"}


LOOPBACK = Interface("lo", "127.0.0.1")
AUTO = "auto"


def own_address(target: str) -> str:
    """This host's address on the way to `target` (ADDRESS:PORT). Nothing is sent."""
    address, _, port = target.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, int(port)))
        except OSError as error:
            raise ConfigError(f"{target}: there is no way to it from this host ({error.strerror})") from None
        return probe.getsockname()[0]


def choose_interface(wanted: str, known_as: str | None = None) -> Interface:
    """As `find_interface`; `auto` is loopback, or the interface of the address that this host is `known_as`."""
    if wanted == AUTO:
        return LOOPBACK if known_as is None else find_interface(known_as)
    return find_interface(wanted)


def find_interface(wanted: str) -> Interface:
    """By its name ("eth0") or its address, on this host.

    Raises:
        ConfigError: there is none, or it has no IPv4 address; lists those that there are.
    """
    found = [
        Interface(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    for interface in found:
        if wanted in (interface.name, interface.address):
            return interface
    there = ", ".join(f"{interface.name} ({interface.address})" for interface in found)
    raise ConfigError(f"cluster.interface: '{wanted}' is no interface of this host with an IPv4 address: {there}")
