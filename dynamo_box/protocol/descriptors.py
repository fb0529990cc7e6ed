"""Frames that carry file descriptors: 4-byte length and msgpack as everywhere, with SCM_RIGHTS beside the first byte.

Streams of event loops don't carry descriptors, so both channels here work on the socket itself. What makes them sound:

Whose descriptors are they? A frame that has some leaves in a `sendmsg` of its own, and Linux ends a read after the
piece that brought descriptors. So those that come with a read belong to the last frame that *starts* in it; if none
starts there, or that frame says another number in its `descriptors` field (absent: 0), the peer is no peer of ours.

Who closes them? The kernel has made them ours once `recvmsg` returns, whatever is wrong with the rest. They go to
`on_message`, or are closed here: on each error, at each end, for each message that nobody takes any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic

import msgspec

from dynamo_box.protocol.framing import MAX_BACKLOG, MAX_FRAME, FrameError, FrameSplitter, M, encode_frame
from dynamo_box.protocol.gms import MAX_DESCRIPTORS

MAX_QUEUED_DESCRIPTORS = 8192
"""Duplicates that wait for a peer that doesn't read."""
SEND_TIMEOUT_S = 30.0

_READ = 256 * 1024
_INT = struct.calcsize("i")
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)


class FdChannel(Generic[M]):
    """One connection on an event loop; `sock` is connected and becomes non-blocking and the channel's own.

    `on_message` runs on the loop for each message and owns the descriptors it gets. `on_close` runs on the loop, once:
    with None for an orderly end of either side, else with the reason. A peer that leaves `max_backlog` bytes unread is
    cut off.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        on_message: Callable[[FdChannel[M], M, list[int]], None],
        on_close: Callable[[FdChannel[M], Exception | None], None] | None = None,
        *,
        max_frame: int = MAX_FRAME,
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        self._socket = sock
        self._assembler = _Assembler(decoder, max_frame)
        self._on_message = on_message
        self._on_close = on_close
        self._max_backlog = max_backlog
        self._outbox: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog = 0
        self._queued_descriptors = 0
        self._writing = False
        self._open = True
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def sock(self) -> socket.socket:
        return self._socket

    @property
    def backlog(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._backlog

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send at once, or as soon as the peer reads; dropped once closed. `fds` stay the caller's, who may close them
        on return.

        Raises:
            FrameError: too large for a frame, or other than `message.descriptors` says.
        """
        data = memoryview(_checked_frame(message, fds))
        if not self._open:
            return
        if not self._outbox:
            try:
                sent = _send_some(self._socket, data, fds)
            except OSError as error:
                self._end(error)
                return
            if sent:
                data, fds = data[sent:], ()
                if not data:
                    return
        self._queue(data, fds)

    def close(self) -> None:
        """Send what the socket takes at once, then close."""
        if self._open:
            self._flush()
            self._end(None)

    def abort(self, reason: Exception) -> None:
        """Close at once; `on_close` gets the reason."""
        self._end(reason)

    def _queue(self, data: memoryview, fds: Sequence[int]) -> None:
        duplicates: list[int] = []
        try:
            for fd in fds:
                duplicates.append(os.dup(fd))  # noqa: PERF401  # what was duplicated before an error must be closed
        except OSError as error:
            _close_all(duplicates)
            self._end(error)
            return
        self._outbox.append((data, duplicates))
        self._backlog += len(data)
        self._queued_descriptors += len(duplicates)
        if self._backlog > self._max_backlog:
            self._end(FrameError(f"the peer left {self._backlog} bytes unread"))
        elif self._queued_descriptors > MAX_QUEUED_DESCRIPTORS:
            self._end(FrameError(f"the peer left {self._queued_descriptors} descriptors untaken"))
        elif not self._writing:
            self._writing = True
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            try:
                sent = _send_some(self._socket, data, fds)
            except OSError as error:
                self._end(error)
                return
            if not sent:
                return
            self._backlog -= sent
            self._queued_descriptors -= len(fds)
            _close_all(fds)
            if sent == len(data):
                self._outbox.popleft()
            else:
                self._outbox[0] = (data[sent:], [])
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())

    def _on_readable(self) -> None:
        try:
            data, fds = _receive_some(self._socket)
            if not data and not fds:
                self._assembler.finish()
                self._end(None)
                return
            with contextlib.closing(self._assembler.feed(data, fds)) as messages:
                for message, its_fds in messages:
                    self._on_message(self, message, its_fds)
                    if not self._open:
                        return
        except BlockingIOError:
            return
        except (FrameError, OSError) as error:
            self._end(error)
        except Exception as error:
            self._end(error)
            raise

    def _end(self, reason: Exception | None) -> None:
        if not self._open:
            return
        self._open = False
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
            if self._writing:
                self._loop.remove_writer(self._socket.fileno())
            if self._on_close is not None:
                self._loop.call_soon(self._on_close, self, reason)
        self._assembler.drop()
        for _, fds in self._outbox:
            _close_all(fds)
        self._outbox.clear()
        self._backlog = self._queued_descriptors = 0
        self._socket.close()


class BlockingFdChannel(Generic[M]):
    """The same over a socket that threads wait on; one thread sends while another receives, or one does both."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[M], *, max_frame: int = MAX_FRAME) -> None:
        self._socket = sock
        self._assembler = _Assembler(decoder, max_frame)
        self._ready: deque[tuple[M, list[int]]] = deque()
        self.bytes_sent = 0
        self.bytes_received = 0
        sock.setblocking(False)

    def send(self, message: Any, fds: Sequence[int] = (), timeout_s: float = SEND_TIMEOUT_S) -> None:
        """`fds` stay the caller's.

        Raises:
            FrameError: too large for a frame, or other than `message.descriptors` says.
            TimeoutError: the peer doesn't read; the connection is of no further use.
            OSError: the peer is gone.
        """
        data = memoryview(_checked_frame(message, fds))
        deadline = time.monotonic() + timeout_s
        while data:
            sent = _send_some(self._socket, data, fds)
            if sent:
                self.bytes_sent += sent
                data, fds = data[sent:], ()
            else:
                self._wait(select.POLLOUT, deadline, "the peer doesn't read")

    def receive(self, timeout_s: float | None = None) -> tuple[M, list[int]] | None:
        """The next message and its descriptors, which are the caller's now; None at the end of the stream.

        Raises:
            TimeoutError: nothing whole came in time.
            FrameError: what came is no message of ours, or ended in the middle of one; its descriptors are closed.
            OSError: the connection broke.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            try:
                data, fds = _receive_some(self._socket)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, "no answer")
                continue
            if not data and not fds:
                self._assembler.finish()
                return None
            self.bytes_received += len(data)
            self._ready.extend(self._assembler.feed(data, fds))
        return self._ready.popleft()

    def fileno(self) -> int:
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Make a `receive` that waits in another thread find the end of the stream."""
        with contextlib.suppress(OSError):  # the peer has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self._assembler.drop()
        for _, fds in self._ready:
            _close_all(fds)
        self._ready.clear()

    def __enter__(self) -> BlockingFdChannel[M]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, event: int, deadline: float | None, otherwise: str) -> None:
        left_s = None if deadline is None else deadline - time.monotonic()
        poll = select.poll()
        poll.register(self._socket, event)
        if left_s is not None and (left_s <= 0 or not poll.poll(left_s * 1000)):
            raise TimeoutError(otherwise)
        if left_s is None:
            poll.poll()


class _Assembler(Generic[M]):
    """Bytes and descriptors in, messages with theirs out."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M], max_frame: int) -> None:
        self._decoder = decoder
        self._splitter = FrameSplitter(max_frame)
        self._held: list[int] = []
        """Of the frame that has begun and not ended."""

    def feed(self, data: bytes, fds: list[int]) -> Generator[tuple[M, list[int]], None, None]:
        """Takes over `fds`: those that were not yielded are closed when this ends, however it ends.

        Raises:
            FrameError: no message of ours.
        """
        assigned: deque[tuple[bytes, list[int]]] = deque()
        try:
            assigned.extend(self._assign(data, fds))
            while assigned:
                body, its_fds = assigned[0]
                message = self._decode(body, len(its_fds))
                assigned.popleft()
                yield message, its_fds
        finally:
            for _, its_fds in assigned:
                _close_all(its_fds)

    def _assign(self, data: bytes, fds: list[int]) -> list[tuple[bytes, list[int]]]:
        began_before = self._splitter.pending > 0
        try:
            bodies = list(self._splitter.feed(data))
        except FrameError:
            self.drop()
            _close_all(fds)
            raise
        frames: list[tuple[bytes, list[int]]] = [(body, []) for body in bodies]
        if frames and began_before:
            frames[0] = (frames[0][0], self._held)
            self._held = []
        starts_here = len(bodies) - began_before + (self._splitter.pending > 0)
        if fds and starts_here <= 0:
            self.drop()
            _close_all(fds)
            for _, its_fds in frames:
                _close_all(its_fds)
            raise FrameError(f"{len(fds)} descriptors came in the middle of a message")
        if fds and self._splitter.pending:
            self._held = fds
        elif fds:
            frames[-1] = (frames[-1][0], fds)
        return frames

    def _decode(self, body: bytes, came: int) -> M:
        try:
            message = self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameError(str(error)) from error
        said = getattr(message, "descriptors", 0)
        if said != came:
            raise FrameError(f"{type(message).__name__} says {said} descriptors and {came} came with it")
        return message

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            FrameError: in the middle of a frame.
        """
        self.drop()
        if self._splitter.pending:
            raise FrameError(f"the stream ended {self._splitter.pending} bytes into a message")

    def drop(self) -> None:
        _close_all(self._held)
        self._held = []


def _checked_frame(message: Any, fds: Sequence[int]) -> bytes:
    said = getattr(message, "descriptors", 0)
    if said != len(fds) or said > MAX_DESCRIPTORS:
        raise FrameError(
            f"{type(message).__name__} says {said} descriptors, {len(fds)} are given, {MAX_DESCRIPTORS} may go together"
        )
    return encode_frame(message)


def _send_some(sock: socket.socket, data: memoryview, fds: Sequence[int]) -> int:
    """Bytes that went, and with the first of them `fds`; 0: the socket takes nothing now."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        return sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0


def _receive_some(sock: socket.socket) -> tuple[bytes, list[int]]:
    """What has come: bytes, and the descriptors beside them; nothing of either at the end of the stream.

    Raises:
        BlockingIOError: nothing has come.
        FrameError: more descriptors than MAX_DESCRIPTORS, or than this process may open.
    """
    data, ancillary, flags, _ = sock.recvmsg(_READ, _ANCILLARY, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(fd for (fd,) in struct.iter_unpack("i", payload[: len(payload) // _INT * _INT]))
    if flags & socket.MSG_CTRUNC:
        _close_all(fds)
        raise FrameError(f"more descriptors than {MAX_DESCRIPTORS} with one message, or than this process may open")
    return data, fds


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
