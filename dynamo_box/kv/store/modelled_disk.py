"""The disk tier of a rehearsal: a disk that isn't there, with the capacity, the rates and the books of one that is.

Nothing is written anywhere, so it begins empty with each process. One operation goes after another, reading beside
writing, and each takes its bytes over the rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dynamo_box.kv.store.disk_counts import DiskCounts, DiskEvents, Outbox
from dynamo_box.kv.store.disk_files import PAGE, file_bytes
from dynamo_box.kv.store.disk_index import DiskIndex
from dynamo_box.kv.store.disk_port import ReadResult
from dynamo_box.kv.store.disk_reads import MOST_WAITING
from dynamo_box.kv.store.disk_reads import ReadResult as Read
from dynamo_box.protocol.figures import TierFigures
from dynamo_box.protocol.kv import Block, KvLayout
from dynamo_box.protocol.spec import TierRehearsal


class Queue:
    """One direction of the disk: what it is asked for is done after what it was asked for before."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._loop = asyncio.get_running_loop()
        self._free_at = 0.0
        self._ends: set[asyncio.TimerHandle] = set()

    def add(self, size: int, done: Callable[[float], None]) -> None:
        """`done` hears how long it took, waiting included."""
        asked_at = self._loop.time()
        self._free_at = max(self._free_at, asked_at) + size / self._bytes_per_s

        def over() -> None:
            self._ends.discard(end)
            done(self._loop.time() - asked_at)

        end = self._loop.call_at(self._free_at, over)
        self._ends.add(end)

    def close(self) -> None:
        """Nobody hears of what isn't done."""
        for end in self._ends:
            end.cancel()
        self._ends.clear()


@dataclass(frozen=True, slots=True)
class _Write:
    layout: KvLayout
    block: Block
    done: Callable[[bool], None]

    @property
    def key(self) -> tuple[str, bytes]:
        return self.layout.name, self.block.digest

    @property
    def size(self) -> int:
        return file_bytes(self.layout.block_bytes)


class ModelledDisk:
    """A `DiskPort`. `changed` hears what came and what left; at most `write_queue_blocks` wait."""

    def __init__(
        self,
        capacity_bytes: int,
        rates: TierRehearsal,
        *,
        changed: Callable[[DiskEvents], None],
        write_queue_blocks: int,
    ) -> None:
        self._capacity = capacity_bytes
        self._most_queued = write_queue_blocks
        self._layouts: dict[str, KvLayout] = {}
        self._index = DiskIndex()
        self._counts = DiskCounts()
        self._outbox = Outbox(changed, self._layouts)
        self._writing: dict[tuple[str, bytes], _Write] = {}
        self._reserved = 0
        self._reading = 0
        self._reads, self._writes = Queue(rates.disk_read_bytes_per_s), Queue(rates.disk_write_bytes_per_s)
        self._closing = False

    settled = True
    indexing = 0
    indexed_in_s: float | None = None

    def start(self) -> None:
        """There is nothing to take."""

    def attach(self, layout: KvLayout) -> None:
        self._layouts[layout.name] = layout

    async def close(self, flush_s: float) -> None:
        """What waits is lost with all else."""
        self._closing = True
        self._reads.close()
        self._writes.close()

    # What is there

    def has(self, layout_name: str, digest: bytes) -> bool:
        return self._index.has(layout_name, digest)

    def priority_of(self, layout_name: str, digest: bytes) -> int | None:
        return self._index.priority_of(layout_name, digest)

    def blocks(self, layout_name: str) -> int:
        return len(self._index.shelf(layout_name).slots)

    def digests(self, layout_name: str) -> Sequence[bytes]:
        return list(self._index.shelf(layout_name).slots)

    def figures(self) -> TierFigures:
        counts = self._counts
        smallest = min((file_bytes(layout.block_bytes) for layout in self._layouts.values()), default=2 * PAGE)
        fits = smallest <= self._capacity
        return TierFigures(
            state="on" if fits else "off",
            reason="" if fits else f"its {self._capacity} bytes hold no block of {smallest}",
            capacity_bytes=self._capacity,
            used_bytes=self._index.used_bytes + self._reserved,
            blocks=len(self._index),
            in_blocks=counts.in_blocks,
            in_bytes=counts.in_bytes,
            in_seconds=counts.writing.seconds,
            out_blocks=counts.out_blocks,
            out_bytes=counts.out_bytes,
            out_seconds=counts.reading.seconds,
            evicted=counts.evicted,
            dropped=dict(counts.dropped),
            queued=len(self._writing),
        )

    # What is done with it

    def write(self, layout_name: str, block: Block, data: memoryview, done: Callable[[bool], None]) -> str:
        write = _Write(self._layouts[layout_name], block, done)
        if self.has(*write.key):
            self.raise_priority(layout_name, block.digest, block.priority)
            self.touch(layout_name, block.digest)
            asyncio.get_running_loop().call_soon(done, True)
            return ""
        reason = self._refusal(write)
        if reason:
            self._counts.dropped[reason] += 1
            return reason
        self._writing[write.key] = write
        self._reserved += write.size
        self._counts.writing.begin()
        self._writes.add(write.size, lambda _: self._written(write))
        return ""

    def read(
        self, layout_name: str, wanted: Sequence[tuple[bytes, memoryview]], done: Callable[[ReadResult], None]
    ) -> bool:
        if not wanted or self._closing or self._reading + len(wanted) > MOST_WAITING:
            return False
        digests = [digest for digest, _ in wanted]
        good = [self.has(layout_name, digest) for digest in digests]
        self.pin(layout_name, digests)
        self._reading += len(digests)
        self._counts.reading.begin()
        block_bytes = self._layouts[layout_name].block_bytes

        def over(took_s: float) -> None:
            self._counts.reading.end()
            self._reading -= len(digests)
            self.unpin(layout_name, digests)
            for digest, there in zip(digests, good, strict=True):
                if there:
                    self.touch(layout_name, digest)
            self._counts.out_blocks += sum(good)
            self._counts.out_bytes += sum(good) * block_bytes
            done(Read(good, took_s, "" if all(good) else "is gone"))

        self._reads.add(sum(good) * file_bytes(block_bytes), over)
        return True

    def pin(self, layout_name: str, digests: Iterable[bytes]) -> None:
        self._index.pin(layout_name, digests)

    def unpin(self, layout_name: str, digests: Iterable[bytes]) -> None:
        self._index.unpin(layout_name, digests)

    def touch(self, layout_name: str, digest: bytes) -> None:
        self._index.touch(layout_name, digest)

    def raise_priority(self, layout_name: str, digest: bytes, priority: int | None) -> None:
        self._index.raise_priority(layout_name, digest, priority)

    def clear(self) -> int:
        before, self._index = self._index, self._index.kept_by_clear()
        for name, shelf in before.shelves.items():
            kept = self._index.shelf(name).slots
            self._outbox.removed(name, [digest for digest in shelf.slots if digest not in kept])
        return len(before) - len(self._index)

    # Details

    def _refusal(self, write: _Write) -> str:
        """Why it isn't taken; "" if there is room for it now."""
        if self._closing:
            return "closing"
        if write.key in self._writing:
            return "busy"
        if len(self._writing) >= self._most_queued:
            return "queue_full"
        if write.size > self._capacity:
            return "capacity"
        while self._index.used_bytes + self._reserved + write.size > self._capacity:
            gone = self._index.evict()
            if gone is None:
                return "capacity"
            self._counts.evicted += 1
            self._outbox.removed(gone.layout, (gone.digest,))
        return ""

    def _written(self, write: _Write) -> None:
        del self._writing[write.key]
        self._reserved -= write.size
        self._counts.writing.end()
        self._counts.in_blocks += 1
        self._counts.in_bytes += write.layout.block_bytes
        self._index.add(*write.key, write.block.priority, write.size)
        self._outbox.stored(write.layout.name, (write.block.digest,))
        write.done(True)
