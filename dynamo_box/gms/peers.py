"""Engines' connections. One is served one message at a time: what comes while an answer is due waits, within bounds."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from dynamo_box.accepting import Acceptor
from dynamo_box.gms.copying import MoveFailed
from dynamo_box.gms.keeping import NotKept
from dynamo_box.gms.layout import Layout
from dynamo_box.gms.vmm import VmmError
from dynamo_box.log import get_logger
from dynamo_box.protocol import gms
from dynamo_box.protocol.descriptors import FdChannel
from dynamo_box.protocol.framing import FrameError, peer_pid, peer_uid
from dynamo_box.protocol.gms import ErrorCode

MAX_CONNECTIONS = 256
MAX_INBOX = 64
"""Messages that a connection may have ahead of its answers."""

Channel = FdChannel[gms.EngineMessage]

log = get_logger()


class Refused(Exception):
    """Answered by GmsError; the connection goes on."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code: ErrorCode = code
        self.text = text


@dataclass(eq=False)
class Peer:
    """One connection. `layout` is what it holds or waits for."""

    id: int
    channel: Channel
    pid: int
    pidfd: int
    layout: Layout | None = None
    inbox: deque[gms.EngineMessage] = field(default_factory=deque)
    busy: bool = False
    expiry: asyncio.TimerHandle | None = None

    def lives(self) -> bool:
        """Asked of the kernel now: its end of the socket is open, and the process that opened it runs."""
        if not self.channel.is_open:
            return False
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(0):
                return False
        try:
            return bool(self.channel.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def stop_waiting(self) -> None:
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None


class Peers:
    """`handle` answers a message, now or `in_background`, or raises Refused; `gone` is told of each peer that was
    accepted and is no more; `changed` is called whenever figures may be others than before.
    """

    def __init__(
        self,
        handle: Callable[[Peer, gms.EngineMessage], None],
        gone: Callable[[Peer], None],
        changed: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._gone = gone
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, Peer] = {}
        self._ids = itertools.count(1)
        self._acceptor = Acceptor(self._accept)
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests = 0
        self.refused = 0

    def __getitem__(self, id_: int) -> Peer:
        return self._open[id_]

    def __contains__(self, id_: int) -> bool:
        return id_ in self._open

    def lives(self, id_: int) -> bool:
        peer = self._open.get(id_)
        return peer is not None and peer.lives()

    def listen(self, sock: socket.socket) -> None:
        self._acceptor.listen(sock)

    def stop_listening(self) -> None:
        self._acceptor.close()

    async def close(self) -> None:
        """Returns when nothing is under way any more."""
        self.stop_listening()
        for task in self._tasks:
            task.cancel()
        for peer in self._open.values():
            peer.stop_waiting()
            peer.channel.close()
            if peer.pidfd >= 0:
                os.close(peer.pidfd)
        self._open.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def refuse(self, peer: Peer, code: ErrorCode, text: str) -> None:
        self.refused += 1
        peer.channel.send(gms.GmsError(code, text))

    def in_background(self, peer: Peer, work: Coroutine[Any, Any, None]) -> None:
        """Answer later; until then the connection's next message waits."""
        peer.busy = True
        task = self._loop.create_task(self._finish(peer, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, peer: Peer, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Refused as refusal:
            self.refuse(peer, refusal.code, refusal.text)
        except (MoveFailed, VmmError, NotKept) as error:
            self.refuse(peer, "failed", str(error))
        except Exception as error:
            # A fault of ours: whoever waits for the answer must not wait for ever, and others are served on.
            log.exception("a request failed")
            self.refuse(peer, "failed", f"{type(error).__name__}: {error}")
        finally:
            peer.busy = False
        self._serve(peer)

    def _accept(self, sock: socket.socket) -> None:
        if peer_uid(sock) != os.getuid() or len(self._open) >= MAX_CONNECTIONS:
            log.warning("a connection is refused", uid=peer_uid(sock), connections=len(self._open))
            sock.close()
            return
        pid = peer_pid(sock)
        try:
            pidfd = os.pidfd_open(pid) if pid else -1
        except OSError:  # it is gone already, which its socket tells too; or no descriptor is left
            pidfd = -1
        id_ = next(self._ids)
        channel: Channel = FdChannel(
            sock,
            gms.engine_decoder,
            lambda _channel, message, _fds: self._on_message(id_, message),
            lambda _channel, reason: self._on_close(id_, reason),
        )
        self._open[id_] = Peer(id_, channel, pid, pidfd)

    def _on_message(self, id_: int, message: gms.EngineMessage) -> None:
        peer = self._open[id_]
        self.requests += 1
        peer.inbox.append(message)
        if len(peer.inbox) > MAX_INBOX:
            peer.channel.abort(FrameError(f"over {MAX_INBOX} messages without waiting for an answer"))
            return
        self._serve(peer)

    def _serve(self, peer: Peer) -> None:
        while peer.inbox and not peer.busy and peer.channel.is_open:
            message = peer.inbox.popleft()
            try:
                self._handle(peer, message)
            except Refused as refusal:
                self.refuse(peer, refusal.code, refusal.text)
        self._changed()

    def _on_close(self, id_: int, reason: Exception | None) -> None:
        peer = self._open.pop(id_, None)
        if peer is None:
            return
        if reason is not None:
            log.warning("a connection is closed", pid=peer.pid, reason=str(reason))
        peer.stop_waiting()
        peer.inbox.clear()
        if peer.pidfd >= 0:
            os.close(peer.pidfd)
        self._gone(peer)
