"""What the tiers have, into blocks of the pool.

Fetches go on side by side, a batch each in turn, and jobs that came are looked at between batches: a seek never waits
for longer than one batch is copied, nor a short fetch for a long one. Loads from disk are asked for ahead, so that
reading overlaps with copying.

A block counts as fetched only if its slot's header named it before and after the copy. The first that is in doubt ends
its fetch: what is before it is right, and a later one is of no use without it.
"""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dynamo_box.kv.client.arena import SharedArena
from dynamo_box.kv.client.jobs import Copier, Fetch, Fetched, Forgo, Result, Seek, Sought
from dynamo_box.kv.client.lane import Lane, Limits, Link
from dynamo_box.kv.client.ledger import Ledger
from dynamo_box.kv.client.session import StoreGone, StoreSession
from dynamo_box.protocol.kv import MAX_BATCH, Distrust, Find, Found, Load, Loaded, Release, Tier

BATCH_BLOCKS = 16
LOADS_AHEAD = 2
"""Batches of one fetch that the disk may be reading while another is copied."""
MAX_SIDE_BY_SIDE = 4
MAX_UNANSWERED = 32
"""Loads that the store may be busy with, for fetches that have ended too. It takes 64 from a connection."""
MAX_LEASES = 4096
NO_LEASE = "the lease has ended with its connection, or was never given"

TIER_NAMES: dict[str, Tier] = {"2": "g2", "3": "g3"}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Lease:
    """`found` speaks of the first blocks of `digests`; `found.lease` is the store's name for it, ours is another: the
    store's successor gives the same names again.
    """

    found: Found
    digests: tuple[bytes, ...]


@dataclass(slots=True)
class _Batch:
    """Blocks from `start` on, all in one tier. On disk: `number` is the Load that was asked at `asked_at`."""

    start: int
    count: int
    tier: str
    number: int = 0
    asked_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Progress:
    """Of one Fetch: the first `count` of its blocks are in the pool and right."""

    job: Fetch
    lease: _Lease
    batches: deque[_Batch]
    deadline: float
    busy_until: float
    """When its last batch was through."""
    count: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def result(self, *, failed: bool, error: str) -> Fetched:
        failed_tier = self.lease.found.tiers[self.job.skip + self.count] if failed else ""
        return Fetched(self.job.key, self.count, failed_tier, self.bytes, self.seconds, error)


class InboundLane(Lane[Seek | Fetch | Forgo]):
    def __init__(
        self,
        dial: Callable[[], StoreSession],
        shared: SharedArena,
        limits: Limits,
        on_status: Callable[[], None],
        copier: Copier,
        deliver: Callable[[Result], None],
        block_bytes: int,
        ledger: Ledger,
    ) -> None:
        super().__init__("kv-in", dial, shared, limits, on_status)
        self._copier = copier
        self._deliver = deliver
        self._block_bytes = block_bytes
        self._ledger = ledger
        self._names = itertools.count(1)
        self._leases: dict[int, _Lease] = {}
        self._seeking: Seek | None = None
        self._waiting: deque[tuple[Fetch, _Lease]] = deque()
        self._going: deque[_Progress] = deque()

    def begin(self, link: Link, job: Seek | Fetch | Forgo) -> None:
        if isinstance(job, Seek):
            self._seeking = job
            result = self._seek(link, job)
            self._seeking = None
            self._deliver(result)
        elif isinstance(job, Fetch):
            self._begin_fetch(link, job)
        else:
            lease = self._leases.pop(job.lease, None)
            if lease is not None:
                self._release(link, lease)

    def work(self, link: Link) -> bool:
        while self._waiting and len(self._going) < MAX_SIDE_BY_SIDE:
            self._going.append(self._started(*self._waiting.popleft()))
        for progress in list(self._going):
            self._ask_ahead(link, progress)
        for _ in range(len(self._going)):
            progress = self._going[0]
            self._going.rotate(-1)
            if self._advance(link, progress):
                return True
        return link.arena.map_ahead() or self._copier.prepare()

    def next_deadline(self) -> float | None:
        first = [progress.batches[0] for progress in self._going]
        late = [batch.asked_at + self._limits.load_s for batch in first if batch.number]
        return min([*late, *(progress.deadline for progress in self._going)], default=None)

    def refuse(self, job: Seek | Fetch | Forgo, reason: str) -> None:
        if isinstance(job, Seek):
            self._deliver(Sought(job.key, error=reason))
        elif isinstance(job, Fetch):
            self._deliver(Fetched(job.key, 0, error=reason))

    def abort(self, reason: str) -> None:
        if self._seeking is not None:
            seek, self._seeking = self._seeking, None
            self.refuse(seek, reason)
        for job, lease in self._waiting:
            self._going.append(self._started(job, lease))
        self._waiting.clear()
        while self._going:
            progress = self._going.popleft()
            self._count(progress.lease, progress.job.skip, progress.count, failed=True)
            self._deliver(progress.result(failed=True, error=reason))
        for lease in self._leases.values():
            self._count(lease)
        self._leases.clear()

    def _seek(self, link: Link, job: Seek) -> Sought:
        if len(self._leases) >= MAX_LEASES:
            return Sought(job.key, error=f"{MAX_LEASES} leases wait for their Fetch or Forgo")
        digests = job.digests[:MAX_BATCH]
        if not digests and not job.claim:
            return Sought(job.key)
        found = link.session.call(lambda number: Find(number, digests, job.claim), Found, self._limits.seek_s)
        _check(link, found, len(digests))
        if not found.tiers:
            return Sought(job.key)
        name = next(self._names)
        self._leases[name] = _Lease(found, digests)
        self._ledger.matched(found.tiers)
        return Sought(job.key, found.tiers, name, found.priorities)

    def _begin_fetch(self, link: Link, job: Fetch) -> None:
        lease = self._leases.pop(job.lease, None)
        if lease is None:
            self._deliver(Fetched(job.key, 0, error=NO_LEASE))
        elif not job.pool_blocks or not 0 <= job.skip <= len(lease.found.tiers) - len(job.pool_blocks):
            wanted = f"{len(job.pool_blocks)} blocks from block {job.skip} on"
            error = f"{wanted} of a lease on {len(lease.found.tiers)}" if job.pool_blocks else ""
            self._deliver(Fetched(job.key, 0, error=error))
            self._release(link, lease)
        else:
            self._waiting.append((job, lease))

    def _started(self, job: Fetch, lease: _Lease) -> _Progress:
        now = time.monotonic()
        batches = deque(_batches(lease.found.tiers, job.skip, job.skip + len(job.pool_blocks)))
        return _Progress(job, lease, batches, now + self._limits.fetch_s, now)

    def _ask_ahead(self, link: Link, progress: _Progress) -> None:
        ahead = 0
        for batch in progress.batches:
            if batch.tier != "3":
                continue
            if not batch.number:
                if link.session.unanswered >= MAX_UNANSWERED:
                    return
                batch.asked_at = time.monotonic()
                batch.number = link.session.post(
                    lambda number, batch=batch: Load(number, progress.lease.found.lease, batch.start, batch.count)  # type: ignore[misc]
                )
            ahead += 1
            if ahead == LOADS_AHEAD:
                return

    def _advance(self, link: Link, progress: _Progress) -> bool:
        """Copy the fetch's next batch; False if the disk is still reading it."""
        now = time.monotonic()
        batch = progress.batches[0]
        found = progress.lease.found
        end = batch.start + batch.count
        slots, generations = found.slots[batch.start : end], found.generations[batch.start : end]
        error = ""
        if batch.tier == "3":
            loaded = link.session.taken(batch.number, Loaded)
            if loaded is None:
                if batch.number and now >= batch.asked_at + self._limits.load_s:
                    raise StoreGone(f"the kvstore has not answered for {self._limits.load_s:g} s")
                if now < progress.deadline:
                    return False
                self._end(link, progress, f"the disk needs more than {self._limits.fetch_s:g} s", failed=True)
                return True
            _check_loaded(link, loaded, batch.count)
            slots, generations, error = loaded.slots, loaded.generations, loaded.error
        began = max(batch.asked_at, progress.busy_until) if batch.tier == "3" else now
        right = self._copy(link, progress, batch.start, slots, generations)
        progress.busy_until = time.monotonic()
        progress.batches.popleft()
        if right:
            progress.count += right
            progress.bytes[batch.tier] = progress.bytes.get(batch.tier, 0) + right * self._block_bytes
            progress.seconds[batch.tier] = progress.seconds.get(batch.tier, 0.0) + progress.busy_until - began
        if right < batch.count:
            self._end(link, progress, error or "a block could not be copied, or its slot held another", failed=True)
        elif not progress.batches:
            self._end(link, progress, "", failed=False)
        elif progress.busy_until >= progress.deadline:
            self._end(link, progress, f"it took more than {self._limits.fetch_s:g} s", failed=True)
        return True

    def _copy(
        self, link: Link, progress: _Progress, start: int, slots: tuple[int, ...], generations: tuple[int, ...]
    ) -> int:
        """How many of these blocks, from the first on, are in the pool now and right."""
        digests = progress.lease.digests[start : start + len(slots)]
        pool_blocks = progress.job.pool_blocks[start - progress.job.skip :]
        names = list(zip(slots, generations, digests, strict=True))
        good = sum(1 for _ in itertools.takewhile(lambda name: link.arena.holds(*name), names))
        doubtful = slots[good : good + 1]
        if good:
            with link.arena.views(slots[:good]) as views:
                try:
                    self._copier.copy_in(views, pool_blocks[:good])
                except Exception as error:  # the engine's own; whatever it is, these blocks are not in the pool
                    log.exception("blocks could not be copied into the pool")
                    traceback.clear_frames(error.__traceback__)  # they hold views of the arena
                    return 0
            still = sum(1 for _ in itertools.takewhile(lambda name: link.arena.holds(*name), names[:good]))
            if still < good:
                good, doubtful = still, slots[still : still + 1]
        if doubtful:
            link.session.tell(Distrust(doubtful))
        return good

    def _end(self, link: Link, progress: _Progress, error: str, *, failed: bool) -> None:
        self._going.remove(progress)
        for batch in progress.batches:
            if batch.number:
                link.session.forget(batch.number)
        self._deliver(progress.result(failed=failed, error=error))
        self._release(link, progress.lease, progress.job.skip, progress.count, failed=failed)

    def _release(self, link: Link, lease: _Lease, skip: int = 0, count: int = 0, *, failed: bool = False) -> None:
        loaded, lost, wasted = self._count(lease, skip, count, failed=failed)
        link.session.tell(Release(lease.found.lease, _by_tier(loaded), _by_tier(lost), _by_tier(wasted)))

    def _count(self, lease: _Lease, skip: int = 0, count: int = 0, *, failed: bool = False) -> tuple[str, str, str]:
        """The lease's blocks, a tier letter each: loaded, failed, wasted."""
        tiers, end = lease.found.tiers, skip + count
        parts = tiers[skip:end], tiers[end : end + failed], tiers[:skip] + tiers[end + failed :]
        self._ledger.used(*parts)
        return parts


def _batches(tiers: str, start: int, end: int) -> Iterator[_Batch]:
    for tier, group in itertools.groupby(tiers[start:end]):
        group_end = start + sum(1 for _ in group)
        while start < group_end:
            count = min(BATCH_BLOCKS, group_end - start)
            yield _Batch(start, count, tier)
            start += count


def _by_tier(letters: str) -> dict[Tier, int]:
    return {name: letters.count(letter) for letter, name in TIER_NAMES.items() if letter in letters}


def _check(link: Link, found: Found, asked: int) -> None:
    count = len(found.tiers)
    sound = (
        count <= asked
        and set(found.tiers) <= set(TIER_NAMES)
        and bool(found.lease) == bool(count)
        and len(found.slots) == len(found.generations) == len(found.priorities) == count
        and all(link.arena.has(slot) for slot, tier in zip(found.slots, found.tiers, strict=True) if tier == "2")
    )
    if not sound:
        raise StoreGone("the kvstore finds what can't be")


def _check_loaded(link: Link, loaded: Loaded, asked: int) -> None:
    count = len(loaded.slots)
    if not (count <= asked and len(loaded.generations) == count and all(link.arena.has(slot) for slot in loaded.slots)):
        raise StoreGone("the kvstore loads what can't be")
