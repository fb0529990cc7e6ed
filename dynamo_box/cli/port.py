"""Whether the port of a box is free, asked before anything is fetched or started."""

from __future__ import annotations

import errno
import socket

from dynamo_box.errors import BoxError
from dynamo_box.ports import holder


def require_free(host: str, port: int) -> None:
    """Raises:
    BoxError: somebody listens there, named where that can be read, or the address can't be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise BoxError(f"can't listen on {host}:{port}: {error.strerror}", remedy=_ANOTHER) from error
            raise BoxError(
                f"port {port} on {host} is taken by {holder(port) or _UNKNOWN}",
                remedy=f"stop that process, or {_ANOTHER}",
            ) from error


_ANOTHER = "choose another port with --port"
_UNKNOWN = "a process that can't be looked up (another user's)"
