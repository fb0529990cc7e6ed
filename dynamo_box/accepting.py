"""Accepting connections on sockets that carry descriptors, which the event loop's own servers can't."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from dynamo_box.log import get_logger

ACCEPT_AGAIN_S = 0.2

log = get_logger()


class Acceptor:
    """`opened` gets each connection, of whomever, and owns it."""

    def __init__(self, opened: Callable[[socket.socket], None]) -> None:
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None

    def listen(self, sock: socket.socket) -> None:
        """Accept on `sock`, which becomes the acceptor's own."""
        sock.setblocking(False)
        self._listening = sock
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Listen no more; what was accepted stays."""
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening = None

    def _accept(self) -> None:
        assert self._listening is not None
        while True:
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No descriptor is left: the socket stays readable, so look again only when some may have been closed.
                log.warning("a connection can't be accepted", error=str(error))
                self._loop.remove_reader(self._listening.fileno())
                self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
                return
            self._opened(sock)

    def _accept_again(self) -> None:
        if self._listening is not None:
            self._loop.add_reader(self._listening.fileno(), self._accept)
