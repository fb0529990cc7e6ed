"""The host tier of one KV layout, as a table: what is in which slot, who writes, who leases, what goes next. Pure.

    free → writing → held → free                   reserve, commit, evict
           writing → free                          abandon, the end of its owner
                     held → doomed → free          forgotten while somebody still copies out of it

Eviction takes the lowest priority first, then what was used least recently (`order.py`). What is leased is not in that
order. What is being written to disk stays in it; eviction that meets it parks it outside, and it comes back to the
front of its level once it is written, if it wasn't used meanwhile.

A block is of use only while all before it in its chain are there. So a chain that is used comes into the order from its
end: its first block is evicted last. And while slots are sought for more of a chain, what is there of it is kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_box.kv.store.order import EvictionOrder
from dynamo_box.protocol.kv import BUSY, DIGEST_BYTES, FULL, HIGHEST_PRIORITY, KNOWN, UNSET_PRIORITY_COUNTS_AS, Block

MAX_ANCESTORS = 512
"""Blocks before those of a batch that count as used with them."""

_FREE, _WRITING, _HELD, _DOOMED = range(4)
_UNSET = 255
_MOST_HITS = 255
_NO_PARENT = bytes(DIGEST_BYTES)


class Headers(Protocol):
    """Where slots say what is in them."""

    def write(self, slot: int, generation: int, block: Block) -> None: ...

    def wipe(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Writing:
    """A slot that somebody fills. `since` is by the caller's clock."""

    owner: int
    block: Block
    since: float


@dataclass(slots=True)
class Lease:
    """What was found, in chain order; -1 in `slots` for what is on disk only. `disk_s` is how long the disk read for
    it; `since` is by the caller's clock.
    """

    id: int
    owner: int
    digests: tuple[bytes, ...]
    slots: array[int]
    on_disk: tuple[bytes, ...]
    since: float
    disk_s: float = 0.0


class HostTier:
    """`changes` gathers what became findable (True) and what no longer is (False), in order, until it is taken."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers
        self._order = EvictionOrder(HIGHEST_PRIORITY + 1)
        self._free = array("i")
        self._state = bytearray()
        self._digest: list[bytes] = []
        self._parent = bytearray()
        self._priority = bytearray()
        self._hits = bytearray()
        self._generation = array("Q")
        self._leased = array("I")
        self._pins = array("H")
        self._slot_of: dict[bytes, int] = {}
        self._writing: dict[int, Writing] = {}
        self._written: dict[bytes, int] = {}
        """The slots of `_writing` by digest."""
        self._leases: dict[int, Lease] = {}
        self._last_generation = self._last_lease = 0
        self._changes: list[tuple[bool, bytes]] = []
        self.evicted = 0
        self.leased_slots = 0
        self.pinned_slots = 0

    def grow(self, slots: int) -> None:
        """`slots` more may be given out."""
        first = len(self._state)
        self._order.grow(slots)
        self._free.extend(range(first + slots - 1, first - 1, -1))
        self._state.extend(bytes(slots))
        self._digest.extend([b""] * slots)
        self._parent.extend(bytes(DIGEST_BYTES * slots))
        self._priority.extend(bytes(slots))
        self._hits.extend(bytes(slots))
        for numbers in (self._generation, self._leased, self._pins):
            numbers.extend([0] * slots)

    # What is there

    @property
    def slots(self) -> int:
        return len(self._state)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks that can be found."""
        return len(self._slot_of)

    @property
    def writing(self) -> int:
        return len(self._writing)

    @property
    def leases(self) -> int:
        return len(self._leases)

    def digests(self) -> list[bytes]:
        """A copy of what can be found now."""
        return list(self._slot_of)

    def digests_in(self, slots: range) -> list[bytes]:
        """Those of them that can be found now."""
        return [digest for digest in self._digest[slots.start : slots.stop] if digest]

    def slot_of(self, digest: bytes) -> int:
        """-1 if it can't be found."""
        return self._slot_of.get(digest, -1)

    def slot_being_written(self, digest: bytes) -> int:
        """-1 if nobody writes it."""
        return self._written.get(digest, -1)

    def generation_of(self, slot: int) -> int:
        return self._generation[slot]

    def digest_in(self, slot: int) -> bytes:
        """b"" if nothing can be found there."""
        return self._digest[slot]

    def block_in(self, slot: int) -> Block:
        parent = bytes(self._parent[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES])
        return Block(self._digest[slot], b"" if parent == _NO_PARENT else parent, self.priority_of(slot))

    def priority_of(self, slot: int) -> int | None:
        priority = self._priority[slot]
        return None if priority == _UNSET else priority

    def hits(self, slot: int) -> int:
        """How often the block in it was found, or offered again; it stops counting at 255."""
        return self._hits[slot]

    def take_changes(self) -> list[tuple[bool, bytes]]:
        changes, self._changes = self._changes, []
        return changes

    # Writing

    def reserve(self, owner: int, blocks: Sequence[Block], now: float, on_disk: Callable[[bytes], bool]) -> list[int]:
        """For each block, in chain order: a slot to fill, or KNOWN, BUSY, FULL as in `protocol.kv`."""
        answers: list[int] = []
        chain = self._ancestors(blocks[0].parent) if blocks else []
        chain.reverse()
        for block in blocks:
            slot = self._slot_of.get(block.digest, -1)
            if slot >= 0:
                self._hit(slot)
                self._raise_priority(slot, block.priority)
                chain.append(slot)
        for slot in chain:
            self._order.discard(slot)
        for block in blocks:
            if block.digest in self._slot_of:
                answers.append(KNOWN)
            elif block.digest in self._written:
                answers.append(BUSY)
            elif on_disk(block.digest):
                answers.append(KNOWN)
            else:
                answers.append(self.take(owner, block, now))
        self._used(reversed(chain))
        return answers

    def take(self, owner: int, block: Block, now: float) -> int:
        """A slot for a block that is neither held nor being written, or FULL."""
        slot = self._free.pop() if self._free else self._evict()
        if slot < 0:
            return FULL
        self._state[slot] = _WRITING
        self._writing[slot] = Writing(owner, block, now)
        self._written[block.digest] = slot
        return slot

    def writing_of(self, owner: int, slot: int) -> Writing | None:
        """None: it isn't this owner's to commit."""
        writing = self._writing.get(slot)
        return writing if writing is not None and writing.owner == owner else None

    def slots_written_by(self, owner: int) -> list[int]:
        return [slot for slot, writing in self._writing.items() if writing.owner == owner]

    def commit(self, owner: int, slots: Sequence[int]) -> list[int]:
        """What is in `slots` can be found from now on; a generation for each, 0 where it wasn't the owner's."""
        generations: list[int] = []
        committed: list[int] = []
        for slot in slots:
            writing = self.writing_of(owner, slot)
            if writing is None:
                generations.append(0)
                continue
            block = writing.block
            del self._writing[slot], self._written[block.digest]
            self._last_generation += 1
            self._generation[slot] = self._last_generation
            self._digest[slot] = block.digest
            self._parent[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES] = block.parent or _NO_PARENT
            self._priority[slot] = _UNSET if block.priority is None else block.priority
            self._hits[slot] = 0
            self._state[slot] = _HELD
            self._headers.write(slot, self._last_generation, block)
            self._slot_of[block.digest] = slot
            self._changes.append((True, block.digest))
            generations.append(self._last_generation)
            committed.append(slot)
        if committed:
            self._used(reversed(committed))
            self._used(self._ancestors(self.block_in(committed[0]).parent))
        return generations

    def abandon(self, owner: int, slots: Iterable[int]) -> int:
        """How many of them were the owner's, and are free again."""
        abandoned = 0
        for slot in slots:
            writing = self.writing_of(owner, slot)
            if writing is not None:
                del self._writing[slot], self._written[writing.block.digest]
                self._set_free(slot)
                abandoned += 1
        return abandoned

    # Finding

    def find(self, owner: int, digests: Sequence[bytes], now: float, on_disk: Callable[[bytes], bool]) -> Lease | None:
        """A lease on the blocks that are there, from the first one on without a break; None if there is none."""
        slots = array("i")
        disk: list[bytes] = []
        for digest in digests:
            slot = self._slot_of.get(digest, -1)
            if slot >= 0:
                self._hit(slot)
                self._lease(slot)
            elif on_disk(digest):
                disk.append(digest)
            else:
                break
            slots.append(slot)
        if not slots:
            return None
        self._last_lease += 1
        lease = Lease(self._last_lease, owner, tuple(digests[: len(slots)]), slots, tuple(disk), now)
        self._leases[lease.id] = lease
        return lease

    def lease_of(self, owner: int, id_: int) -> Lease | None:
        """None: there is none, or it is somebody else's."""
        lease = self._leases.get(id_)
        return lease if lease is not None and lease.owner == owner else None

    def add_to_lease(self, lease: Lease, place: int, slot: int) -> None:
        """The block at `place`, which wasn't in a slot, is in this one now. For a lease that isn't over."""
        lease.slots[place] = slot
        self._lease(slot)

    def release(self, lease: Lease) -> None:
        del self._leases[lease.id]
        self._let_go(lease.slots)

    def end_leases(self, owner: int) -> list[Lease]:
        """The owner is gone: give back all that it leased."""
        leases = [lease for lease in self._leases.values() if lease.owner == owner]
        for lease in leases:
            self.release(lease)
        return leases

    # Forgetting

    def forget(self, slots: Iterable[int]) -> int:
        """What is said to be in `slots` can't be found any more; how many it was. They are given to others only when
        nobody copies out of them.
        """
        forgotten = 0
        for slot in slots:
            if 0 <= slot < len(self._state) and self._state[slot] == _HELD:
                self._lose(slot)
                self._state[slot] = _DOOMED
                self._free_if_unused(slot)
                forgotten += 1
        return forgotten

    def clear(self, digests: Iterable[bytes]) -> tuple[int, int]:
        """Forget these, if they are there; how many went, and how many stay because they are leased."""
        gone: list[int] = []
        stay = 0
        for digest in digests:
            slot = self._slot_of.get(digest, -1)
            if slot >= 0 and self._leased[slot]:
                stay += 1
            elif slot >= 0:
                gone.append(slot)
        return self.forget(gone), stay

    # Writing to disk

    def pin(self, slot: int) -> None:
        """A held block that is read from where it lies, until `unpin`: it may be forgotten, but not overwritten."""
        self.pinned_slots += not self._pins[slot]
        self._pins[slot] += 1

    def is_pinned(self, slot: int) -> bool:
        return self._pins[slot] > 0

    def unpin(self, slot: int) -> None:
        self._pins[slot] -= 1
        self.pinned_slots -= not self._pins[slot]
        if self._pins[slot]:
            return
        if self._state[slot] == _DOOMED:
            self._free_if_unused(slot)
        elif not self._leased[slot] and slot not in self._order:
            self._order.prepend(slot, self._level(slot))

    # Details

    def _hit(self, slot: int) -> None:
        self._hits[slot] = min(self._hits[slot] + 1, _MOST_HITS)

    def _lease(self, slot: int) -> None:
        self._order.discard(slot)
        self.leased_slots += not self._leased[slot]
        self._leased[slot] += 1

    def _let_go(self, slots: Sequence[int]) -> None:
        for slot in reversed(slots):
            if slot < 0:
                continue
            self._leased[slot] -= 1
            if not self._leased[slot]:
                self.leased_slots -= 1
                if self._state[slot] == _HELD:
                    self._order.append(slot, self._level(slot))
                else:
                    self._free_if_unused(slot)

    def _level(self, slot: int) -> int:
        priority = self._priority[slot]
        return UNSET_PRIORITY_COUNTS_AS if priority == _UNSET else priority

    def _raise_priority(self, slot: int, priority: int | None) -> None:
        """The header keeps the priority of the commit: somebody may be reading it."""
        if priority is not None and priority > self._level(slot):
            self._priority[slot] = priority

    def _ancestors(self, digest: bytes) -> list[int]:
        """Slots of the held blocks up the chain from this one, the nearest first."""
        slots: list[int] = []
        while digest and len(slots) < MAX_ANCESTORS:
            slot = self._slot_of.get(digest, -1)
            if slot < 0:
                break
            slots.append(slot)
            digest = bytes(self._parent[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES])
        return slots

    def _used(self, slots: Iterable[int]) -> None:
        """Held blocks of a chain, the last of it first."""
        for slot in slots:
            if not self._leased[slot]:
                self._order.append(slot, self._level(slot))

    def _evict(self) -> int:
        """A slot whose block is forgotten, -1 if none may be."""
        while (slot := self._order.lowest()) >= 0:
            self._order.discard(slot)
            if not self._pins[slot]:
                self._lose(slot)
                self.evicted += 1
                return slot
        return -1

    def _lose(self, slot: int) -> None:
        digest = self._digest[slot]
        del self._slot_of[digest]
        self._digest[slot] = b""
        self._order.discard(slot)
        self._headers.wipe(slot)
        self._changes.append((False, digest))

    def _free_if_unused(self, slot: int) -> None:
        if not self._leased[slot] and not self._pins[slot]:
            self._set_free(slot)

    def _set_free(self, slot: int) -> None:
        self._state[slot] = _FREE
        self._free.append(slot)

    def eviction_order(self) -> list[bytes]:
        """For tests: the next one first."""
        return [self._digest[slot] for slot, _ in self._order]

    def check_integrity(self) -> None:
        """For tests: everything that is said twice is said alike.

        Raises:
            AssertionError: it isn't.
        """
        ordered = list(self._order)
        assert len({slot for slot, _ in ordered}) == len(ordered)
        for slot, level in ordered:
            assert self._state[slot] == _HELD and not self._leased[slot] and level == self._level(slot)
        assert sorted(self._free) == [slot for slot, state in enumerate(self._state) if state == _FREE]
        assert sorted(self._writing) == [slot for slot, state in enumerate(self._state) if state == _WRITING]
        assert {writing.block.digest: slot for slot, writing in self._writing.items()} == self._written
        held = {self._digest[slot]: slot for slot, state in enumerate(self._state) if state == _HELD}
        assert held == self._slot_of and not held.keys() & self._written.keys()
        leased = [0] * self.slots
        for lease in self._leases.values():
            for slot in lease.slots:
                if slot >= 0:
                    leased[slot] += 1
        assert leased == list(self._leased)
        assert self.leased_slots == sum(count > 0 for count in leased)
        assert self.pinned_slots == sum(count > 0 for count in self._pins)
        for slot, state in enumerate(self._state):
            used = bool(leased[slot] or self._pins[slot])
            assert used if state == _DOOMED else not used or state == _HELD
            assert state != _HELD or leased[slot] or self._pins[slot] or slot in self._order
            assert bool(self._digest[slot]) == (state == _HELD)
        generations = [self._generation[slot] for slot in self._slot_of.values()]
        assert len(set(generations)) == len(generations)
