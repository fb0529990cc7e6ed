"""A router's side of the event plane, without the rest of it."""

from __future__ import annotations

from collections.abc import Callable

from store_peers import DEADLINE_S, Store, digest

from dynamo_box.kv.hashing import short_hash
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import BlockingChannel, connect_unix
from dynamo_box.protocol.request import Hello, KvDump, KvRemoved, KvStored, Subscribe, WorkerMessage, worker_decoder
from dynamo_box.router.feed import Feed
from dynamo_box.router.index import KvIndex


class Router:
    """One that follows the store. It must never have a reason to doubt."""

    def __init__(self, store: Store) -> None:
        self.index = KvIndex()
        self.feed = Feed(self.index, "kvstore", self)
        self.channel: BlockingChannel[WorkerMessage] = BlockingChannel(connect_unix(store.events_path), worker_decoder)
        store.peers.append(self)
        self.pages: list[KvDump] = []
        self.channel.send(Hello("router", PROTOCOL_VERSION))
        self.subscribe()

    def subscribe(self) -> None:
        self.pages.clear()
        self.channel.send(Subscribe())
        self.take_until(lambda: bool(self.pages) and not self.pages[-1].more)
        assert [page.first for page in self.pages] == [True] + [False] * (len(self.pages) - 1)
        assert len({page.next_event_id for page in self.pages}) == 1

    def take_until(self, true: Callable[[], bool]) -> None:
        while not true():
            message = self.channel.receive(DEADLINE_S)
            assert isinstance(message, KvDump | KvStored | KvRemoved), message
            if isinstance(message, KvDump):
                self.pages.append(message)
            self.feed.receive(message)
            while self.feed.apply():
                pass

    def holds(self, *numbers: int) -> list[int]:
        return [number for number in numbers if self.index.holds("kvstore", short_hash(digest(number)))]

    def tiers(self, tier: str) -> int:
        return sum(len(page.hashes) for page in self.pages if page.tier == tier)

    def doubt(self, reason: str) -> None:
        raise AssertionError(reason)

    def cleared(self) -> None:
        raise AssertionError("nothing was cleared at once")

    def index_full(self) -> None:
        raise AssertionError("the index is full")

    def close(self) -> None:
        self.channel.close()
