"""The event plane of a worker: numbered KV events, dumps of the index, and load, for every subscriber.

Numbers are given once in the life of the worker, whether anybody listens or not. A subscriber gets the index
page by page, one page a turn of the loop, and meanwhile its events queue up behind the last page; so what it
sees is always the dump followed by every event from `next_event_id` on, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from dynamo_box.kv.hashing import short_hash, short_hashes
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.request import KvCleared, KvDump, KvEvent, KvRemoved, KvStored, Load, PeerMessage
from engines.contract import BlockEvent, RemovedBlocks, StoredBlocks

DUMP_PAGE_BLOCKS = 10_000
"""Hashes a page: about a millisecond of work, so that a dump of a million holds up no token."""

MAX_DUMP_BACKLOG = 100_000
"""Events that may wait behind one subscriber's dump; beyond that a new dump is cheaper."""

LOAD_INTERVAL_S = 0.05

Subscriber = Channel[PeerMessage]


@runtime_checkable
class TampersWithEvents(Protocol):
    """A seam for fault injection, taken by the mock engine only: what an engine with this method returns is
    sent in place of each numbered event. None drops it, which leaves a gap in the numbers.
    """

    def tamper(self, event: KvEvent) -> object | None: ...


class _Dump:
    """One subscriber's index, on its way; `backlog` holds the events after it."""

    def __init__(self, next_event_id: int, digests: Sequence[bytes]) -> None:
        self.next_event_id = next_event_id
        self.digests = digests
        self.sent = 0
        self.backlog: list[object] = []

    def next_page(self) -> KvDump:
        first = self.sent == 0
        page = self.digests[self.sent : self.sent + DUMP_PAGE_BLOCKS]
        self.sent += len(page)
        return KvDump(self.next_event_id, short_hashes(page), first=first, more=self.sent < len(self.digests))


class EventFeed:
    """Numbers what the engine tells of its blocks and passes it on.

    `cached_blocks` must give what the published events add up to; `load` is asked at most every 50 ms.
    """

    def __init__(self, cached_blocks: Callable[[], Sequence[bytes]], load: Callable[[], Load]) -> None:
        self._cached_blocks = cached_blocks
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._next_event_id = 0
        self._subscribers: dict[Subscriber, _Dump | None] = {}
        self._load_timer: asyncio.TimerHandle | None = None
        self._load_told: Load | None = None
        self._load_told_at = 0.0
        self.tamper: Callable[[KvEvent], object | None] | None = None

    def subscribe(self, channel: Subscriber) -> None:
        """Start a dump for this peer, or start it over."""
        dump = _Dump(self._next_event_id, self._cached_blocks())
        self._subscribers[channel] = dump
        self._send_page(channel, dump)

    def forget(self, channel: Subscriber) -> None:
        self._subscribers.pop(channel, None)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def publish(self, events: Sequence[BlockEvent]) -> None:
        """Number `events`, which have just been added to what `cached_blocks` gives, and send them."""
        if not self._subscribers:
            self._next_event_id += len(events)
            return
        for event in events:
            numbered = _numbered(self._next_event_id, event)
            self._next_event_id += 1
            message = numbered if self.tamper is None else self.tamper(numbered)
            if message is not None:
                self._send(message)
        for channel, dump in self._subscribers.items():
            if dump is not None and len(dump.backlog) > MAX_DUMP_BACKLOG:
                self._loop.call_soon(self._start_over, channel, dump)

    def load_may_have_changed(self) -> None:
        """Tell the subscribers soon, if it has."""
        if self._load_timer is None and self._subscribers:
            wait = self._load_told_at + LOAD_INTERVAL_S - self._loop.time()
            self._load_timer = self._loop.call_later(max(0.0, wait), self._tell_load)

    def close(self) -> None:
        if self._load_timer is not None:
            self._load_timer.cancel()
        self._subscribers.clear()

    def _send(self, message: object) -> None:
        for channel, dump in self._subscribers.items():
            if dump is None:
                channel.send(message)
            else:
                dump.backlog.append(message)

    def _send_page(self, channel: Subscriber, dump: _Dump) -> None:
        if self._subscribers.get(channel) is not dump:
            return
        page = dump.next_page()
        channel.send(page)
        if page.more:
            self._loop.call_soon(self._send_page, channel, dump)
            return
        for message in dump.backlog:
            channel.send(message)
        self._subscribers[channel] = None
        channel.send(self._load())

    def _start_over(self, channel: Subscriber, dump: _Dump) -> None:
        if self._subscribers.get(channel) is dump:
            self.subscribe(channel)

    def _tell_load(self) -> None:
        self._load_timer = None
        load = self._load()
        if load != self._load_told:
            self._load_told, self._load_told_at = load, self._loop.time()
            for channel, dump in self._subscribers.items():
                if dump is None:
                    channel.send(load)


def _numbered(event_id: int, event: BlockEvent) -> KvEvent:
    if isinstance(event, StoredBlocks):
        parent = short_hash(event.parent) if event.parent else None
        return KvStored(event_id, short_hashes(event.digests), parent)
    if isinstance(event, RemovedBlocks):
        return KvRemoved(event_id, short_hashes(event.digests))
    return KvCleared(event_id)
