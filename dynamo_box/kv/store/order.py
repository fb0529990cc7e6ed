"""Which slot is evicted next: the lowest level first, then what came into the order longest ago. Pure.

One doubly linked list a level, in arrays: 9 bytes a slot, and each step costs the same however many slots there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

_UNLINKED, _END = -2, -1


class EvictionOrder:
    """Slots are numbers from 0 on; each is in the order once or not at all."""

    def __init__(self, levels: int) -> None:
        self._next = array("i")
        self._previous = array("i")
        self._level = bytearray()
        self._first = [_END] * levels
        self._last = [_END] * levels
        self._occupied = 0
        """Bit n is set if level n has a slot."""

    def grow(self, slots: int) -> None:
        """`slots` more, in no list."""
        self._next.extend([_UNLINKED] * slots)
        self._previous.extend([_UNLINKED] * slots)
        self._level.extend(bytes(slots))

    def __contains__(self, slot: int) -> bool:
        return self._next[slot] != _UNLINKED

    def append(self, slot: int, level: int) -> None:
        """Last of its level, wherever it was."""
        self.discard(slot)
        last = self._last[level]
        self._next[slot], self._previous[slot], self._level[slot] = _END, last, level
        self._last[level] = slot
        if last == _END:
            self._first[level] = slot
            self._occupied |= 1 << level
        else:
            self._next[last] = slot

    def prepend(self, slot: int, level: int) -> None:
        """First of its level, wherever it was."""
        self.discard(slot)
        first = self._first[level]
        self._next[slot], self._previous[slot], self._level[slot] = first, _END, level
        self._first[level] = slot
        if first == _END:
            self._last[level] = slot
            self._occupied |= 1 << level
        else:
            self._previous[first] = slot

    def discard(self, slot: int) -> None:
        following, previous, level = self._next[slot], self._previous[slot], self._level[slot]
        if following == _UNLINKED:
            return
        if previous == _END:
            self._first[level] = following
        else:
            self._next[previous] = following
        if following == _END:
            self._last[level] = previous
        else:
            self._previous[following] = previous
        self._next[slot] = self._previous[slot] = _UNLINKED
        if self._first[level] == _END:
            self._occupied &= ~(1 << level)

    def lowest(self) -> int:
        """-1 if there is none."""
        if not self._occupied:
            return -1
        return self._first[(self._occupied & -self._occupied).bit_length() - 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(slot, level), in the order in which they would be evicted."""
        for level, first in enumerate(self._first):
            slot = first
            while slot != _END:
                yield slot, level
                slot = self._next[slot]
