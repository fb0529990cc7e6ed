"""Frames that carry file descriptors: the frames of `framing.py`, with SCM_RIGHTS, over a Unix stream socket.

Descriptors leave with the first byte of their message. The receiver reads a frame's header and body by exact sizes
and never beyond, so that what the kernel hands over in between belongs to that message and to no other; a message
whose `descriptors` field says something else ends the connection, and everything received is closed.

asyncio's transports can neither send nor receive descriptors, so `FdChannel` works on the socket itself.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from dynamo_box.protocol.framing import HEADER, MAX_BACKLOG, MAX_FRAME, FrameError, encode_frame
from dynamo_box.protocol.gms import MAX_DESCRIPTORS

MAX_WAITING_DESCRIPTORS = 8192
"""Duplicated for messages that the socket doesn't take yet; each is a descriptor of this process."""
LONGEST_FLUSH_S = 1.0
"""How long `close` waits for a peer to take what is queued."""
MESSAGES_A_TURN = 64
"""After so many the loop serves others first."""

_PIECE = 256 * 1024
_INT = array.array("i").itemsize
_TOO_MANY_IN_FLIGHT_RETRY_S = 0.01

M = TypeVar("M")


class FdChannel(Generic[M]):
    """One connection on an event loop; takes over the socket.

    `on_message(channel, message, fds)` runs on the loop for each message and owns the descriptors. `on_close` runs
    once, from the loop and never from within a call of ours, with None for an orderly end, else the reason. A peer
    that doesn't read is cut off once `max_backlog` bytes or MAX_WAITING_DESCRIPTORS wait for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        on_message: Callable[[FdChannel[M], M, list[int]], None],
        on_close: Callable[[FdChannel[M], Exception | None], None] | None = None,
        *,
        max_backlog: int = MAX_BACKLOG,
        max_frame: int = MAX_FRAME,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = decoder
        self._on_message = on_message
        self._on_close = on_close
        self._max_backlog = max_backlog
        self._assembler = _FrameAssembler(max_frame)
        self._outbox: deque[_Outgoing] = deque()
        self._outbox_bytes = 0
        self._outbox_fds = 0
        self._waits_for_room = False
        self._closing = False
        self._over = False
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        return not self._closing and not self._over

    @property
    def socket(self) -> socket.socket:
        return self._socket

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send, or queue, a message with descriptors, which stay the caller's. Dropped once closed.

        Raises:
            FrameError: the message is larger than a frame may be, or has too many descriptors.
        """
        if not self.is_open:
            return
        if len(fds) > MAX_DESCRIPTORS:
            raise FrameError(f"{len(fds)} descriptors with one message are over the cap of {MAX_DESCRIPTORS}")
        outgoing = _Outgoing(encode_frame(message), list(fds))
        try:
            if self._outbox or not outgoing.send_on(self._socket):
                outgoing.own()
                self._outbox.append(outgoing)
                self._outbox_bytes += len(outgoing.data)
                self._outbox_fds += len(outgoing.fds)
                self._await_room()
        except OSError as error:
            self._end(error)
            return
        if self._outbox_bytes > self._max_backlog or self._outbox_fds > MAX_WAITING_DESCRIPTORS:
            self._end(FrameError(f"the peer left {self._outbox_bytes} bytes unread"))

    def close(self) -> None:
        """Send what is queued (for at most LONGEST_FLUSH_S), then close."""
        if not self.is_open:
            return
        self._closing = True
        self._loop.remove_reader(self._socket.fileno())
        if self._outbox:
            self._loop.call_later(LONGEST_FLUSH_S, self._end, None)
        else:
            self._end(None)

    def abort(self, reason: Exception) -> None:
        """Close at once; `on_close` gets the reason."""
        self._end(reason)

    def _readable(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            if not self.is_open:
                return
            try:
                frame = self._assembler.step(self._socket)
                if frame is None:
                    continue
                message, fds = _decode(self._decoder, *frame)
            except (BlockingIOError, InterruptedError):
                return
            except EOFError:
                self._end(None)
                return
            except (OSError, FrameError) as error:
                self._end(error)
                return
            self._on_message(self, message, fds)

    def _await_room(self) -> None:
        if not self._waits_for_room:
            self._waits_for_room = True
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            while self._outbox:
                first = self._outbox[0]
                before, fds = len(first.data), len(first.fds)
                done = first.send_on(self._socket)
                self._outbox_bytes -= before - len(first.data)
                self._outbox_fds -= fds - len(first.fds)
                if not done:
                    return
                self._outbox.popleft()
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                # Too many descriptors of this user are under way. The socket stays writable, so only time can tell.
                self._stop_awaiting_room()
                self._loop.call_later(_TOO_MANY_IN_FLIGHT_RETRY_S, self._resume)
                return
            self._end(error)
            return
        self._stop_awaiting_room()
        if self._closing:
            self._end(None)

    def _resume(self) -> None:
        if not self._over and self._outbox:
            self._await_room()

    def _stop_awaiting_room(self) -> None:
        if self._waits_for_room:
            self._waits_for_room = False
            self._loop.remove_writer(self._socket.fileno())

    def _end(self, reason: Exception | None) -> None:
        if self._over:
            return
        self._over = True
        self._stop_awaiting_room()
        self._loop.remove_reader(self._socket.fileno())
        self._assembler.drop()
        for outgoing in self._outbox:
            outgoing.drop()
        self._outbox.clear()
        self._socket.close()
        self._loop.call_soon(self._closed, reason)

    def _closed(self, reason: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        if self._on_close is not None:
            self._on_close(self, reason)


class BlockingFdChannel(Generic[M]):
    """The same frames on a blocking socket. `bytes_sent` and `bytes_received` count frames, headers included."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[M], *, max_frame: int = MAX_FRAME) -> None:
        self._socket = sock
        self._decoder = decoder
        self._assembler = _FrameAssembler(max_frame)
        self.bytes_sent = 0

    @property
    def bytes_received(self) -> int:
        return self._assembler.bytes_received

    def send(self, message: Any, fds: Sequence[int] = (), *, timeout_s: float | None = None) -> None:
        """Returns when the kernel has all of it; the descriptors stay the caller's.

        Raises:
            TimeoutError: the peer doesn't read; the connection is of no further use.
            OSError: the peer is gone.
        """
        if len(fds) > MAX_DESCRIPTORS:
            raise FrameError(f"{len(fds)} descriptors with one message are over the cap of {MAX_DESCRIPTORS}")
        outgoing = _Outgoing(encode_frame(message), list(fds))
        self.bytes_sent += len(outgoing.data)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
            if outgoing.send_on(self._socket):
                return
            if until is not None and time.monotonic() >= until:
                raise TimeoutError("the peer does not read")

    def receive(self, timeout_s: float | None = None) -> tuple[M, list[int]] | None:
        """The next message with its descriptors, which are the caller's now; None at end of stream.

        Raises:
            TimeoutError: nothing whole came in time; what came is kept for the next call.
            FrameError: what came is no message of ours.
            OSError: the connection broke.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
            try:
                frame = self._assembler.step(self._socket)
            except EOFError:
                return None
            if frame is not None:
                return _decode(self._decoder, *frame)
            if until is not None and time.monotonic() >= until:
                raise TimeoutError("no whole message came in time")

    def fileno(self) -> int:
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Make a `receive` that waits in another thread find the end of the stream."""
        with contextlib.suppress(OSError):  # the peer has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._assembler.drop()
        self._socket.close()


class _Outgoing:
    """A message on its way: what is left of its bytes, and its descriptors until the first byte has left."""

    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = memoryview(data)
        self.fds = fds
        self._owned = False

    def send_on(self, sock: socket.socket) -> bool:
        """Whether all has left; False when the socket takes no more now."""
        while self.data:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.fds))] if self.fds else []
            try:
                sent = sock.sendmsg([self.data], rights, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            self.data = self.data[sent:]
            self.drop()
        return True

    def own(self) -> None:
        """Duplicate the descriptors, so that the caller may close its own.

        Raises:
            OSError: no more descriptors may be open.
        """
        duplicates: list[int] = []
        try:
            for fd in self.fds:
                duplicates.append(os.dup(fd))  # noqa: PERF401 - those made before a failure must be closed
        except OSError:
            close_all(duplicates)
            raise
        self.fds = duplicates
        self._owned = True

    def drop(self) -> None:
        if self._owned:
            close_all(self.fds)
        self.fds = []


class _FrameAssembler:
    """Reads one frame after another from a socket, each with the descriptors that came with its bytes."""

    def __init__(self, max_frame: int) -> None:
        self._max_frame = max_frame
        self._buffer = bytearray()
        self._wanted = HEADER.size
        self._in_body = False
        self._fds: list[int] = []
        self.bytes_received = 0

    def step(self, sock: socket.socket) -> tuple[bytes, list[int]] | None:
        """Read once; the body and descriptors of a frame if it is whole now.

        Raises:
            EOFError: the peer closed between two frames.
            FrameError: it closed within one, or sent what can't be a frame.
            OSError: BlockingIOError, TimeoutError, or the connection broke.
        """
        if self._wanted > len(self._buffer):
            self._read(sock, min(self._wanted - len(self._buffer), _PIECE))
            if self._wanted > len(self._buffer):
                return None
        if not self._in_body:
            (self._wanted,) = HEADER.unpack(self._buffer)
            self._buffer.clear()
            self._in_body = True
            if self._wanted > self._max_frame:
                raise FrameError(f"a frame of {self._wanted} bytes is over the cap of {self._max_frame}")
            return None
        body, fds = bytes(self._buffer), self._fds
        self._buffer.clear()
        self._wanted, self._in_body, self._fds = HEADER.size, False, []
        return body, fds

    def _read(self, sock: socket.socket, size: int) -> None:
        data, ancillary, flags, _ = sock.recvmsg(
            size, socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds += array.array("i", content[: len(content) - len(content) % _INT])
        if flags & socket.MSG_CTRUNC:
            raise FrameError("descriptors were cut off: too many with one message, or too many open here")
        if len(self._fds) > MAX_DESCRIPTORS:
            raise FrameError(f"{len(self._fds)} descriptors with one message are over the cap of {MAX_DESCRIPTORS}")
        if not data:
            if self._buffer or self._in_body:
                raise FrameError("the connection ended within a frame")
            raise EOFError
        self._buffer += data
        self.bytes_received += len(data)

    def drop(self) -> None:
        close_all(self._fds)
        self._fds = []


def _decode(decoder: msgspec.msgpack.Decoder[M], body: bytes, fds: list[int]) -> tuple[M, list[int]]:
    try:
        message = decoder.decode(body)
        said = getattr(message, "descriptors", 0)
        if said != len(fds):
            raise FrameError(f"{type(message).__name__} says {said} descriptors, and {len(fds)} came")
    except (msgspec.DecodeError, FrameError) as error:
        close_all(fds)
        raise error if isinstance(error, FrameError) else FrameError(str(error)) from error
    return message, fds


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
