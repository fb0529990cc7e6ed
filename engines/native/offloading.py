"""From the engine's pool to the KV tiers, behind the steps.

A block that a step has filled, or that a request found in the pool, is judged by the priority filter and, if it
passes, queued by its digest. Queued blocks are not held: what is evicted first is not offered. A few at a time, in
runs of one chain, are pinned, copied by the threads of `Tiers`, and unpinned when their `Offered` comes back.

A block that was stored is not offered again soon, unless a request thinks more of it than those before: the tiers then
learn its new priority. After a while it is (the tiers may have lost it, and should know that it is still in use).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

from dynamo_box.kv.client.jobs import Offer, Offered
from dynamo_box.kv.offload import LengthMismatch, block_priorities, judge
from dynamo_box.protocol.kv import UNSET_PRIORITY_COUNTS_AS, Block
from dynamo_box.protocol.spec import Offload
from engines.contract import BlockEvent, RemovedBlocks
from engines.log import get_logger
from engines.native.blocks import BlockPool
from engines.native.sequence import Sequence as Request

BATCH_BLOCKS = 16
MOST_PINNED_PART = 8
"""At most one block in so many of the pool is pinned."""
OFFER_AGAIN_S = 60.0

log = get_logger()


class _State(Enum):
    """TAKEN: somebody else offers it."""

    IDLE = auto()
    QUEUED = auto()
    OFFERED = auto()
    TAKEN = auto()


@dataclass(slots=True)
class _Kept:
    """A block that may be offered, as long as it lies in the pool. `place` is its place in the chain; `stored_at` is
    when the tiers last said that they have it, with its priority.
    """

    parent: bytes
    place: int
    priority: int | None
    state: _State = _State.IDLE
    stored_at: float | None = None


@dataclass(frozen=True, slots=True)
class _InFlight:
    pool_blocks: tuple[int, ...]
    blocks: tuple[Block, ...]


class Offloading:
    def __init__(
        self,
        pool: BlockPool,
        offer: Callable[[Offer], None],
        settings: Offload,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._offer = offer
        self._settings = settings
        self._block_size = block_size
        self._clock = clock
        self._keys = count(1)
        self._queue: deque[bytes] = deque()
        self._in_flight: dict[int, _InFlight] = {}
        self.use(pool)
        self.filtered = self.unset = 0
        self.dropped: Counter[str] = Counter()
        self.terminated: Counter[str] = Counter()

    def use(self, pool: BlockPool) -> None:
        """From now on it is about this pool, with nothing in it yet; nothing may be queued or in flight."""
        self._pool = pool
        self._most_pinned = max(1, min(self._settings.pinned_blocks, pool.total // MOST_PINNED_PART))
        self._kept: dict[bytes, _Kept] = {}

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def pinned(self) -> int:
        return self._pool.pinned

    @property
    def copying(self) -> bool:
        """Whether blocks of the pool are being read."""
        return bool(self._in_flight)

    def consider(self, request: Request) -> None:
        """Judge what is new among the request's blocks in the pool."""
        state, first = request.offload, request.offload.blocks
        if request.published <= first or state.over:
            return
        state.blocks = request.published
        try:
            priorities = block_priorities(
                first,
                request.published - first,
                block_size=self._block_size,
                prompt_tokens=len(request.request.tokens),
                priority=request.request.kv_priority,
                ranges=request.request.kv_priorities,
            )
            verdict = judge(
                priorities,
                request.published - first,
                min_priority=self._settings.min_priority,
                continue_after_filter=self._settings.continue_after_filter,
                stopped=state.stopped,
            )
        except LengthMismatch as error:
            log.error("nothing of a request is offloaded", request_id=request.request.request_id, error=str(error))
            self.terminated["length_mismatch"] += 1
            state.over = True
            return
        self.filtered += verdict.filtered
        self.unset += verdict.unset
        if verdict.stopped and not state.stopped:
            self.terminated["priority"] += 1
        state.stopped = verdict.stopped
        for place in verdict.taken:
            self._wish(request.digests, first + place, priorities[place])

    def loaded(self, digests: Sequence[bytes], first: int, priorities: Iterable[int | None]) -> None:
        """The blocks of this chain from its block `first` on came from the tiers, with these priorities."""
        for place, priority in enumerate(priorities, first):
            parent = digests[place - 1] if place else b""
            kept = self._kept.setdefault(digests[place], _Kept(parent, place, priority))
            if kept.priority == priority:
                kept.stored_at = self._clock()

    def forget(self, events: Iterable[BlockEvent]) -> None:
        """Nothing needs to be known of blocks that the pool has no more."""
        for event in events:
            if isinstance(event, RemovedBlocks):
                for digest in event.digests:
                    kept = self._kept.get(digest)
                    if kept is not None and kept.state is _State.IDLE and self._pool.find(digest) is None:
                        del self._kept[digest]

    def send(self) -> None:
        """Offer what is queued, as far as blocks may be pinned."""
        while self._queue and self._pool.pinned < self._most_pinned:
            batch = self._next_batch(min(BATCH_BLOCKS, self._most_pinned - self._pool.pinned))
            if batch is not None:
                self._pool.pin(batch.pool_blocks)
                key = next(self._keys)
                self._in_flight[key] = batch
                self._offer(Offer(key, batch.pool_blocks, batch.blocks))

    def offered(self, result: Offered) -> None:
        batch = self._in_flight.pop(result.key)
        self._pool.unpin(batch.pool_blocks)
        stored = result.stored + result.known == len(batch.blocks)
        for block in batch.blocks:
            kept = self._kept[block.digest]
            kept.state = _State.IDLE
            if stored and kept.priority == block.priority:
                kept.stored_at = self._clock()

    def take_over(self, digests: Sequence[bytes], priority: int | None) -> tuple[list[Block], list[int]]:
        """A chain that somebody else wants in the tiers, as blocks; `priority` is that of those that the filter has
        kept out. And the places of those that the tiers aren't known to have and that nobody offers: whoever asks does
        so, and says when that is over (`handed`).
        """
        blocks, places = [], []
        for place, digest in enumerate(digests):
            kept = self._kept.get(digest)
            worth = priority if kept is None else kept.priority
            blocks.append(Block(digest, digests[place - 1] if place else b"", worth))
            if kept is None:
                places.append(place)
            elif kept.state in (_State.IDLE, _State.QUEUED) and not self._is_fresh(kept):
                kept.state = _State.TAKEN
                places.append(place)
        return blocks, places

    def handed(self, blocks: Iterable[Block], *, stored: bool) -> None:
        """An offer of blocks that were taken over has its answer, or won't be made."""
        for block in blocks:
            kept = self._kept.get(block.digest)
            if kept is not None and kept.state is _State.TAKEN:
                kept.state = _State.IDLE
                if stored and kept.priority == block.priority:
                    kept.stored_at = self._clock()
                if self._pool.find(block.digest) is None:
                    del self._kept[block.digest]

    def queue_everything(self) -> None:
        """All that lies in the pool and may be offered, in runs that one offer can take: first those with something
        that the tiers haven't had, and heads of chains before what follows them.
        """
        idle = {digest: kept for digest, kept in self._kept.items() if kept.state is _State.IDLE}
        ending_with: dict[bytes, list[bytes]] = {}
        runs: list[list[bytes]] = []
        for digest, kept in sorted(idle.items(), key=lambda item: item[1].place):
            run = ending_with.pop(kept.parent, None)
            if run is None or len(run) == BATCH_BLOCKS:
                run = []
                runs.append(run)
            run.append(digest)
            ending_with[digest] = run
        runs.sort(key=lambda run: all(idle[digest].stored_at is not None for digest in run))
        for run in runs:
            for digest in run:
                self._enqueue(digest)

    def clear_queue(self) -> None:
        """Offer nothing more of what waits."""
        while self._queue:
            digest = self._queue.popleft()
            if self._waits(digest):
                self._leave(digest, "cut_short")

    def _wish(self, digests: Sequence[bytes], place: int, priority: int | None) -> None:
        """Have the tiers store this block, unless they did so lately for as much."""
        digest = digests[place]
        kept = self._kept.get(digest)
        if kept is None:
            kept = self._kept[digest] = _Kept(digests[place - 1] if place else b"", place, priority)
        elif _worth(priority) > _worth(kept.priority):
            kept.priority, kept.stored_at = priority, None
        if kept.state is _State.IDLE and not self._is_fresh(kept):
            if len(self._queue) < self._settings.queue_blocks:
                self._enqueue(digest)
            else:
                self.dropped["queue_full"] += 1

    def _is_fresh(self, kept: _Kept) -> bool:
        return kept.stored_at is not None and self._clock() - kept.stored_at < OFFER_AGAIN_S

    def _waits(self, digest: bytes) -> bool:
        """Whether what lies in the queue is still to be offered: it may have been taken over."""
        kept = self._kept.get(digest)
        return kept is not None and kept.state is _State.QUEUED

    def _enqueue(self, digest: bytes) -> None:
        self._kept[digest].state = _State.QUEUED
        self._queue.append(digest)

    def _next_batch(self, most: int) -> _InFlight | None:
        """The next run of one chain, without what the pool has no more; None if nothing is left of it."""
        pool_blocks: list[int] = []
        blocks: list[Block] = []
        while self._queue and len(blocks) < most:
            if not self._waits(self._queue[0]):
                self._queue.popleft()
                continue
            kept = self._kept[self._queue[0]]
            if blocks and kept.parent != blocks[-1].digest:
                break
            digest = self._queue.popleft()
            found = self._pool.find(digest)
            if found is None:
                self._leave(digest, "evicted")
            else:
                kept.state = _State.OFFERED
                pool_blocks.append(found)
                blocks.append(Block(digest, kept.parent, kept.priority))
        return _InFlight(tuple(pool_blocks), tuple(blocks)) if blocks else None

    def _leave(self, digest: bytes, reason: str) -> None:
        self.dropped[reason] += 1
        self._kept[digest].state = _State.IDLE
        if self._pool.find(digest) is None:
            del self._kept[digest]


def _worth(priority: int | None) -> int:
    return UNSET_PRIORITY_COUNTS_AS if priority is None else priority
