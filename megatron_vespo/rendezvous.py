"""Where processes meet to form a process group: a TCP store on one chosen interface.

torch's own store listens on every interface of the host, and its port can be taken between choosing and using it.
Here a socket is opened first, on the interface that is meant, and the store takes it over.
"""

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def listen(address: str, port: int = 0) -> socket.socket:
    """Open a port on the interface of `address`; 0 takes a free one, and `port_of` tells which."""
    return socket.create_server((address, port))


def port_of(listener: socket.socket) -> int:
    return listener.getsockname()[1]


def host_store(listener: socket.socket, world_size: int, timeout: timedelta) -> TCPStore:
    """The store that others join; it owns `listener` from now on. Returns when all have come."""
    address, port = listener.getsockname()[:2]
    return TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def join_store(address: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    return TCPStore(address, port, world_size, is_master=False, timeout=timeout)
