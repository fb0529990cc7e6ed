"""Blocks of the pool into the host tier: reserve slots, copy, commit, a part of an Offer at a time. And holds on them,
each once the Offers before it are done.

While one part is copied the slots for the next are asked for, and nobody waits for the answer to a Commit: on a busy
machine a process that is woken for an answer waits for its turn, and that takes longer than the copy.

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
from dynamo_box.kv.client.jobs import Copier, Keep, Kept, Offer, Offered, Result
from dynamo_box.kv.client.lane import Lane, Limits, Link
from dynamo_box.kv.client.session import StoreGone, StoreSession
from dynamo_box.protocol.kv import (
    BUSY,
    FULL,
    KNOWN,
    MAX_BATCH,
    Abandon,
    Block,
    Commit,
    Committed,
    Held,
    Hold,
    Reserve,
    Reserved,
)

PART_BLOCKS = 32
PARTS_AHEAD = 2
"""Parts that have slots, or have asked for them, and are not copied."""
MAX_UNCOMMITTED = 8
"""Parts that are copied, with no answer to their Commit."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queued:
    """`fits`: there was room for it in the queue."""

    job: Offer
    fits: bool


@dataclass(slots=True, eq=False)
class _Progress:
    """Of one Offer: what is before `place` is stored, known or dropped, or in one of its `open` parts."""

    job: Offer
    place: int = 0
    open: int = 0
    stored: int = 0
    known: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: set[bytes] = field(default_factory=set)
    """Blocks that are in no tier: what follows them is of no use."""
    copy_failed: bool = False
    bytes: int = 0
    seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.place == len(self.job.blocks) and not self.open

    def drop(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += count

    def drop_rest(self, reason: str) -> None:
        """All that isn't accounted for."""
        self.drop(reason, len(self.job.blocks) - self.stored - self.known - self.dropped.total())

    def cuts(self, block: Block) -> bool:
        """Whether the block's chain has a hole before it; it is dropped then."""
        if not block.parent or block.parent not in self.cut:
            return False
        self.cut.add(block.digest)
        self.drop("store_full", 1)
        return True

    def result(self) -> Offered:
        return Offered(self.job.key, self.stored, self.known, dict(self.dropped), self.bytes, self.seconds)


@dataclass(slots=True, eq=False)
class _Part:
    """Blocks of an Offer, by their places in it, for which `number` was asked at `asked_at`: a Reserve, and then a
    Commit of `slots`.
    """

    progress: _Progress
    places: list[int]
    number: int
    asked_at: float
    slots: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class _Keeping:
    """`behind` are the Offers to wait for; `number` is 0 until the store was asked, at `asked_at`."""

    job: Keep
    behind: list[_Progress]
    number: int = 0
    asked_at: float = 0.0


class OutboundLane(Lane[Queued | Keep]):
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
        self._reserving: deque[_Part] = deque()
        self._committing: deque[_Part] = deque()
        self._keeping: list[_Keeping] = []
        self._busy_until = 0.0

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

    def begin(self, link: Link, job: Queued | Keep) -> None:
        if isinstance(job, Keep):
            self._keeping.append(_Keeping(job, list(self._begun)))
        elif job.fits:
            self._begun.append(_Progress(job.job))
        else:
            self._refuse_overflow(job.job)

    def work(self, link: Link) -> bool:
        self._ask_ahead(link)
        copied = self._copy_next(link)
        committed = self._take_committed(link)
        for progress in [one for one in self._begun if one.is_over]:
            self._begun.remove(progress)
            self._answer(progress.result())
        self._keep(link)
        if self._is_late(link):
            raise StoreGone(f"the kvstore has not answered for {self._limits.store_s:g} s")
        return copied or committed

    def next_deadline(self) -> float | None:
        asked = self._asked()
        return min(asked.values()) + self._limits.store_s if asked else None

    def _is_late(self, link: Link) -> bool:
        """Whether the store owes an answer for too long. One that came while a copy took its time is here by now."""
        if (deadline := self.next_deadline()) is None or time.monotonic() < deadline:
            return False
        link.session.pump()
        owed = [asked_at for number, asked_at in self._asked().items() if link.session.awaits(number)]
        return bool(owed) and time.monotonic() >= min(owed) + self._limits.store_s

    def _asked(self) -> dict[int, float]:
        """When the first question of each kind was asked, by its number."""
        asked: list[_Part | _Keeping] = [parts[0] for parts in (self._reserving, self._committing) if parts]
        asked += self._keeping
        return {one.number: one.asked_at for one in asked if one.number}

    def refuse(self, job: Queued | Keep, reason: str) -> None:
        if isinstance(job, Keep):
            self._deliver(Kept(job.key, reason))
        elif job.fits:
            progress = _Progress(job.job)
            progress.drop_rest("store_gone")
            self._answer(progress.result())
        else:
            self._refuse_overflow(job.job)

    def abort(self, reason: str) -> None:
        self._reserving.clear()
        self._committing.clear()
        while self._begun:
            progress = self._begun.popleft()
            progress.drop_rest("store_gone")
            self._answer(progress.result())
        keeping, self._keeping = self._keeping, []
        for one in keeping:
            self._deliver(Kept(one.job.key, reason))

    def _keep(self, link: Link) -> None:
        """Ask for holds whose Offers are done, and pass on what the store said."""
        for keeping in list(self._keeping):
            job = keeping.job
            if not keeping.number:
                keeping.behind = [progress for progress in keeping.behind if not progress.is_over]
                if keeping.behind:
                    continue
                if len(job.digests) > MAX_BATCH:
                    self._keeping.remove(keeping)
                    self._deliver(Kept(job.key, f"{len(job.digests)} blocks are more than the {MAX_BATCH} of a hold"))
                    continue
                keeping.asked_at = time.monotonic()
                keeping.number = link.session.post(
                    lambda number, job=job: Hold(number, job.hold, job.digests, job.ttl_s)  # type: ignore[misc]
                )
            held = link.session.taken(keeping.number, Held)
            if held is not None:
                self._keeping.remove(keeping)
                self._deliver(Kept(job.key, held.error))

    def _ask_ahead(self, link: Link) -> None:
        """Reserve slots for the next parts."""
        for progress in self._begun:
            blocks = progress.job.blocks
            while progress.place < len(blocks):
                if len(self._reserving) >= PARTS_AHEAD or len(self._committing) >= MAX_UNCOMMITTED:
                    return
                start, progress.place = progress.place, min(progress.place + PART_BLOCKS, len(blocks))
                places = [place for place in range(start, progress.place) if not progress.cuts(blocks[place])]
                if places:
                    wanted = tuple(blocks[place] for place in places)
                    number = link.session.post(lambda number, wanted=wanted: Reserve(number, wanted))  # type: ignore[misc]
                    self._reserving.append(_Part(progress, places, number, time.monotonic()))
                    progress.open += 1

    def _copy_next(self, link: Link) -> bool:
        """Copy the part whose slots have come, and commit them; False if none have."""
        reserved = link.session.taken(self._reserving[0].number, Reserved) if self._reserving else None
        if reserved is None:
            return False
        part = self._reserving.popleft()
        if len(reserved.slots) != len(part.places) or not _sound(link, reserved.slots):
            raise StoreGone("the kvstore gives slots that can't be")
        self._ask_ahead(link)
        progress, asked_at = part.progress, part.asked_at
        places = self._sort(link, part, reserved.slots)
        if places and self._copy(link, places, part.slots):
            part.number = link.session.post(lambda number: Commit(number, part.slots))
            part.asked_at = time.monotonic()
            self._committing.append(part)
        else:
            progress.open -= 1
            if places:
                self._give_up(link, part)
        now = time.monotonic()
        progress.seconds += now - max(asked_at, self._busy_until)
        self._busy_until = now
        return True

    def _sort(self, link: Link, part: _Part, slots: tuple[int, ...]) -> list[int]:
        """Pool blocks to copy into `part.slots`."""
        progress = part.progress
        pool_blocks: list[int] = []
        to_fill: list[int] = []
        useless: list[int] = []
        for place, slot in zip(part.places, slots, strict=True):
            block = progress.job.blocks[place]
            if slot == KNOWN:
                progress.known += 1
            elif slot == BUSY:
                progress.drop("store_busy", 1)
            elif slot == FULL:
                progress.drop("store_full", 1)
                progress.cut.add(block.digest)
            elif progress.copy_failed:
                progress.drop("copy_failed", 1)
                useless.append(slot)
            elif progress.cuts(block):
                useless.append(slot)
            else:
                pool_blocks.append(progress.job.pool_blocks[place])
                to_fill.append(slot)
        if useless:
            link.session.tell(Abandon(tuple(useless)))
        part.slots = tuple(to_fill)
        return pool_blocks

    def _copy(self, link: Link, pool_blocks: list[int], slots: tuple[int, ...]) -> bool:
        with self.writing(), link.arena.views(slots) as views:
            try:
                self._copier.copy_out(pool_blocks, views)
            except Exception as error:  # the engine's own; whatever it is, these blocks are not stored
                log.exception("blocks of the pool could not be copied out")
                traceback.clear_frames(error.__traceback__)  # they hold views of the arena
                return False
        return True

    def _give_up(self, link: Link, part: _Part) -> None:
        """A copy failed: nothing more of its Offer is stored."""
        progress = part.progress
        progress.copy_failed = True
        progress.drop("copy_failed", len(part.slots) + len(progress.job.blocks) - progress.place)
        progress.place = len(progress.job.blocks)
        link.session.tell(Abandon(part.slots))

    def _take_committed(self, link: Link) -> bool:
        taken = False
        while self._committing:
            part = self._committing[0]
            committed = link.session.taken(part.number, Committed)
            if committed is None:
                break
            self._committing.popleft()
            lost = len(set(committed.lost) & set(part.slots))
            stored = len(part.slots) - lost
            part.progress.open -= 1
            part.progress.drop("store_busy", lost)
            part.progress.stored += stored
            part.progress.bytes += stored * self._block_bytes
            taken = True
        return taken

    def _refuse_overflow(self, job: Offer) -> None:
        self._deliver(Offered(job.key, dropped={"queue_full": len(job.blocks)} if job.blocks else {}))

    def _answer(self, result: Offered) -> None:
        with self._queue_guard:
            self._queued -= result.stored + result.known + sum(result.dropped.values())
        self._deliver(result)


def _sound(link: Link, slots: tuple[int, ...]) -> bool:
    real = [slot for slot in slots if slot not in (KNOWN, BUSY, FULL)]
    return len(set(real)) == len(real) and all(link.arena.has(slot) for slot in real)
