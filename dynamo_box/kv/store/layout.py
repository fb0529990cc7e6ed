"""One KV layout in the tiers: its table, its arena, and its blocks on disk, as its workers ask for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from dynamo_box.kv.store.arena import STEP_BYTES, Arena
from dynamo_box.kv.store.counts import Counts
from dynamo_box.kv.store.disk_port import DiskPort, ReadResult
from dynamo_box.kv.store.holds import Holds
from dynamo_box.kv.store.slots import HostTier, Lease
from dynamo_box.kv.store.write_back import Line, WriteBack
from dynamo_box.log import get_logger
from dynamo_box.protocol import kv
from dynamo_box.protocol.kv import Block, KvLayout

STORE = 0
"""The owner of slots that are filled from disk, and of leases by which blocks are held; connections count from 1."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk tier, where there is one."""

    port: DiskPort
    write_back: WriteBack


@dataclass(eq=False, slots=True)
class _Read:
    """Blocks on their way from disk; `takers` are the leases that they go to, and their places there."""

    finished: asyncio.Future[ReadResult]
    takers: list[tuple[Lease, int]] = field(default_factory=list)


class LayoutStore:
    """`changed` gets what can be found in the host tier from now on (True), and what no longer can."""

    def __init__(
        self,
        layout: KvLayout,
        arena: Arena,
        disk: Disk | None,
        counts: Counts,
        executor: Executor,
        note: Callable[[str, str], None],
        changed: Callable[[Sequence[tuple[bool, bytes]]], None],
    ) -> None:
        self.layout = layout
        self.name = layout.name
        self.arena = arena
        self.tier = HostTier(arena)
        self.holds = Holds(self.name, self._give_back)
        self.owners: dict[int, str] = {}
        """Who is attached, by connection."""
        self.left_at = time.monotonic()
        """When the last of them went."""
        self._disk = disk
        self._counts = counts
        self._executor = executor
        self._note = note
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._growing: asyncio.Task[None] | None = None
        self._reads: dict[bytes, _Read] = {}
        if disk is not None:
            disk.write_back.open(Line(self.name, self.tier, arena.slot))

    @property
    def busy(self) -> bool:
        """Whether somebody works with its memory."""
        return bool(
            self.owners
            or self._reads
            or self._growing
            or self.tier.pinned_slots
            or self.tier.writing
            or self.tier.leases
        )

    def close(self) -> None:
        if self._growing is not None:
            self._growing.cancel()
        self.holds.close()
        if self._disk is not None:
            self._disk.write_back.close(self.name)
        self.arena.close()

    # Memory

    def must_grow(self, blocks: int) -> bool:
        """Whether waiting for memory makes room for more of so many blocks."""
        return self.tier.free < blocks and self.arena.may_grow

    async def make_room(self, blocks: int) -> None:
        """Wait until so many slots are free, or there is no more memory to be had for them."""
        while self.must_grow(blocks):
            await asyncio.shield(self._grow())

    def _grow(self) -> asyncio.Task[None]:
        if self._growing is None:
            self._growing = self._loop.create_task(self._take_step())
        return self._growing

    async def _take_step(self) -> None:
        try:
            self.tier.grow(await self._loop.run_in_executor(self._executor, self.arena.grow))
        finally:
            self._growing = None
        if self.arena.shortage:
            log.warning("the host tier is smaller than asked for", layout=self.name, reason=self.arena.shortage)
            self._note("warning", f"the host tier for KV is smaller than asked for: {self.arena.shortage}")

    def _grow_ahead(self) -> None:
        """A step before it is needed: the workers map it meanwhile."""
        if self.must_grow(STEP_BYTES // self.arena.slot_bytes):
            self._grow()

    # Storing

    def reserve(self, owner: int, message: kv.Reserve) -> kv.Reserved:
        slots = self.tier.reserve(owner, message.blocks, time.monotonic(), self._use_on_disk)
        for block, slot in zip(message.blocks, slots, strict=True):
            if slot == kv.KNOWN:
                self._used_again(block)
        full = slots.count(kv.FULL)
        if full:
            self._counts.host_dropped["store_full"] += full
        self._write_back()
        self._grow_ahead()
        self._publish()
        return kv.Reserved(message.id, tuple(slots))

    def commit(self, owner: int, message: kv.Commit) -> kv.Committed:
        filled = [self.tier.writing_of(owner, slot) for slot in message.slots]
        generations = self.tier.commit(owner, message.slots)
        lost = tuple(slot for slot, generation in zip(message.slots, generations, strict=True) if not generation)
        since = [writing.since for writing in filled if writing is not None]
        if since:
            self._counts.host_in_s += time.monotonic() - min(since)
            self._count_in(len(generations) - len(lost))
        for slot, generation in zip(message.slots, generations, strict=True):
            if generation:
                self._consider(slot)
        self._write_back()
        self._publish()
        return kv.Committed(message.id, tuple(generations), lost)

    def abandon(self, owner: int, slots: Sequence[int]) -> None:
        self._counts.host_dropped["abandoned"] += self.tier.abandon(owner, slots)

    # Finding

    def find(self, owner: int, message: kv.Find) -> kv.Found:
        lease = self._lease(owner, message.digests)
        if message.claim:
            self.holds.end(message.claim)
        on_disk = len(lease.on_disk) if lease is not None else 0
        in_host = len(lease.digests) - on_disk if lease is not None else 0
        self._counts.host_lookups += len(message.digests)
        self._counts.host_hits += in_host
        if self._disk is not None:
            self._counts.disk_lookups += len(message.digests) - in_host
            self._counts.disk_hits += on_disk
        if lease is None:
            return kv.Found(message.id, 0, "")
        generations: list[int] = []
        priorities: list[int | None] = []
        for digest, slot in zip(lease.digests, lease.slots, strict=True):
            if slot >= 0:
                generations.append(self.tier.generation_of(slot))
                priorities.append(self.tier.priority_of(slot))
                self._consider(slot)
            else:
                generations.append(0)
                priorities.append(self._priority_on_disk(digest))
        self._write_back()
        tiers = "".join("2" if slot >= 0 else "3" for slot in lease.slots)
        return kv.Found(message.id, lease.id, tiers, tuple(lease.slots), tuple(generations), tuple(priorities))

    def hold(self, message: kv.Hold) -> kv.Held:
        """Keep all of these blocks for whoever claims them."""
        error = self.holds.why_not(message.key)
        if error:
            return kv.Held(message.id, error)
        lease = self._lease(STORE, message.digests)
        there = len(lease.digests) if lease is not None else 0
        if lease is None or there < len(message.digests):
            if lease is not None:
                self._give_back(lease)
            return kv.Held(message.id, f"{there} of {len(message.digests)} blocks are there")
        self.holds.add(message.key, lease, message.ttl_s)
        return kv.Held(message.id)

    def _lease(self, owner: int, digests: Sequence[bytes]) -> Lease | None:
        lease = self.tier.find(owner, digests, time.monotonic(), self._use_on_disk)
        if lease is not None and self._disk is not None and lease.on_disk:
            self._disk.port.pin(self.name, lease.on_disk)
        return lease

    def _give_back(self, lease: Lease) -> None:
        self.tier.release(lease)
        self._unpin(lease)

    async def load(self, owner: int, message: kv.Load) -> kv.Loaded:
        await self.make_room(message.count)
        lease = self.tier.lease_of(owner, message.lease)
        if lease is None:
            return kv.Loaded(message.id, (), (), 0.0, "the lease is over")
        places = range(message.start, message.start + message.count)
        error, reads = self._begin_reads(lease, places)
        results = [await asyncio.shield(read.finished) for read in reads]
        took_s = max((result.took_s for result in results), default=0.0)
        lease.disk_s += took_s
        if self.tier.lease_of(owner, message.lease) is not lease:
            return kv.Loaded(message.id, (), (), took_s, "the lease is over")
        slots: list[int] = []
        for place in places:
            slot = lease.slots[place]
            if slot < 0 or self.tier.slot_of(lease.digests[place]) != slot:
                error = next((result.error for result in results if result.error), error or "a block is gone")
                break
            slots.append(slot)
        else:
            error = ""
        return kv.Loaded(
            message.id, tuple(slots), tuple(self.tier.generation_of(slot) for slot in slots), took_s, error
        )

    def release(self, owner: int, message: kv.Release) -> bool:
        """Whether there was such a lease."""
        lease = self.tier.lease_of(owner, message.lease)
        if lease is None:
            return False
        self._give_back(lease)
        loaded = sum(message.loaded.values())
        if loaded:
            self._counts.host_out_blocks += loaded
            self._counts.host_out_bytes += loaded * self.layout.block_bytes
            self._counts.host_out_s += max(0.0, time.monotonic() - lease.since - lease.disk_s)
        self._counts.host_failed += message.failed.get("g2", 0)
        return True

    def distrust(self, slots: Sequence[int]) -> None:
        forgotten = self.tier.forget(slots)
        if forgotten:
            log.warning("slots held something else than what was found", layout=self.name, slots=forgotten)
        self._publish()

    def end(self, owner: int, *, may_still_write: bool) -> list[int]:
        """The connection is gone. Slots that it may still write to are handed back by the caller, with `abandon`."""
        leases = self.tier.end_leases(owner)
        for lease in leases:
            self._unpin(lease)
        self._counts.reclaimed += len(leases)
        slots = self.tier.slots_written_by(owner)
        if not may_still_write:
            self._counts.host_dropped["writer_gone"] += self.tier.abandon(owner, slots)
            slots = []
        self.owners.pop(owner, None)
        self.left_at = time.monotonic()
        return slots

    def clear(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """See `HostTier.clear`."""
        cleared = self.tier.clear(digests)
        self._publish()
        return cleared

    # Disk

    def _begin_reads(self, lease: Lease, places: Sequence[int]) -> tuple[str, list[_Read]]:
        """Get what is missing at these places of the lease on its way; why not all of it, and what to wait for."""
        if self._disk is None:
            return "there is no disk tier", []
        mine = _Read(self._loop.create_future())
        wanted: list[tuple[bytes, memoryview]] = []
        reads: list[_Read] = []
        error = ""
        for place in places:
            digest = lease.digests[place]
            held = self.tier.slot_of(digest)
            if lease.slots[place] >= 0:
                continue
            if held >= 0:
                self.tier.add_to_lease(lease, place, held)
                continue
            read = self._reads.get(digest)
            if read is None:
                slot, error = self._take_slot(lease, place)
                if error:
                    break
                wanted.append((digest, self.arena.slot(slot)))
                read = self._reads[digest] = mine
            read.takers.append((lease, place))
            if read not in reads:
                reads.append(read)
        self._publish()
        if wanted and not self._disk.port.read(
            self.name, wanted, lambda result: self._end_read(mine, [digest for digest, _ in wanted], result)
        ):
            self._end_read(mine, [digest for digest, _ in wanted], _NotRead([False] * len(wanted)))
        return error, reads

    def _take_slot(self, lease: Lease, place: int) -> tuple[int, str]:
        digest = lease.digests[place]
        if self.tier.slot_being_written(digest) >= 0:
            return -1, "another worker is just storing a block of it"
        parent = lease.digests[place - 1] if place else b""
        slot = self.tier.take(STORE, Block(digest, parent, self._priority_on_disk(digest)), time.monotonic())
        return slot, "no slot of the host tier can be freed" if slot < 0 else ""

    def _end_read(self, read: _Read, digests: Sequence[bytes], result: ReadResult) -> None:
        for digest, good in zip(digests, result.good, strict=True):
            del self._reads[digest]
            slot = self.tier.slot_being_written(digest)
            if good:
                self.tier.commit(STORE, [slot])
            else:
                self.tier.abandon(STORE, [slot])
        for lease, place in read.takers:
            slot = self.tier.slot_of(lease.digests[place])
            if slot >= 0 and self.tier.lease_of(lease.owner, lease.id) is lease and lease.slots[place] < 0:
                self.tier.add_to_lease(lease, place, slot)
        read.finished.set_result(result)
        self._publish()

    def _use_on_disk(self, digest: bytes) -> bool:
        if self._disk is None or not self._disk.port.has(self.name, digest):
            return False
        self._disk.port.touch(self.name, digest)
        return True

    def _used_again(self, block: Block) -> None:
        """A block that is there was offered."""
        self._consider(self.tier.slot_of(block.digest))
        if self._disk is not None and block.priority is not None:
            self._disk.port.raise_priority(self.name, block.digest, block.priority)

    def _priority_on_disk(self, digest: bytes) -> int | None:
        return self._disk.port.priority_of(self.name, digest) if self._disk is not None else None

    def _consider(self, slot: int) -> None:
        if self._disk is not None and slot >= 0:
            self._disk.write_back.consider(self.name, slot)

    def _write_back(self) -> None:
        if self._disk is not None:
            self._disk.write_back.pump()

    def _unpin(self, lease: Lease) -> None:
        if self._disk is not None and lease.on_disk:
            self._disk.port.unpin(self.name, lease.on_disk)

    # Details

    def _count_in(self, blocks: int) -> None:
        self._counts.host_in_blocks += blocks
        self._counts.host_in_bytes += blocks * self.layout.block_bytes

    def _publish(self) -> None:
        changes = self.tier.take_changes()
        if changes:
            self._changed(changes)


@dataclass(frozen=True, slots=True)
class _NotRead:
    """The disk tier didn't try."""

    good: list[bool]
    took_s: float = 0.0
    error: str = "the disk tier takes no reads now"
