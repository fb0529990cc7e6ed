"""The HTTP port. The supervisor binds it before anything starts and hands it to the frontend, so that a taken
port is known at once, and connections wait in the backlog while a frontend restarts.
"""

from __future__ import annotations

import errno
import socket

from dynamo_box.errors import BoxError
from dynamo_box.ports import holder

LISTEN_FD_VARIABLE = "DYNBOX_LISTEN_FD"
BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BoxError: the port is taken (the error names the holder, where that can be read) or can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            found = holder(port)
            by = f" by {found}" if found else ""
            raise BoxError(
                f"port {port} on {host} is taken{by}",
                remedy="stop that program, or choose another port with --port",
            ) from error
        raise BoxError(
            f"can't listen on {host}:{port}: {error.strerror}", remedy="choose another port with --port"
        ) from error
    return listener
