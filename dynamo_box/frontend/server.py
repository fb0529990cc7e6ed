"""uvicorn on a socket that outlives this process; signals are left to the process, and its words go into our log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dynamo_box.frontend.app import make_app
from dynamo_box.frontend.serving import Serving
from dynamo_box.log import get_logger
from dynamo_box.protocol.spec import FrontendSpec

LISTEN_FD_VARIABLE = "DYNBOX_LISTEN_FD"
KEEP_ALIVE_S = 75
LAST_WORDS_S = 2.0
BACKLOG = 1024

log = get_logger()


class Server(uvicorn.Server):
    """Serves from `start` to `stop`."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(serving),
                http=_Protocol,
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_WORDS_S),
            )
        )
        logging.getLogger("uvicorn").addHandler(_ToLog(logging.WARNING))
        self._listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve from here on."""
        self._task = asyncio.create_task(self.serve(sockets=[sock]))
        listening = asyncio.create_task(self._listening.wait())
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()

    def stop_accepting(self) -> None:
        """Let go of the listening socket, so that who connects from here on waits for the next process on it.

        Connections on which nothing is asked are closed, since their clients then come again; a client that has
        connected and not asked yet would not, so it is left to ask. Answers on their way are a connection's last.
        """
        if not self._listening.is_set():
            return
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Protocol) and connection.cycle is not None:
                connection.shutdown()

    async def stop(self) -> None:
        """Let answers be finished for LAST_WORDS_S at most."""
        if self._task is not None:
            self.stop_accepting()
            self.should_exit = True
            await asyncio.wait({self._task}, timeout=2 * LAST_WORDS_S)
            self._task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """A request target in absolute form (`GET http://name/path`) outranks the Host header: it counts as one more."""

    def on_headers_complete(self) -> None:
        scheme, separator, rest = self.url.partition(b"://")
        if separator and b"/" not in scheme:
            self.headers.append((b"host", re.split(rb"[/?#]", rest, maxsplit=1)[0]))
        super().on_headers_complete()


class _ToLog(logging.Handler):
    """What uvicorn says goes the way of all other lines: clients that speak no HTTP, mostly."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("uvicorn", message=record.getMessage(), exc_info=record.exc_info)


def listening_socket(spec: FrontendSpec) -> socket.socket:
    """The one that the supervisor holds for every life of this process, else a new one.

    Raises:
        OSError: the port is taken.
        ValueError: the address is not loopback.
    """
    inherited = os.environ.pop(LISTEN_FD_VARIABLE, None)
    if inherited is not None:
        sock = socket.socket(fileno=int(inherited))
        os.set_inheritable(sock.fileno(), False)
        _require_loopback(sock.getsockname()[0])
    else:
        host = "127.0.0.1" if spec.host == "localhost" else spec.host
        _require_loopback(host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, spec.port), family=family, backlog=BACKLOG)
    sock.setblocking(False)
    return sock


def _require_loopback(host: str) -> None:
    if host != "::1" and not host.startswith("127."):
        raise ValueError(f"address {host} is not loopback; the frontend serves this machine only")
