"""What memory of a device must offer so that its bytes come and go while their addresses stay.

Physical memory is a file descriptor; an address range is reserved apart from it. Both kinds of device refuse the same:
a map that doesn't begin at the allocation's first byte or shows a part of it, sizes and addresses off the granularity,
maps over a live map or outside a reservation, unmapping a part, releasing what is mapped or was never reserved. Code
that runs here runs on a GPU too.

What is refused for its addresses is refused in one place, `Addresses`, before the kernel or driver is asked: CUDA lets
some of it pass (unmapping what isn't mapped, a map beyond the end of its reservation where something else is reserved).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class VmmError(Exception):
    """The call was wrong, or the kernel or driver refused it; nothing has changed."""


class VmmOutOfMemory(VmmError):
    """The device has no room for it."""


class StillMapped(VmmError):
    """It can't be sealed while somebody can write to it."""


class Mapping(NamedTuple):
    """`fd` at `address`: the whole allocation."""

    address: int
    size: int
    fd: int
    writable: bool = False


class Vmm(Protocol):
    """One device, as this process sees it. Addresses and sizes are bytes, multiples of `granularity`."""

    @property
    def granularity(self) -> int: ...

    def create(self, size: int, name: str) -> int:
        """Physical memory, all of it there and zero, as a descriptor of the caller's. `name` is for people.

        Raises:
            VmmOutOfMemory: no room for all of it.
        """
        ...

    def reserve(self, size: int) -> int:
        """Addresses that nothing else will get and nobody can read yet."""
        ...

    def map(self, address: int, size: int, fd: int, offset: int = 0, writable: bool = False) -> None:
        """Show an allocation at reserved addresses. The descriptor may be closed afterwards, and should: it pins the
        memory as the map does.
        """
        ...

    def map_all(self, mappings: Sequence[Mapping]) -> None:
        """All of them or, on an error, none."""
        ...

    def unmap(self, address: int, size: int) -> None:
        """Take away the map, or adjoining maps, that make up this range. The addresses stay reserved."""
        ...

    def release(self, address: int, size: int) -> None:
        """Give back a whole reservation that shows nothing."""
        ...

    def populate(self, address: int, size: int, write: bool = False) -> None:
        """Enter the pages of mapped addresses into the page table now, not one by one when they are touched.

        Raises:
            VmmOutOfMemory: no room for them.
        """
        ...

    def advise_hugepages(self, address: int, size: int) -> None:
        """Gather what is mapped here into large pages, for this and every later map; without effect where the system
        has none to give. Best done once, by the writer, before it fills them.
        """
        ...

    def seal(self, fd: int) -> None:
        """Nobody can ever write to it or change its size again, through whatever descriptor. CUDA has no such thing:
        there only readers' own maps keep them from writing.

        Raises:
            StillMapped: a map is alive that could write.
        """
        ...

    def readonly(self, fd: int) -> int:
        """A descriptor for readers, of the caller's."""
        ...

    def close(self) -> None:
        """Unmap and release everything."""
        ...


class Addresses:
    """Which addresses of this process are reserved, and what of them shows memory. For one thread at a time.

    Its checks raise VmmError and change nothing; what passed them is entered once the kernel or driver has done it.
    """

    def __init__(self, granularity: int) -> None:
        self._granularity = granularity
        self.reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._starts: list[int] = []
        """Of what is mapped, in order."""

    @property
    def mapped(self) -> list[tuple[int, int]]:
        """Address and size of each map, in order."""
        return [(start, self._mapped[start]) for start in self._starts]

    @property
    def mapped_bytes(self) -> int:
        return sum(self._mapped.values())

    def enter(self, address: int, size: int) -> None:
        """It is mapped now."""
        self._mapped[address] = size
        bisect.insort(self._starts, address)

    def leave(self, address: int) -> None:
        """The map that begins there is gone."""
        del self._mapped[address]
        del self._starts[bisect.bisect_left(self._starts, address)]

    def check_aligned(self, size: int, address: int = 0) -> None:
        if size <= 0 or size % self._granularity or address % self._granularity:
            step = self._granularity
            raise VmmError(f"{size} bytes at {address:#x}: both must be multiples of {step}, and not nothing")

    def check_free(self, address: int, size: int) -> None:
        """Inside one reservation, and nothing is mapped there."""
        self.check_aligned(size, address)
        end = address + size
        if not any(start <= address and end <= start + length for start, length in self.reserved.items()):
            raise VmmError(f"{size} bytes at {address:#x} are not inside one reservation")
        if self._overlapping(address, size):
            raise VmmError(f"something is mapped in {size} bytes at {address:#x} already")

    def check_whole(self, address: int, size: int) -> dict[int, int]:
        """One map, or several that adjoin, which are the answer: sizes by address."""
        self.check_aligned(size, address)
        end = address + size
        found = self._overlapping(address, size)
        inside = {start: length for start, length in found.items() if address <= start and start + length <= end}
        if sum(inside.values()) != size:
            raise VmmError(f"{size} bytes at {address:#x} are not mapped as one whole map, or several that adjoin")
        return inside

    def check_empty(self, address: int, size: int) -> None:
        """A whole reservation in which nothing is mapped."""
        if self.reserved.get(address) != size:
            raise VmmError(f"{size} bytes at {address:#x} are no reservation")
        if self._overlapping(address, size):
            raise VmmError(f"{size} bytes at {address:#x} are still mapped")

    def _overlapping(self, address: int, size: int) -> dict[int, int]:
        first = max(bisect.bisect_right(self._starts, address) - 1, 0)
        last = bisect.bisect_left(self._starts, address + size)
        near = ((start, self._mapped[start]) for start in self._starts[first:last])
        return {start: length for start, length in near if address < start + length}


def check_offset(offset: int) -> None:
    if offset:
        raise VmmError(f"offset {offset}: a map begins at the first byte of an allocation")


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step
