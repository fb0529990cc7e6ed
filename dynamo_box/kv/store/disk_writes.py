"""Writing blocks to disk: what waits, what goes together, what is evicted for it, and what a full disk means.

Blocks are written in jobs of up to BATCH, several jobs at a time, one thread fewer than there are, so that reading
never waits for a thread. A block's victims are evicted when its job is made, and the first of them is written over.

A disk that is full although the tier isn't (others use it too) shrinks the tier: it evicts, and holds itself to what it
has then. If that doesn't help a few times in a row, the disk is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_box.kv.store.disk_counts import DiskCounts, Outbox
from dynamo_box.kv.store.disk_directory import TierDirectory
from dynamo_box.kv.store.disk_files import BlockId, file_bytes, write_block
from dynamo_box.kv.store.disk_index import DiskIndex, Gone
from dynamo_box.kv.store.disk_life import FULL
from dynamo_box.kv.store.disk_pool import Job, Pool
from dynamo_box.protocol.kv import Block, KvLayout

BATCH = 16
IN_FLIGHT = 4
FULL_IN_A_ROW = 3


@dataclass(eq=False, slots=True)
class Write:
    """`data` is read until `done` is called."""

    layout: KvLayout
    block: Block
    data: memoryview
    done: Callable[[bool], None]
    victims: list[Gone] = field(default_factory=list)

    @property
    def size(self) -> int:
        return file_bytes(self.layout.block_bytes)

    @property
    def key(self) -> tuple[str, bytes]:
        return self.layout.name, self.block.digest


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the first of a batch occupy, as far as it got; `error` says why it stopped there, unless it was told to."""

    occupied: list[int]
    error: OSError | None


class DiskWrites:
    """`room` is how much the tier may hold now: its capacity, or less where the disk has less, of which `shrunk` tells.
    `failed` is for what the tier can't go on with.
    """

    def __init__(
        self,
        pool: Pool,
        threads: int,
        limit: int,
        capacity: int,
        counts: DiskCounts,
        outbox: Outbox,
        *,
        failed: Callable[[TierDirectory, Exception], None],
        shrunk: Callable[[int], None],
    ) -> None:
        self.index = DiskIndex()
        self.capacity = self.room = capacity
        self._pool = pool
        self._limit = limit
        self._most_jobs = max(1, min(IN_FLIGHT, threads - 1))
        self._counts = counts
        self._outbox = outbox
        self._failed = failed
        self._shrunk = shrunk
        self._directory: TierDirectory | None = None
        self._waiting: deque[Write] = deque()
        self._keys: set[tuple[str, bytes]] = set()
        self._reserved = 0
        self.doomed_bytes = 0
        """Of files that are in no index any more and have yet to be deleted."""
        self.jobs = 0
        self._shrinks = self._full_in_a_row = 0

    @property
    def used_bytes(self) -> int:
        return self.index.used_bytes + self.doomed_bytes + self._reserved

    @property
    def queued(self) -> int:
        """Blocks that wait or are being written."""
        return len(self._keys)

    def add(self, write: Write) -> str:
        """Why it isn't taken, "" if it is."""
        if write.key in self._keys:
            return "busy"
        if len(self._waiting) >= self._limit:
            return "queue_full"
        if write.size > self.room:
            return "capacity"
        self._keys.add(write.key)
        self._waiting.append(write)
        return ""

    def send(self, directory: TierDirectory) -> None:
        """Give the pool what may be written now."""
        self._directory = directory
        while self._waiting and self.jobs < self._most_jobs:
            batch: list[Write] = []
            while self._waiting and len(batch) < BATCH:
                write = self._waiting.popleft()
                if self.index.has(*write.key):
                    self._end(write, True)
                elif self._make_room(write):
                    batch.append(write)
                else:
                    self._drop(write, "capacity")
            if batch:
                self._submit(directory, batch)

    def lose(self, reason: str) -> None:
        """The directory is no longer the tier's: what is underway counts for nothing."""
        self._directory = None
        self.drop_waiting(reason)

    def drop_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for write in waiting:
            self._drop(write, reason)

    def trim(self, most: int) -> list[Gone]:
        """Evict what is too much, some of it; its files are the caller's to delete."""
        victims: list[Gone] = []
        while self.index.used_bytes + self._reserved > self.room and len(victims) < most:
            gone = self.index.evict()
            if gone is None:
                break
            victims.append(gone)
        self._tell_evicted(victims)
        return victims

    def _make_room(self, write: Write) -> bool:
        while self.used_bytes + write.size > self.room:
            gone = self.index.evict()
            if gone is None:
                self._tell_evicted(write.victims)
                return False
            write.victims.append(gone)
        self._reserved += write.size
        self._tell_evicted(write.victims)
        return True

    def _tell_evicted(self, victims: Sequence[Gone]) -> None:
        self._counts.evicted += len(victims)
        for gone in victims:
            self._outbox.removed(gone.layout, (gone.digest,))

    def _submit(self, directory: TierDirectory, batch: list[Write]) -> None:
        self.jobs += 1
        self._counts.writing.begin()
        shrinks = self._shrinks

        def written(outcome: Outcome) -> None:
            self._over(directory, batch, outcome)
            error = outcome.error
            if error is None:
                self._full_in_a_row *= shrinks != self._shrinks
            elif error.errno not in FULL or not self._shrink(batch[len(outcome.occupied)].size, shrinks):
                self._failed(directory, error)

        def failed(error: Exception) -> None:
            self._over(directory, batch, Outcome([], None))
            self._failed(directory, error)

        self._pool.submit(lambda job: _write_batch(job, directory, batch), written, failed)

    def _over(self, directory: TierDirectory, batch: Sequence[Write], outcome: Outcome) -> None:
        self.jobs -= 1
        self._counts.writing.end()
        self._reserved -= sum(write.size for write in batch)
        count = len(outcome.occupied) if directory is self._directory else 0
        stored: dict[str, list[bytes]] = {}
        for write, occupied in zip(batch[:count], outcome.occupied, strict=False):
            self._counts.in_blocks += 1
            self._counts.in_bytes += write.layout.block_bytes
            if not self.index.has(*write.key):
                self.index.add(*write.key, write.block.priority, occupied)
                stored.setdefault(write.layout.name, []).append(write.block.digest)
        for layout, digests in stored.items():
            self._outbox.stored(layout, digests)
        for write in batch[:count]:
            self._end(write, True)
        full = outcome.error is not None and outcome.error.errno in FULL
        for write in batch[count:]:
            self._drop(write, "disk_full" if full else "failed")

    def _shrink(self, size: int, shrinks: int) -> bool:
        """Whether it can go on in less room: what it has, less a block, so that whatever it writes goes over a file of
        its own. What was begun before the last time says nothing new.
        """
        if shrinks != self._shrinks:
            return True
        self._shrinks += 1
        self._full_in_a_row += 1
        used = self.index.used_bytes
        if self._full_in_a_row > FULL_IN_A_ROW or used < size:
            return False
        self.room = max(size, used - size)
        self._shrunk(self.room)
        return True

    def _drop(self, write: Write, reason: str) -> None:
        self._counts.dropped[reason] += 1
        self._end(write, False)

    def _end(self, write: Write, written: bool) -> None:
        self._keys.discard(write.key)
        write.done(written)


def _write_batch(job: Job, directory: TierDirectory, batch: Sequence[Write]) -> Outcome:
    occupied: list[int] = []
    error: OSError | None = None
    for write in batch:
        job.alive()
        victims = [gone.path for gone in write.victims]
        if error is not None or job.stopping:
            directory.remove(victims)
            continue
        try:
            directory.remove(victims[1:])
            occupied.append(
                write_block(
                    directory.root,
                    BlockId(write.layout.name, write.block.digest, write.layout.block_bytes, write.block.parent),
                    write.block.priority,
                    write.data,
                    direct=directory.direct,
                    recycle=victims[0] if victims else "",
                )
            )
        except OSError as failure:
            if isinstance(failure, FileNotFoundError):
                directory.check()
            error = failure
    return Outcome(occupied, error)
