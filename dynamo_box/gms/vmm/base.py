"""The interface that host memory and CUDA share, with what CUDA refuses.

Memory is created as a descriptor that other processes import. Addresses are reserved apart from memory, so that they
stay the same when memory is unmapped and mapped again:

    create → fd ······ import_(fd) → handle, map(address, …), release(handle), unmap(address, …)
                       reserve(size) → address ································ free_address(address, …)
"""

from __future__ import annotations

from typing import Protocol


class VmmRefused(Exception):
    """The call is one that a device would refuse; nothing has changed."""


class Vmm(Protocol):
    """Sizes and addresses are multiples of `granularity`. Calls may come from any thread."""

    @property
    def granularity(self) -> int: ...

    def create(self, size: int, name: str) -> int:
        """A descriptor of new memory, all of it backed; the caller closes it.

        Raises:
            VmmRefused: the size is no multiple of the granularity.
            OSError: no memory, or no descriptor, is left.
        """
        ...

    def seal(self, fd: int) -> None:
        """Nobody can map it writable, or resize it, from here on.

        Raises:
            OSError: EBUSY, while a writable mapping lives.
        """
        ...

    def reopen_read_only(self, fd: int) -> int:
        """Another descriptor of the same memory, for readers; the caller closes it."""
        ...

    def import_(self, fd: int) -> int:
        """A handle of the memory. Takes over the descriptor, also when it fails: an open one alone pins memory."""
        ...

    def release(self, handle: int) -> None:
        """Let go of a handle; what is mapped stays mapped."""
        ...

    def reserve(self, size: int) -> int:
        """An address where nothing is."""
        ...

    def free_address(self, address: int, size: int) -> None:
        """Give back a whole reservation in which nothing is mapped."""
        ...

    def map(self, address: int, size: int, handle: int, offset: int, *, writable: bool) -> None:
        """Map all of a handle's memory into reserved addresses; `offset` must be 0."""
        ...

    def unmap(self, address: int, size: int) -> None:
        """Take away one whole mapping; its addresses stay reserved."""
        ...

    def populate(self, address: int, size: int, *, writable: bool) -> None:
        """Make every page present, so that none faults later.

        Raises:
            OSError: memory is short.
        """
        ...

    def close(self) -> None:
        """Unmap and free everything."""
        ...
