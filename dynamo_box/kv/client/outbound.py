"""Blocks of the pool into the host tier: reserve slots, copy, commit, a part of an Offer at a time.

A block whose parent is in no tier would never be found, so once the store has no slot for one, those after it in its
chain are not copied. The other way round nothing is lost: what is KNOWN or being written by somebody else goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_box.kv.client.arena import SharedArena
from dynamo_box.kv.client.jobs import Copier, Offer, Offered, Result
from dynamo_box.kv.client.lane import Lane, Limits, Link
from dynamo_box.kv.client.session import StoreGone, StoreSession
from dynamo_box.protocol.kv import BUSY, FULL, KNOWN, Abandon, Block, Commit, Committed, Reserve, Reserved

PART_BLOCKS = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queued:
    """`fits`: there was room for it in the queue."""

    job: Offer
    fits: bool


@dataclass(slots=True)
class _Progress:
    """Of one Offer: what is before `place` is stored, known or dropped, or is being worked on."""

    job: Offer
    place: int = 0
    stored: int = 0
    known: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: set[bytes] = field(default_factory=set)
    """Blocks that are in no tier: what follows them is of no use."""
    bytes: int = 0
    seconds: float = 0.0

    def drop_rest(self, reason: str) -> None:
        left = len(self.job.blocks) - self.stored - self.known - self.dropped.total()
        if left:
            self.dropped[reason] += left
        self.place = len(self.job.blocks)

    def result(self) -> Offered:
        return Offered(self.job.key, self.stored, self.known, dict(self.dropped), self.bytes, self.seconds)


class OutboundLane(Lane[Queued]):
    def __init__(
        self,
        dial: Callable[[], StoreSession],
        shared: SharedArena,
        limits: Limits,
        on_status: Callable[[], None],
        copier: Copier,
        deliver: Callable[[Result], None],
        block_bytes: int,
        queued_blocks: int,
    ) -> None:
        super().__init__("kv-out", dial, shared, limits, on_status)
        self._copier = copier
        self._deliver = deliver
        self._block_bytes = block_bytes
        self._most_queued = queued_blocks
        self._queue_guard = threading.Lock()
        self._queued = 0
        self._begun: deque[_Progress] = deque()

    @property
    def queued(self) -> int:
        """Blocks that have been offered and not answered."""
        return self._queued

    def offer(self, job: Offer) -> None:
        """From any thread."""
        count = len(job.blocks)
        with self._queue_guard:
            fits = not self._queued or self._queued + count <= self._most_queued
            if fits:
                self._queued += count
        self.put(Queued(job, fits))

    def begin(self, link: Link, job: Queued) -> None:
        if job.fits:
            self._begun.append(_Progress(job.job))
        else:
            self._refuse_overflow(job.job)

    def work(self, link: Link) -> bool:
        if not self._begun:
            return False
        progress = self._begun[0]
        start, progress.place = progress.place, min(progress.place + PART_BLOCKS, len(progress.job.blocks))
        self._store(link, progress, range(start, progress.place))
        if progress.place == len(progress.job.blocks):
            self._begun.popleft()
            self._answer(progress.result())
        return True

    def next_deadline(self) -> float | None:
        return None

    def refuse(self, job: Queued, reason: str) -> None:
        if job.fits:
            progress = _Progress(job.job)
            progress.drop_rest("store_gone")
            self._answer(progress.result())
        else:
            self._refuse_overflow(job.job)

    def abort(self, reason: str) -> None:
        while self._begun:
            progress = self._begun.popleft()
            progress.drop_rest("store_gone")
            self._answer(progress.result())

    def _store(self, link: Link, progress: _Progress, part: range) -> None:
        began = time.monotonic()
        wanted = [place for place in part if not self._is_cut(progress, progress.job.blocks[place])]
        if not wanted:
            return
        blocks = tuple(progress.job.blocks[place] for place in wanted)
        reserved = link.session.call(lambda number: Reserve(number, blocks), Reserved, self._limits.store_s)
        if len(reserved.slots) != len(blocks) or not _sound(link, reserved.slots):
            raise StoreGone("the kvstore gives slots that can't be")
        places: list[int] = []
        slots: list[int] = []
        useless: list[int] = []
        for place, block, slot in zip(wanted, blocks, reserved.slots, strict=True):
            if slot == KNOWN:
                progress.known += 1
            elif slot == BUSY:
                progress.dropped["store_busy"] += 1
            elif slot == FULL:
                progress.dropped["store_full"] += 1
                progress.cut.add(block.digest)
            elif self._is_cut(progress, block):
                useless.append(slot)
            else:
                places.append(progress.job.pool_blocks[place])
                slots.append(slot)
        if useless:
            link.session.tell(Abandon(tuple(useless)))
        if not slots:
            return
        if not self._copy(link, places, slots):
            link.session.tell(Abandon(tuple(slots)))
            progress.drop_rest("copy_failed")
            return
        committed = link.session.call(lambda number: Commit(number, tuple(slots)), Committed, self._limits.store_s)
        lost = len(set(committed.lost) & set(slots))
        if lost:
            progress.dropped["store_busy"] += lost
        progress.stored += len(slots) - lost
        progress.bytes += (len(slots) - lost) * self._block_bytes
        progress.seconds += time.monotonic() - began

    def _is_cut(self, progress: _Progress, block: Block) -> bool:
        """Whether the block's chain has a hole before it; it is dropped then."""
        if not block.parent or block.parent not in progress.cut:
            return False
        progress.cut.add(block.digest)
        progress.dropped["store_full"] += 1
        return True

    def _copy(self, link: Link, places: list[int], slots: list[int]) -> bool:
        with self.writing(), link.arena.views(slots) as views:
            try:
                self._copier.copy_out(places, views)
            except Exception as error:  # the engine's own; whatever it is, these blocks are not stored
                log.exception("blocks of the pool could not be copied out")
                traceback.clear_frames(error.__traceback__)  # they hold views of the arena
                return False
        return True

    def _refuse_overflow(self, job: Offer) -> None:
        self._deliver(Offered(job.key, dropped={"queue_full": len(job.blocks)} if job.blocks else {}))

    def _answer(self, result: Offered) -> None:
        with self._queue_guard:
            self._queued -= result.stored + result.known + sum(result.dropped.values())
        self._deliver(result)


def _sound(link: Link, slots: tuple[int, ...]) -> bool:
    real = [slot for slot in slots if slot not in (KNOWN, BUSY, FULL)]
    return len(set(real)) == len(real) and all(link.arena.has(slot) for slot in real)
