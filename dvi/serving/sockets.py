"""Sockets that servers and front doors listen on, and how they treat connections.

Knows addresses; knows nothing of HTTP. Imports nothing heavy.
"""

from __future__ import annotations

import errno
import socket

KEEP_ALIVE_S = 30
MAX_HEADER_BYTES = 16384


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to host and port, not listening yet: whether it can be had is known before a model is loaded.

    Raises ValueError when another process has the port, and for a host that is not of this machine.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"serve.host must be a name or address of this machine, got {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use; try serve.port={port + 1}") from error
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


def url_of(listener: socket.socket) -> str:
    return url(*listener.getsockname()[:2])


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
