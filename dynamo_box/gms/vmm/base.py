"""What memory of a device must offer so that its bytes come and go while their addresses stay.

Physical memory is a file descriptor; an address range is reserved apart from it. Both kinds of device refuse the same:
a map that doesn't begin at the allocation's first byte or shows a part of it, sizes and addresses off the granularity,
maps over a live map or outside a reservation, unmapping a part, releasing what is mapped or was never reserved. Code
that runs here runs on a GPU too.
"""

from __future__ import annotations

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
        """Nobody can ever write to it or change its size again, through whatever descriptor.

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


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step
