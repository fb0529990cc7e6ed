"""The disk tier (G3): blocks of KV as files below one directory, that outlive the processes and the box.

    disk_files      one block, one file: written whole, believed only if every byte is right
    disk_directory  the directory: taken by one box, proven, listed
    disk_index      what is there and what goes next
    disk_life       on, suspended with a reason, back again
    disk_scan       what former lives left
    disk_room       how much the disk has room for
    disk_writes, disk_reads, disk_uses, disk_removal     what is done with it
    disk_pool       the threads for all that

All of `DiskTier` is called on the event loop and calls back there; it does nothing there that may block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_box import wording
from dynamo_box.kv.store.disk_counts import DiskCounts, DiskEvents, Outbox
from dynamo_box.kv.store.disk_directory import FoundBlock, TierDirectory
from dynamo_box.kv.store.disk_files import PAGE, file_bytes, file_path
from dynamo_box.kv.store.disk_life import DiskLife, Pace
from dynamo_box.kv.store.disk_reads import MOST_WAITING, DiskReads, ReadResult, Wanted
from dynamo_box.kv.store.disk_removal import DiskRemoval
from dynamo_box.kv.store.disk_room import DiskRoom
from dynamo_box.kv.store.disk_scan import DiskScan
from dynamo_box.kv.store.disk_uses import DiskUses
from dynamo_box.kv.store.disk_writes import DiskWrites, Write
from dynamo_box.protocol.figures import TierFigures
from dynamo_box.protocol.kv import Block, KvLayout

TRIMMED_AT_ONCE = 64
DAMAGE_NOTED_EVERY_S = 60.0
GRACE_S = 1.0
"""For what is underway when the tier is closed."""

__all__ = ["DiskEvents", "DiskTier", "Pace", "ReadResult"]


class DiskTier:
    """`changed` hears what came to the disk and what left it; `note` gets (level, text) for the box's events.

    A capacity of 0 is a tier that is off. Names of layouts are `KvLayout.name`.
    """

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        *,
        threads: int,
        changed: Callable[[DiskEvents], None],
        note: Callable[[str, str], None],
        owner: str,
        write_queue_blocks: int,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._capacity = capacity_bytes
        self._note = note
        self._off = "" if capacity_bytes >= 2 * PAGE else "not asked for"
        if 0 < capacity_bytes < 2 * PAGE:
            self._off = f"{wording.size(capacity_bytes)} hold no block; raise the capacity or set it to 0"
        self._layouts: dict[str, KvLayout] = {}
        self._counts = DiskCounts()
        self._outbox = Outbox(changed, self._layouts)
        self._life = DiskLife(
            directory, owner, threads, self._pace, taken=self._taken, lost=self._lost, ticked=self._advance, note=note
        )
        self._writes = DiskWrites(
            self._life.io,
            threads,
            write_queue_blocks,
            capacity_bytes,
            self._counts,
            self._outbox,
            failed=self._failed,
            shrunk=lambda room: self._room.shrunk(room),
        )
        self._reads = DiskReads(self._life.io, threads, self._counts, bad=self._bad, failed=self._failed)
        self._uses = DiskUses(self._life.keeper, failed=self._failed)
        self._room = DiskRoom(self._life, self._writes, self._smallest, note)
        self._removal = DiskRemoval(
            self._life, self._writes, self._uses, self._outbox, failed=self._failed, cleared=self._begin_held_reads
        )
        self._held_reads: list[_HeldRead] = []
        self._scan: DiskScan | None = None
        self._indexed_in_s: float | None = None
        self._closing = False
        self._idle = asyncio.Event()
        self._next_damage_note = 0.0
        self._damage = ""
        self._unnoted_damage = 0

    # Life

    def start(self) -> None:
        """Take the directory and look at what is there, in the background."""
        if not self._off:
            self._life.start()

    def attach(self, layout: KvLayout) -> None:
        """Blocks of this layout may be asked for from now on; those of former lives turn up as they are indexed."""
        if layout.name in self._layouts:
            return
        self._layouts[layout.name] = layout
        shelf = self._writes.index.shelf(layout.name)
        if shelf.slots:
            self._outbox.stored(layout.name, list(shelf.slots))
        if self._scan is not None:
            self._scan.add(layout)

    async def close(self, flush_s: float) -> None:
        """Write what waits, for at most `flush_s`, and let go of the directory. What hangs is left behind, with the
        memory that it is at, and is never answered.
        """
        if self._off or self._closing:
            return
        self._closing = True
        await self._wait_idle(flush_s, lambda: not self._writes.queued)
        self._writes.drop_waiting("closing")
        self._life.io.end_jobs()
        if self._life.directory is not None:
            self._uses.write_down(self._life.directory, lambda: self._writes.index)
        await self._wait_idle(GRACE_S, lambda: not self._life.io.busy and not self._life.keeper.busy)
        if self._scan is not None:
            self._scan.stop()
        self._life.end()

    # What is there

    @property
    def indexing(self) -> int:
        """Layouts that are still being looked at."""
        return self._scan.left if self._scan is not None else 0

    @property
    def settled(self) -> bool:
        """Whether it is on, knows all that is there, and how much room the disk has."""
        return self._life.on and self._room.known

    @property
    def room(self) -> int:
        """Bytes that it may hold now: less than its capacity where the disk has less."""
        return self._writes.room

    @property
    def indexed_in_s(self) -> float | None:
        """How long it took to look at all that was there; None until then."""
        return self._indexed_in_s

    def has(self, layout_name: str, digest: bytes) -> bool:
        return self._writes.index.has(layout_name, digest)

    def priority_of(self, layout_name: str, digest: bytes) -> int | None:
        return self._writes.index.priority_of(layout_name, digest)

    def blocks(self, layout_name: str) -> int:
        return len(self._writes.index.shelf(layout_name).slots)

    def digests(self, layout_name: str) -> list[bytes]:
        """A copy of what is there now."""
        return list(self._writes.index.shelf(layout_name).slots)

    def figures(self) -> TierFigures:
        """Without lookups and hits: who looks is not known here."""
        state, reason = self._state()
        counts, writes = self._counts, self._writes
        return TierFigures(
            state=state,
            reason=reason,
            capacity_bytes=self._capacity,
            used_bytes=writes.used_bytes,
            blocks=len(writes.index),
            in_blocks=counts.in_blocks,
            in_bytes=counts.in_bytes,
            in_seconds=counts.writing.seconds,
            out_blocks=counts.out_blocks,
            out_bytes=counts.out_bytes,
            out_seconds=counts.reading.seconds,
            evicted=counts.evicted,
            failed=counts.failed,
            dropped=dict(counts.dropped),
            queued=writes.queued,
        )

    # What is done with it

    def write(self, layout_name: str, block: Block, data: memoryview, done: Callable[[bool], None]) -> str:
        """Why it isn't written, "" if it will be tried: then `data` must not change until `done`, which says whether it
        is there. A block that is there already is done at once, and counts as used.
        """
        layout = self._layouts[layout_name]
        if len(data) < layout.block_bytes:
            raise ValueError(f"data: {len(data)} bytes are no block of {layout.block_bytes}")
        reason = self._refusal()
        if not reason and self.has(layout_name, block.digest):
            self.raise_priority(layout_name, block.digest, block.priority)
            self.touch(layout_name, block.digest)
            asyncio.get_running_loop().call_soon(done, True)
            return ""
        reason = reason or self._writes.add(Write(layout, block, data, done))
        if reason:
            self._counts.dropped[reason] += 1
        else:
            self._advance()
        return reason

    def read(
        self, layout_name: str, wanted: Sequence[tuple[bytes, memoryview]], done: Callable[[ReadResult], None]
    ) -> bool:
        """Whether it will be tried: then `done` is called once, when nothing is written to the views any more. With a
        disk that hangs that may be late.
        """
        layout = self._layouts[layout_name]
        for _, into in wanted:
            if len(into) < layout.block_bytes:
                raise ValueError(f"wanted: {len(into)} bytes have no room for a block of {layout.block_bytes}")
        if self._life.directory is None or not wanted or self._reads.waiting + len(wanted) > MOST_WAITING:
            return False
        digests = [digest for digest, _ in wanted]
        self._writes.index.pin(layout_name, digests)

        def over(result: ReadResult) -> None:
            self._writes.index.unpin(layout_name, digests)
            for digest, good in zip(digests, result.good, strict=True):
                if good:
                    self.touch(layout_name, digest)
            done(result)

        read = _HeldRead(layout, wanted, over)
        if self._removal.clearing:
            self._held_reads.append(read)
        else:
            self._begin_read(self._life.directory, read)
        return True

    def pin(self, layout_name: str, digests: Iterable[bytes]) -> None:
        """Not to be evicted until as many `unpin`; what isn't there is pinned if it comes."""
        self._writes.index.pin(layout_name, digests)

    def unpin(self, layout_name: str, digests: Iterable[bytes]) -> None:
        self._writes.index.unpin(layout_name, digests)

    def touch(self, layout_name: str, digest: bytes) -> None:
        """It counts as used now, and after a restart too."""
        if self._writes.index.touch(layout_name, digest):
            self._uses.add(layout_name, digest)

    def raise_priority(self, layout_name: str, digest: bytes, priority: int | None) -> None:
        """To this one, if it counts for more than what the block has."""
        if self._writes.index.raise_priority(layout_name, digest, priority):
            self._uses.add(layout_name, digest)

    def clear(self) -> int:
        """Forget all blocks that aren't pinned; how many. Suspended, it is made up for when the tier is back."""
        if self._off:
            return 0
        forgotten = self._removal.begin_clear()
        self._advance()
        return forgotten

    # Details

    def _state(self) -> tuple[str, str]:
        if self._off:
            return "off", self._off
        if self._smallest() > self._capacity:
            return "off", f"its {wording.size(self._capacity)} hold no block of {wording.size(self._smallest())}"
        return ("on", self._room.shortage) if self._life.on else ("suspended", self._life.reason)

    def _smallest(self) -> int:
        """What a block takes at least."""
        return min((file_bytes(layout.block_bytes) for layout in self._layouts.values()), default=2 * PAGE)

    def _refusal(self) -> str:
        if self._off:
            return "off"
        if self._closing:
            return "closing"
        return "" if self._life.on else "suspended"

    def _paths(self, layout: str, digest: bytes) -> tuple[str, ...]:
        """Its file may just be renamed."""
        index = self._writes.index
        if not index.has(layout, digest):
            return ()
        path = index.path_of(layout, digest)
        if (layout, digest) not in self._uses.renaming:
            return (path,)
        return path, file_path(layout, digest, self._uses.renaming[layout, digest])

    def _advance(self) -> None:
        """Do what can be done now: called whenever something ended, came, or some time has passed."""
        self._idle.set()
        directory = self._life.directory
        if directory is None:
            return
        self._note_damage()
        if self._scan is None or self._scan.left:
            return
        if self._uses.due(time.monotonic(), self._pace.note_use):
            self._uses.write_down(directory, lambda: self._writes.index)
        if self._room.known:
            self._room.look_again(directory, self._pace.check)
            self._removal.delete(directory, [gone.path for gone in self._writes.trim(TRIMMED_AT_ONCE)])
        if self._removal.clearing:
            self._removal.go_on(directory)
        else:
            self._writes.send(directory)

    async def _wait_idle(self, timeout_s: float, reached: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not reached():
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return

    def _taken(self, directory: TierDirectory) -> None:
        self._scan = DiskScan(
            directory,
            self._life.keeper,
            list(self._layouts.values()),
            self._counts,
            found=self._found,
            removed=lambda names: self._removal.sweep(directory, names),
            finished=lambda: self._indexed(directory),
            failed=lambda error: self._failed(directory, error),
        )

    def _lost(self) -> None:
        if self._scan is not None:
            self._scan.stop()
            self._scan = None
        index = self._writes.index
        self._writes.index, self._writes.doomed_bytes = index.emptied(), 0
        self._writes.lose("suspended")
        self._uses.lose()
        self._room.lose()
        self._removal.lose()
        for name in self._layouts:
            self._outbox.removed(name, index.shelf(name).slots)
        held, self._held_reads = self._held_reads, []
        for read in held:
            read.over(ReadResult([False] * len(read.wanted), 0.0, self._life.reason))

    def _failed(self, directory: TierDirectory, error: Exception) -> None:
        if directory is self._life.directory:
            self._life.failed(error)

    # What former lives left

    def _found(self, layout: KvLayout, blocks: Sequence[FoundBlock]) -> None:
        index = self._writes.index
        new = [
            block.digest
            for block in blocks
            if index.add_old(layout.name, block.digest, block.priority, block.occupied, block.used_ns)
        ]
        self._outbox.stored(layout.name, new)

    def _indexed(self, directory: TierDirectory) -> None:
        if self._scan is not None and self._indexed_in_s is None:
            self._indexed_in_s = self._scan.took_s
        if not self._room.known:
            self._room.measure(directory)
        self._advance()

    # What is dropped

    def _bad(self, directory: TierDirectory, layout: KvLayout, blocks: Sequence[tuple[bytes, str]]) -> None:
        if directory is not self._life.directory:
            return
        self._counts.failed += len(blocks)
        gone: list[bytes] = []
        paths: list[str] = []
        for digest, what in blocks:
            paths += self._paths(layout.name, digest)
            if self._writes.index.remove(layout.name, digest) is not None:
                gone.append(digest)
                self._damage = self._damage or f"{layout.name}/{digest.hex()} {what}"
                self._unnoted_damage += 1
        self._outbox.removed(layout.name, gone)
        self._removal.delete(directory, paths)
        self._note_damage()

    def _note_damage(self) -> None:
        now = time.monotonic()
        if self._damage and now >= self._next_damage_note:
            self._next_damage_note = now + DAMAGE_NOTED_EVERY_S
            more = f", and {self._unnoted_damage - 1} more" if self._unnoted_damage > 1 else ""
            self._note("warning", f"a block of KV on disk can't be used and is dropped: {self._damage}{more}")
            self._damage, self._unnoted_damage = "", 0

    # Reading

    def _begin_held_reads(self, directory: TierDirectory) -> None:
        held, self._held_reads = self._held_reads, []
        for read in held:
            self._begin_read(directory, read)

    def _begin_read(self, directory: TierDirectory, read: _HeldRead) -> None:
        wanted = [Wanted(digest, into, self._paths(read.layout.name, digest)) for digest, into in read.wanted]
        self._reads.read(directory, read.layout, wanted, read.over)


@dataclass(frozen=True, slots=True)
class _HeldRead:
    """One that waits while the tier is being cleared."""

    layout: KvLayout
    wanted: Sequence[tuple[bytes, memoryview]]
    over: Callable[[ReadResult], None]
