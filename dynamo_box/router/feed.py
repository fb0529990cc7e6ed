"""One holder's dump and numbered events → its part of the index. (A holder is a worker, or the store of the tiers.)

The index must hold only what is right. A missing or repeated number, an event in the middle of a dump,
content that can't be read or that the rest contradicts: each makes all that is known of the worker doubtful,
so it is forgotten at once and asked for again. Until the new dump begins, everything that still arrives
belongs to the doubtful past and is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from dynamo_box.protocol.request import KvCleared, KvDump, KvEvent, KvRemoved, KvStored
from dynamo_box.router.index import KvIndex

SLICE_HASHES = 1024
MAX_WAITING_HASHES = 2**22
PARENT_DOUBT_EVERY_S = 60.0

KvMessage = KvDump | KvEvent


class Listener(Protocol):
    """What a feed tells of itself."""

    def doubt(self, reason: str) -> None:
        """All that was known of the worker is forgotten: subscribe again."""

    def cleared(self) -> None:
        """The worker has emptied its cache."""

    def index_full(self) -> None:
        """The worker holds more blocks than the index takes; told once in each life of the feed."""


class Feed:
    """Takes in messages with `receive` and works through them with `apply`, in order.

    A block whose parent the worker never told of is a contradiction too, but engines that drop a parent
    before its child would be asked for dumps without end: it is a reason for doubt once a minute at most, and none at
    all without `chains` (the box's tiers, which evict by priority and not from the end of a chain).
    """

    def __init__(
        self,
        index: KvIndex,
        worker: str,
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
        *,
        chains: bool = True,
    ) -> None:
        self._index = index
        self._worker = worker
        self._listener = listener
        self._clock = clock
        self._chains = chains
        self._waiting: deque[KvMessage] = deque()
        self._waiting_hashes = 0
        self._applied_of_head = 0
        self._next_event_id: int | None = None  # None: waiting for the first page of a dump
        self._dumping = False
        self._parent_doubt_from = 0.0
        self._told_full = False

    def receive(self, message: KvMessage) -> None:
        self._waiting.append(message)
        self._waiting_hashes += _size(message)
        if self._waiting_hashes > MAX_WAITING_HASHES:
            self.doubt(f"{self._waiting_hashes} hashes wait to be indexed")

    def doubt(self, reason: str) -> None:
        """Forget what is known, and have it asked for again."""
        self.reset()
        self._listener.doubt(reason)

    def reset(self) -> None:
        """Forget the worker's blocks and everything that waits; go on with the first page of a dump."""
        self._waiting.clear()
        self._waiting_hashes = 0
        self._applied_of_head = 0
        self._next_event_id = None
        self._dumping = False
        self._index.forget(self._worker)

    def apply(self) -> bool:
        """Work through up to SLICE_HASHES hashes; whether more waits."""
        budget = SLICE_HASHES
        while self._waiting and budget > 0:
            message = self._waiting[0]
            if self._applied_of_head == 0:
                reason = self._check(message)
                if reason is None:
                    self._drop_head()
                    budget -= 1
                    continue
                if reason:
                    self.doubt(reason)
                    return False
            budget -= self._apply_part(message, budget) + 1
        return bool(self._waiting)

    def _check(self, message: KvMessage) -> str | None:
        """Follow the numbers up to `message`: "" to apply it, None to drop it, else why it can't be right."""
        if isinstance(message, KvDump):
            return self._check_page(message)
        if self._next_event_id is None:
            return None
        if self._dumping:
            return f"event {message.event_id} came in the middle of a dump"
        if message.event_id != self._next_event_id:
            return f"event {message.event_id} came in place of {self._next_event_id}"
        self._next_event_id += 1
        if isinstance(message, KvStored) and self._parent_is_missing(message):
            return f"the parent of the blocks in event {message.event_id} was never stored"
        return ""

    def _check_page(self, page: KvDump) -> str | None:
        if page.first:
            self._index.forget(self._worker)
            self._next_event_id = page.next_event_id
        elif self._next_event_id is None:
            return None
        elif not self._dumping or page.next_event_id != self._next_event_id:
            return f"a page of a dump before event {page.next_event_id} came out of place"
        self._dumping = page.more
        return ""

    def _parent_is_missing(self, event: KvStored) -> bool:
        if not self._chains or event.parent is None or self._index.full(self._worker):
            return False
        now = self._clock()
        if now < self._parent_doubt_from or self._index.holds(self._worker, event.parent):
            return False
        self._parent_doubt_from = now + PARENT_DOUBT_EVERY_S
        return True

    def _apply_part(self, message: KvMessage, budget: int) -> int:
        """Apply up to `budget` of the message's hashes and, with the last of them, the message; how many."""
        if isinstance(message, KvCleared):
            self._index.clear(self._worker, message.tier)
            self._drop_head()
            self._listener.cleared()
            return 0
        start = self._applied_of_head
        part = message.hashes[start : start + budget]
        if isinstance(message, KvRemoved):
            self._index.remove(self._worker, part, message.tier)
        elif self._index.store(self._worker, part, message.tier) and not self._told_full:
            self._told_full = True
            self._listener.index_full()
        self._applied_of_head += len(part)
        if self._applied_of_head >= len(message.hashes):
            self._drop_head()
        return len(part)

    def _drop_head(self) -> None:
        self._waiting_hashes -= _size(self._waiting.popleft())
        self._applied_of_head = 0


def _size(message: KvMessage) -> int:
    """What a message counts for while it waits; its hashes, and itself."""
    return 1 if isinstance(message, KvCleared) else len(message.hashes) + 1
