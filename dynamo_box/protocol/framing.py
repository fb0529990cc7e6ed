"""Frames, and the sockets that carry them.

A frame is a 4-byte big-endian length and a msgpack body: one tagged struct, or an array of them. `Channel` gathers
whatever is sent during one turn of the event loop into one write, since system calls and wake-ups, not bytes, are
what the token path spends its time on.

Unix socket paths are capped at 107 bytes by the kernel; binding and connecting through a descriptor of the directory
(`/proc/self/fd/N/name`) lets a run dir have any path.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

HEADER = struct.Struct(">I")
MAX_FRAME = 16 * 1024 * 1024
MAX_BACKLOG = 64 * 1024 * 1024
STATUS_FD_VARIABLE = "DYNBOX_STATUS_FD"

M = TypeVar("M")


class FrameError(Exception):
    """The peer sent something that is no frame of ours; the connection is of no further use."""


def encode_frame(message: Any) -> bytes:
    """Frame one struct (or list of structs).

    Raises:
        FrameError: the body is larger than MAX_FRAME.
    """
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body)} bytes is over the cap of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


class FrameSplitter:
    """Cut a byte stream into frame bodies, whatever the sizes of the pieces it arrives in."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max_frame = max_frame

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the bodies that `data` completes.

        Raises:
            FrameError: a length over the cap; raised before any of its body is kept.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER.size:
                (size,) = HEADER.unpack_from(buffer, start)
                if size > self._max_frame:
                    raise FrameError(f"a frame of {size} bytes is over the cap of {self._max_frame}")
                end = start + HEADER.size + size
                if len(buffer) < end:
                    break
                body = bytes(memoryview(buffer)[start + HEADER.size : end])
                start = end
                yield body
        finally:
            del buffer[:start]

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame."""
        return len(self._buffer)


class Channel(asyncio.Protocol, Generic[M]):
    """One connection of typed messages on an event loop.

    `on_message` runs on the loop for each message; `on_close` runs once, with None for an orderly end, else the
    reason. A peer that doesn't read is cut off once MAX_BACKLOG bytes wait for it: it is stuck, and memory is bounded.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[M],
        on_message: Callable[[Channel[M], M], None],
        on_close: Callable[[Channel[M], Exception | None], None] | None = None,
        *,
        on_open: Callable[[Channel[M]], None] | None = None,
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        self._decoder = decoder
        self._on_message = on_message
        self._on_close = on_close
        self._on_open = on_open
        self._splitter = FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._flush_scheduled = False
        self._max_backlog = max_backlog
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # always a Transport for stream sockets
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._splitter.feed(data):
                self._on_message(self, self._decoder.decode(body))
                if self._failure is not None:
                    return
        except (FrameError, msgspec.DecodeError) as error:
            self.abort(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
            if self._on_close is not None and self._transport is not None:
                self._on_close(self, self._failure or exc)

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Any) -> None:
        """Queue a message; everything queued in this turn of the loop leaves in one write. Dropped once closed."""
        if not self.is_open:
            return
        self._outbox.append(encode_frame(message))
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if not self._outbox or self._transport is None or self._transport.is_closing():
            self._outbox.clear()
            return
        data = self._outbox[0] if len(self._outbox) == 1 else b"".join(self._outbox)
        self._outbox.clear()
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > self._max_backlog:
            self.abort(FrameError(f"the peer left {self._transport.get_write_buffer_size()} bytes unread"))

    def close(self) -> None:
        """Send what is queued, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: Exception) -> None:
        """Close at once; `on_close` gets the reason."""
        self._failure = self._failure or reason
        if self._transport is not None:
            self._transport.abort()


class BlockingChannel(Generic[M]):
    """The same frames over a blocking socket, for commands that need no event loop."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._socket = sock
        self._decoder = decoder
        self._splitter = FrameSplitter()
        self._ready: list[M] = []

    def send(self, message: Any) -> None:
        self._socket.sendall(encode_frame(message))

    def receive(self, timeout_s: float | None = None) -> M | None:
        """The next message, or None at end of stream.

        Raises:
            TimeoutError: nothing whole came in time.
            FrameError: what came is no message of ours.
        """
        self._socket.settimeout(timeout_s)
        while not self._ready:
            data = self._socket.recv(65536)
            if not data:
                return None
            try:
                self._ready.extend(self._decoder.decode(body) for body in self._splitter.feed(data))
            except msgspec.DecodeError as error:
                raise FrameError(str(error)) from error
        return self._ready.pop(0)

    def fileno(self) -> int:
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Make a `receive` that waits in another thread find the end of the stream."""
        with contextlib.suppress(OSError):  # the peer has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> BlockingChannel[M]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen_unix(path: Path, backlog: int = 256) -> socket.socket:
    """A listening socket at `path` (0700), replacing what is there: the caller holds the lock that makes it ours.

    It gets its name when it listens, so that whoever finds it can connect.
    """
    unnamed = path.with_name(f".{path.name}.new")
    unnamed.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _short_name(unnamed) as name:
            sock.bind(name)
        unnamed.chmod(0o700)
        sock.listen(backlog)
        unnamed.replace(path)
    except BaseException:
        sock.close()
        unnamed.unlink(missing_ok=True)
        raise
    return sock


def connect_unix(path: Path, timeout_s: float | None = 5.0) -> socket.socket:
    """A blocking connected socket.

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        with _short_name(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_channel(path: Path, factory: Callable[[], Channel[M]]) -> Channel[M]:
    """Connect to `path` without blocking the loop; the channel is open on return.

    Raises:
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _short_name(path) as name:
            await loop.sock_connect(sock, name)
        _, channel = await loop.create_unix_connection(factory, sock=sock)
    except BaseException:
        sock.close()
        raise
    return channel


class ChannelServer:
    """Accepts peers on a listening socket until it is closed.

    What an `asyncio.Server` has accepted in the very moment it is closed stays open, unanswered and unknown (its
    transport can't be made any more), and the peer waits forever; here it is closed.
    """

    def __init__(self, factory: Callable[[], Channel[M]]) -> None:
        self._factory = factory
        self._server: asyncio.Server | None = None
        self._closed = False

    async def _serve(self, sock: socket.socket) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(self._make, sock=sock)

    def close(self) -> None:
        """Stop accepting; open channels go on."""
        if self._closed or self._server is None:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        for sock in self._server.sockets:
            loop.remove_reader(sock.fileno())
        loop.call_soon(self._server.close)

    def _make(self) -> asyncio.Protocol:
        channel = self._factory()
        opened = channel.connection_made

        def connection_made(transport: asyncio.BaseTransport) -> None:
            if self._closed or peer_uid(transport.get_extra_info("socket")) != os.getuid():
                transport.close()
            else:
                opened(transport)

        channel.connection_made = connection_made  # type: ignore[method-assign]
        return channel


async def serve_channels(sock: socket.socket, factory: Callable[[], Channel[M]]) -> ChannelServer:
    """Accept peers of our own uid on a listening socket; others are closed unanswered."""
    server = ChannelServer(factory)
    await server._serve(sock)
    return server


def peer_uid(sock: Any) -> int:
    """The uid at the other end of a Unix socket, from the kernel."""
    return _peer(sock)[1]


def peer_pid(sock: Any) -> int:
    """The process that connected the other end of a Unix socket; 0 if it can't be seen from here."""
    return _peer(sock)[0]


def _peer(sock: Any) -> tuple[int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", raw)
    return int(pid), int(uid)


def status_socket_from_environment() -> socket.socket:
    """The child's end of its status socket; the variable is taken out, so that grandchildren don't use it.

    Raises:
        RuntimeError: this process was not started by a supervisor.
    """
    value = os.environ.pop(STATUS_FD_VARIABLE, None)
    if value is None:
        raise RuntimeError(f"{STATUS_FD_VARIABLE} is not set: this program is started by `dynbox up`")
    sock = socket.socket(fileno=int(value))
    os.set_inheritable(sock.fileno(), False)
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _short_name(path: Path) -> Iterator[str]:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
