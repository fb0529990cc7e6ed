"""What is on disk, what it occupies, and what goes next: the lowest priority first, then what was used least recently.
Pure.

A block is a number into arrays; so a million of them are some large objects rather than millions of small ones. A block
that is pinned is in no order, and counts as used when the last pin goes. Blocks of former lives come in any order
with the time of their last use; they are older than whatever is used in this life, and wait in a heap a level.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamo_box.kv.store.disk_files import file_path
from dynamo_box.kv.store.order import EvictionOrder
from dynamo_box.protocol.kv import HIGHEST_PRIORITY, UNSET_PRIORITY_COUNTS_AS

_UNSET = 255
_GROWTH = 1024
_FREE, _OLD, _RECENT, _PINNED = range(4)
_SLOT_BITS = 32


@dataclass(slots=True)
class Shelf:
    """One layout: its blocks by digest, and how often each digest is pinned, whether or not it is there."""

    layout: str
    slots: dict[bytes, int] = field(default_factory=dict)
    pins: dict[bytes, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gone:
    """A block that is no longer in the index, and its file."""

    layout: str
    digest: bytes
    path: str
    occupied: int


def counts_as(priority: int | None) -> int:
    return UNSET_PRIORITY_COUNTS_AS if priority is None else priority


class DiskIndex:
    """`used_bytes` is what the files of its blocks occupy."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self.shelves: dict[str, Shelf] = {}
        self._order = EvictionOrder(HIGHEST_PRIORITY + 1)
        self._old: defaultdict[int, list[int]] = defaultdict(list)
        """By level, a heap of time << _SLOT_BITS | slot. What has left it otherwise is skipped when it comes up."""
        self._free = array("i")
        self._state = bytearray()
        self._shelf: list[Shelf | None] = []
        self._digest: list[bytes] = []
        self._priority = bytearray()
        self._filed_as = bytearray()
        """The priority that the name of the file has."""
        self._occupied = array("Q")
        self._used_ns = array("Q")

    def __len__(self) -> int:
        return len(self._state) - len(self._free)

    def shelf(self, layout: str) -> Shelf:
        """Made if there is none."""
        found = self.shelves.get(layout)
        if found is None:
            found = self.shelves[layout] = Shelf(layout)
        return found

    def has(self, layout: str, digest: bytes) -> bool:
        shelf = self.shelves.get(layout)
        return shelf is not None and digest in shelf.slots

    def priority_of(self, layout: str, digest: bytes) -> int | None:
        """None too if it isn't there."""
        slot = self._slot(layout, digest)
        return None if slot < 0 else _optional(self._priority[slot])

    def is_pinned(self, layout: str, digest: bytes) -> bool:
        shelf = self.shelves.get(layout)
        return shelf is not None and digest in shelf.pins

    def path_of(self, layout: str, digest: bytes) -> str:
        """Of a block that is there."""
        slot = self._slot(layout, digest)
        return file_path(layout, digest, _optional(self._filed_as[slot]))

    def filed_as(self, layout: str, digest: bytes) -> int | None:
        return _optional(self._filed_as[self._slot(layout, digest)])

    def add(self, layout: str, digest: bytes, priority: int | None, occupied: int) -> None:
        """One that was just written, and isn't there."""
        self._place(self._new(self.shelf(layout), digest, priority, occupied))

    def add_old(self, layout: str, digest: bytes, priority: int | None, occupied: int, used_ns: int) -> bool:
        """One that was found on disk; False if it is there already."""
        shelf = self.shelf(layout)
        if digest in shelf.slots:
            return False
        slot = self._new(shelf, digest, priority, occupied)
        self._used_ns[slot] = used_ns
        if digest in shelf.pins:
            self._state[slot] = _PINNED
        else:
            self._state[slot] = _OLD
            heapq.heappush(self._old[counts_as(priority)], used_ns << _SLOT_BITS | slot)
        return True

    def touch(self, layout: str, digest: bytes) -> bool:
        """It counts as used now; whether it is there."""
        slot = self._slot(layout, digest)
        if slot >= 0:
            self._place(slot)
        return slot >= 0

    def raise_priority(self, layout: str, digest: bytes, priority: int | None) -> bool:
        """Whether it is there and had a lower one; then it counts as used now too."""
        slot = self._slot(layout, digest)
        if slot < 0 or counts_as(priority) <= self._level(slot):
            return False
        self._priority[slot] = _packed(priority)
        self._place(slot)
        return True

    def filed(self, layout: str, digest: bytes, priority: int | None) -> None:
        """Its file has this priority in its name now."""
        self._filed_as[self._slot(layout, digest)] = _packed(priority)

    def pin(self, layout: str, digests: Iterable[bytes]) -> None:
        shelf = self.shelf(layout)
        for digest in digests:
            shelf.pins[digest] = shelf.pins.get(digest, 0) + 1
            slot = shelf.slots.get(digest, -1)
            if slot >= 0:
                self._order.discard(slot)
                self._state[slot] = _PINNED

    def unpin(self, layout: str, digests: Iterable[bytes]) -> None:
        shelf = self.shelf(layout)
        for digest in digests:
            pins = shelf.pins.get(digest, 0)
            if pins > 1:
                shelf.pins[digest] = pins - 1
            elif shelf.pins.pop(digest, 0) and digest in shelf.slots:
                self._place(shelf.slots[digest])

    def remove(self, layout: str, digest: bytes) -> Gone | None:
        """None if it isn't there."""
        slot = self._slot(layout, digest)
        return None if slot < 0 else self._remove(slot)

    def evict(self) -> Gone | None:
        """The block that goes next, removed; None if none may go."""
        slot = self._next()
        return None if slot < 0 else self._remove(slot)

    def kept_by_clear(self) -> DiskIndex:
        """An index of what is pinned only, with all pins."""
        kept = DiskIndex()
        for shelf in self.shelves.values():
            kept.shelf(shelf.layout).pins.update(shelf.pins)
            for digest in shelf.pins:
                slot = shelf.slots.get(digest, -1)
                if slot >= 0:
                    kept.add(shelf.layout, digest, _optional(self._filed_as[slot]), self._occupied[slot])
                    kept.raise_priority(shelf.layout, digest, _optional(self._priority[slot]))
        return kept

    def emptied(self) -> DiskIndex:
        """An index of nothing, with all pins: their holders will still give them back."""
        empty = DiskIndex()
        for shelf in self.shelves.values():
            empty.shelf(shelf.layout).pins.update(shelf.pins)
        return empty

    # Details

    def _slot(self, layout: str, digest: bytes) -> int:
        shelf = self.shelves.get(layout)
        return -1 if shelf is None else shelf.slots.get(digest, -1)

    def _level(self, slot: int) -> int:
        return counts_as(_optional(self._priority[slot]))

    def _new(self, shelf: Shelf, digest: bytes, priority: int | None, occupied: int) -> int:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        shelf.slots[digest] = slot
        self._shelf[slot] = shelf
        self._digest[slot] = digest
        self._priority[slot] = self._filed_as[slot] = _packed(priority)
        self._occupied[slot] = occupied
        self.used_bytes += occupied
        return slot

    def _grow(self) -> None:
        first = len(self._state)
        self._order.grow(_GROWTH)
        self._state.extend(bytes(_GROWTH))
        self._shelf.extend([None] * _GROWTH)
        self._digest.extend([b""] * _GROWTH)
        self._priority.extend(bytes(_GROWTH))
        self._filed_as.extend(bytes(_GROWTH))
        self._occupied.extend([0] * _GROWTH)
        self._used_ns.extend([0] * _GROWTH)
        self._free.extend(range(first + _GROWTH - 1, first - 1, -1))

    def _place(self, slot: int) -> None:
        """Last of its level, unless it is pinned."""
        shelf = self._shelf[slot]
        assert shelf is not None
        if self._digest[slot] in shelf.pins:
            self._state[slot] = _PINNED
        else:
            self._state[slot] = _RECENT
            self._order.append(slot, self._level(slot))

    def _next(self) -> int:
        recent = self._order.lowest()
        level = self._level(recent) if recent >= 0 else HIGHEST_PRIORITY + 1
        for old in sorted(self._old):
            if old > level:
                break
            heap = self._old[old]
            while heap:
                used_ns, slot = heap[0] >> _SLOT_BITS, heap[0] & (1 << _SLOT_BITS) - 1
                if self._state[slot] == _OLD and self._used_ns[slot] == used_ns:
                    return slot
                heapq.heappop(heap)
            del self._old[old]
        return recent

    def _remove(self, slot: int) -> Gone:
        shelf, digest = self._shelf[slot], self._digest[slot]
        assert shelf is not None
        gone = Gone(
            shelf.layout, digest, file_path(shelf.layout, digest, _optional(self._filed_as[slot])), self._occupied[slot]
        )
        del shelf.slots[digest]
        self._order.discard(slot)
        self._state[slot] = _FREE
        self._shelf[slot] = None
        self._digest[slot] = b""
        self._free.append(slot)
        self.used_bytes -= gone.occupied
        return gone


def _packed(priority: int | None) -> int:
    return _UNSET if priority is None else priority


def _optional(packed: int) -> int | None:
    return None if packed == _UNSET else packed
