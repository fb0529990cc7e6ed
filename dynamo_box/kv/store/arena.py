"""The memory of one KV layout: a memory file that the store and its workers map, and the headers in it.

It has its full length from the start, which is sealed; its pages come in steps, before slots in them are handed out.
So no copy of a worker ever ends in a SIGBUS for want of memory: where the kernel says no, there are fewer slots. They
are wiped here, where nobody waits for it: to workers that map them they come at a fifth of the cost.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from dynamo_box.kv.pages import POPULATE_WRITE, address_of, populate
from dynamo_box.protocol.kv import HEADER_BYTES, Block, KvLayout, arena_headers_bytes, pack_header

STEP_BYTES = 64 * 1024 * 1024
_WIPED = bytes(HEADER_BYTES)


class NoMemory(Exception):
    """The kernel gives no memory file, or no mapping of it."""


def slots_in(capacity_bytes: int, slot_bytes: int) -> int:
    """Slots that fit, with their headers."""
    slots = max(0, capacity_bytes // (slot_bytes + HEADER_BYTES))
    while slots and arena_headers_bytes(slots) + slots * slot_bytes > capacity_bytes:
        slots -= 1
    return slots


class Arena:
    """Also the `Headers` of its slots. `slots` are those that fit into `capacity_bytes`; `backed` of them, the first
    ones, have memory. `shortage` says why there will be no more. Slots of a modelled layout count as `slot_bytes` and
    have a header only, so nobody can refuse them memory.

    Raises:
        NoMemory: see there.
    """

    def __init__(self, name: str, layout: KvLayout, capacity_bytes: int) -> None:
        self.slots = slots_in(capacity_bytes, layout.slot_bytes)
        self.slot_bytes = layout.slot_bytes
        self.stride = layout.slot_stride
        self.headers_bytes = arena_headers_bytes(self.slots)
        self.bytes = self.headers_bytes + self.slots * self.stride
        self.backed = 0
        self.shortage = ""
        try:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NoMemory(f"no memory file: {error.strerror}") from error
        try:
            os.ftruncate(self.fd, self.bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            if self.slots:
                os.posix_fallocate(self.fd, 0, self.headers_bytes)
                self._mapping: memoryview = memoryview(mmap.mmap(self.fd, self.bytes))
        except OSError as error:
            os.close(self.fd)
            raise NoMemory(f"no memory file of {self.bytes} bytes: {error.strerror}") from error

    @property
    def may_grow(self) -> bool:
        return self.backed < self.slots and not self.shortage

    @property
    def backed_bytes(self) -> int:
        return (self.headers_bytes if self.slots else 0) + self.backed * self.slot_bytes

    def grow(self) -> int:
        """Memory for the next step of slots; how many they are. Takes milliseconds, and may be called on a thread."""
        wanted = min(max(STEP_BYTES // self.slot_bytes, 1), self.slots - self.backed)
        while wanted and self.may_grow:
            try:
                if self.stride:
                    self._back(self.headers_bytes + self.backed * self.stride, wanted * self.stride)
            except OSError as error:
                wanted //= 2
                if not wanted:
                    self.shortage = f"the kernel gives no more memory than {self.backed_bytes} bytes: {error.strerror}"
            else:
                self.backed += wanted
                return wanted
        return 0

    def _back(self, start: int, length: int) -> None:
        mapping = self._mapping  # stays mapped
        os.posix_fallocate(self.fd, start, length)
        populate(address_of(mapping) + start, length, POPULATE_WRITE)

    def slot(self, slot: int) -> memoryview:
        start = self.headers_bytes + slot * self.stride
        return self._mapping[start : start + self.stride]

    def write(self, slot: int, generation: int, block: Block) -> None:
        self._mapping[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES] = pack_header(
            generation, block.digest, block.parent, block.priority
        )

    def wipe(self, slot: int) -> None:
        self._mapping[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES] = _WIPED

    def close(self) -> None:
        """The memory is free once the last of its workers has unmapped it. Views that are out keep the mapping."""
        os.close(self.fd)
        if self.slots:
            del self._mapping
