"""The event plane of the store: which blocks the box's tiers have, for the router.

A subscriber says Hello and Subscribe, gets a dump page by page, one page a turn of the loop, and then numbered events.
Numbers are given once in the life of the store, whether anybody listens or not.

A page tells what is there when it is made, not when the dump began. That comes to the same: every event since the dump
began follows its last page, and after the last event about a block it is right, whatever a page said of it before.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dynamo_box.kv.hashing import short_hashes
from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import Channel, ChannelServer, serve_channels
from dynamo_box.protocol.kv import Tier
from dynamo_box.protocol.request import (
    Hello,
    KvCleared,
    KvDump,
    KvRemoved,
    KvStored,
    PeerMessage,
    Refused,
    Subscribe,
    peer_decoder,
)

MAX_HASHES = 4096
"""In a page and in an event: about a millisecond of work."""
MAX_DUMP_BACKLOG = 20_000
"""Events that may wait behind a dump; beyond that a new dump is cheaper."""
MAX_SUBSCRIBERS = 8

Subscriber = Channel[PeerMessage]
Pages = Iterator[tuple[Tier, Sequence[bytes]]]

log = get_logger()


class _Dump:
    """What one subscriber is still to be told; `backlog` are the events after the dump."""

    def __init__(self, next_event_id: int, pages: Pages) -> None:
        self.next_event_id = next_event_id
        self.backlog: list[object] = []
        self._pages = pages
        self._first = True

    def next_page(self) -> KvDump:
        """The last one is empty, and says so."""
        tier, digests = next(self._pages, ("g3", None))
        page = KvDump(
            self.next_event_id,
            short_hashes(digests or ()),
            first=self._first,
            more=digests is not None,
            tier=tier,
        )
        self._first = False
        return page


class EventPlane:
    """`pages` gives all blocks there are, up to MAX_HASHES at once."""

    def __init__(self, pages: Callable[[], Pages]) -> None:
        self._pages = pages
        self._loop = asyncio.get_running_loop()
        self._next_event_id = 0
        self._peers: set[Subscriber] = set()
        self._greeted: set[Subscriber] = set()
        self._dumps: dict[Subscriber, _Dump | None] = {}
        """Subscribers; None once their dump is through."""
        self._server: ChannelServer | None = None

    async def listen(self, sock: socket.socket) -> None:
        self._server = await serve_channels(
            sock, lambda: Channel(peer_decoder, self._on_message, self._on_close, on_open=self._on_open)
        )

    def stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        self.stop_listening()
        for channel in list(self._peers):
            channel.close()

    def stored(self, tier: Tier, digests: Sequence[bytes]) -> None:
        self._publish(KvStored, digests, None, tier)

    def removed(self, tier: Tier, digests: Sequence[bytes]) -> None:
        self._publish(KvRemoved, digests, tier)

    def cleared(self, tier: Tier) -> None:
        self._send(KvCleared(self._number(), tier))

    def _publish(self, kind: type[KvStored] | type[KvRemoved], digests: Sequence[bytes], *rest: Any) -> None:
        for start in range(0, len(digests), MAX_HASHES):
            number = self._number()
            if self._dumps:
                self._send(kind(number, short_hashes(digests[start : start + MAX_HASHES]), *rest))

    def _number(self) -> int:
        self._next_event_id += 1
        return self._next_event_id - 1

    def _send(self, message: object) -> None:
        for channel, dump in list(self._dumps.items()):
            if dump is None:
                channel.send(message)
                continue
            dump.backlog.append(message)
            if len(dump.backlog) > MAX_DUMP_BACKLOG:
                self._subscribe(channel)

    def _on_open(self, channel: Subscriber) -> None:
        self._peers.add(channel)

    def _on_close(self, channel: Subscriber, reason: Exception | None) -> None:
        if reason is not None:
            log.warning("an event connection is closed", reason=str(reason))
        self._peers.discard(channel)
        self._greeted.discard(channel)
        self._dumps.pop(channel, None)

    def _on_message(self, channel: Subscriber, message: PeerMessage) -> None:
        match message:
            case Hello(version=version) if version != PROTOCOL_VERSION:
                self._refuse(channel, f"this store speaks version {PROTOCOL_VERSION}, not {version}")
            case Hello() if len(self._peers) > MAX_SUBSCRIBERS:
                self._refuse(channel, f"{MAX_SUBSCRIBERS} subscribers are the most")
            case Hello():
                self._greeted.add(channel)
            case Subscribe() if channel in self._greeted:
                self._subscribe(channel)
            case _:
                self._refuse(channel, f"{type(message).__name__} is nothing for this socket, or comes before Hello")

    def _refuse(self, channel: Subscriber, reason: str) -> None:
        channel.send(Refused(reason))
        channel.close()

    def _subscribe(self, channel: Subscriber) -> None:
        """Start a dump for this peer, or start it over."""
        dump = self._dumps[channel] = _Dump(self._next_event_id, self._pages())
        self._loop.call_soon(self._send_page, channel, dump)

    def _send_page(self, channel: Subscriber, dump: _Dump) -> None:
        if self._dumps.get(channel) is not dump:
            return
        page = dump.next_page()
        channel.send(page)
        if page.more:
            self._loop.call_soon(self._send_page, channel, dump)
            return
        self._dumps[channel] = None
        for message in dump.backlog:
            channel.send(message)
