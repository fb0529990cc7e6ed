"""The store's memory in this process, and who of the two threads holds it.

Both threads' connections lead to one memory file, which is mapped once. When either connection is lost, both threads
let go, and neither connects again before the mapping is gone: a dead store's memory must not linger while its
successor fills its own. Two connections that bring different files belong to different lives of the store; that
counts as a loss too.

What the store has memory for is mapped here while there is nothing else to do, so that it takes no time off a copy that
somebody waits for.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from dynamo_box.kv.client.session import StoreGone
from dynamo_box.kv.pages import POPULATE_READ, address_of, populate
from dynamo_box.protocol.kv import HEADER_BYTES, Attached, arena_headers_bytes, header_names

AHEAD_BYTES = 4 * 1024 * 1024
"""Mapped at a time: in a millisecond, as a rule."""

log = logging.getLogger(__name__)


class Arena:
    """`slots` of `block_bytes` each, behind their headers. Empty where the host tier has no room for one."""

    def __init__(self, attached: Attached, fd: int, block_bytes: int) -> None:
        """`fd` stays the caller's.

        Raises:
            StoreGone: what the store says of its memory can't be, or it can't be mapped.
        """
        self.slots = attached.slots
        self._slot_bytes = attached.slot_bytes
        self._headers_bytes = attached.headers_bytes
        self._block_bytes = block_bytes
        self._map: mmap.mmap | None = None
        self._mapped_slots = bytearray(max(self.slots, 0))
        self._mapped_until = self._backed_until = attached.headers_bytes
        if not self.slots:
            return
        needs = attached.headers_bytes + attached.slots * attached.slot_bytes
        size = os.fstat(fd).st_size
        if (
            self.slots < 0
            or attached.slot_bytes < block_bytes
            or attached.headers_bytes < arena_headers_bytes(self.slots)
            or not needs <= attached.arena_bytes <= size
        ):
            raise StoreGone(f"the kvstore offers memory that can't be: {attached}, a file of {size} bytes")
        try:
            self._map = mmap.mmap(fd, attached.arena_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise StoreGone(f"the kvstore's memory can't be mapped: {error}") from error
        self._map.madvise(mmap.MADV_DONTFORK)  # a child would keep the memory of a dead store
        self._address = address_of(self._map)
        self._fd = os.dup(fd)

    def has(self, slot: int) -> bool:
        return 0 <= slot < self.slots

    def holds(self, slot: int, generation: int, digest: bytes) -> bool:
        """Whether the slot's header says that this block is in it."""
        assert self._map is not None
        start = slot * HEADER_BYTES
        return header_names(self._map[start : start + HEADER_BYTES], generation, digest)

    @contextlib.contextmanager
    def views(self, slots: Sequence[int]) -> Iterator[list[memoryview]]:
        """Writable views of one block each; of no use after this."""
        assert self._map is not None
        self._populate(slots)
        views: list[memoryview] = []
        with memoryview(self._map) as whole:
            for slot in slots:
                start = self._headers_bytes + slot * self._slot_bytes
                views.append(whole[start : start + self._block_bytes])
            try:
                yield views
            finally:
                with contextlib.suppress(BufferError):  # whoever keeps something of it keeps `close` from unmapping
                    for view in views:
                        view.release()

    def map_ahead(self) -> bool:
        """Map some more of what the store has memory for; False if nothing is left of it. On one thread only."""
        if self._map is None:
            return False
        if self._mapped_until == self._backed_until:
            try:
                self._backed_until = os.lseek(self._fd, self._mapped_until, os.SEEK_HOLE)
            except OSError:  # at its end
                return False
        length = min(AHEAD_BYTES, self._backed_until - self._mapped_until)
        if length and populate(self._address + self._mapped_until, length, POPULATE_READ):
            self._mapped_until += length
            return True
        return False

    def _populate(self, slots: Sequence[int]) -> None:
        """Map what was never touched here: at once it takes a fifth of what a fault for each page takes."""
        for slot in slots if self._slot_bytes else ():
            start = self._headers_bytes + slot * self._slot_bytes
            if not self._mapped_slots[slot] and start + self._slot_bytes > self._mapped_until:
                populate(self._address + start, self._slot_bytes, POPULATE_READ)
            self._mapped_slots[slot] = 1

    def close(self) -> bool:
        """Unmap; False: somebody still holds a view, and nothing was unmapped."""
        if self._map is None:
            return True
        try:
            self._map.close()
        except BufferError:
            gc.collect()
            try:
                self._map.close()
            except BufferError:
                return False
        self._map = None
        os.close(self._fd)
        return True


class Holder:
    """One of the threads, as `SharedArena` sees it."""

    def let_go(self) -> None:
        """Called on any thread: give the arena back soon, the store is gone."""
        raise NotImplementedError


class SharedArena:
    """One mapping for all holders. `epoch` counts losses; an arena belongs to the epoch in which it was mapped."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._guard = threading.Lock()
        self._epoch = 0
        self._arena: Arena | None = None
        self._identity: tuple[int, int] | None = None
        self._mapped_in = 0
        self._holders: set[Holder] = set()

    def epoch_to_dial(self) -> int | None:
        """The epoch that a new connection would belong to; None while an arena of an earlier one is mapped."""
        with self._guard:
            if self._arena is not None and self._mapped_in != self._epoch and not self._unmap_unheld():
                return None
            return self._epoch

    def take(self, holder: Holder, epoch: int, attached: Attached, fd: int) -> Arena | None:
        """The arena that came with a connection of `epoch`; None if the store was lost meanwhile. Closes `fd`.

        Raises:
            StoreGone: it is of no use.
        """
        others: set[Holder] = set()
        try:
            stat = os.fstat(fd)
            identity = (stat.st_dev, stat.st_ino)
            with self._guard:
                if epoch != self._epoch:
                    return None
                if self._arena is None:
                    self._arena, self._identity = Arena(attached, fd, self._block_bytes), identity
                    self._mapped_in = epoch
                elif self._identity != identity:
                    self._epoch += 1
                    others = set(self._holders)
                    return None
                self._holders.add(holder)
                return self._arena
        finally:
            os.close(fd)
            for other in others:
                other.let_go()

    def give_back(self, holder: Holder) -> None:
        """The last one unmaps it, if nobody holds a view."""
        with self._guard:
            self._holders.discard(holder)
            if not self._unmap_unheld() and not self._holders:
                log.error("the memory of the kvstore stays mapped: the engine's copier keeps views of its slots")

    def lost(self, epoch: int) -> None:
        """A connection of `epoch` has ended: all of that epoch must."""
        with self._guard:
            if epoch != self._epoch:
                return
            self._epoch += 1
            others = set(self._holders)
        for other in others:
            other.let_go()

    def _unmap_unheld(self) -> bool:
        """Whether nothing is mapped now."""
        if self._arena is None:
            return True
        if self._holders or not self._arena.close():
            return False
        self._arena = self._identity = None
        return True
