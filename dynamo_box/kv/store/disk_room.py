"""How much the disk has room for. The tier leaves it a margin, and takes back what others give back."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from dynamo_box import wording
from dynamo_box.kv.store.disk_directory import TierDirectory
from dynamo_box.kv.store.disk_life import DiskLife
from dynamo_box.kv.store.disk_writes import DiskWrites

_MOST_MARGIN = 64 << 20


class DiskRoom:
    """`smallest` is what a block takes at least."""

    def __init__(
        self, life: DiskLife, writes: DiskWrites, smallest: Callable[[], int], note: Callable[[str, str], None]
    ) -> None:
        self.known = False
        """Whether it was measured since the directory was taken."""
        self._life = life
        self._writes = writes
        self._smallest = smallest
        self._note = note
        self._noted = False
        self._next = 0.0

    def measure(self, directory: TierDirectory) -> None:
        """For the first time, or to see whether there is more again, or less."""

        def measured(sizes: tuple[int, int]) -> None:
            if directory is self._life.directory:
                self._set(*sizes)

        def failed(error: Exception) -> None:
            if directory is self._life.directory:
                self._life.failed(error)

        self._life.keeper.submit(lambda _: directory.free_bytes(), measured, failed)

    def look_again(self, directory: TierDirectory, every_s: float) -> None:
        """If the tier has less than its capacity, and it is time to."""
        if self._writes.room < self._writes.capacity and time.monotonic() >= self._next:
            self._next = time.monotonic() + every_s
            self.measure(directory)

    def lose(self) -> None:
        self.known = False

    @property
    def shortage(self) -> str:
        """Why the tier holds less than its capacity; empty if it doesn't."""
        room, capacity = self._writes.room, self._writes.capacity
        if not self.known or room >= capacity:
            return ""
        return f"the disk has room for {wording.size(room)} of its {wording.size(capacity)}"

    def shrunk(self, room: int) -> None:
        if not self._noted:
            self._noted = True
            text = f"{wording.size(room)} instead of {wording.size(self._writes.capacity)}"
            self._note("warning", f"the disk is full: the disk tier for KV holds {text} until there is more")

    def _set(self, free: int, total: int) -> None:
        there = self._writes.index.used_bytes + self._writes.doomed_bytes
        room = there + free - min(_MOST_MARGIN, total // 100)
        self.known = True
        self._writes.room = min(self._writes.capacity, room)
        if self._writes.room < self._smallest() <= self._writes.capacity:
            self._life.failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return
        if self._writes.room == self._writes.capacity:
            self._noted = False
        self._life.confirm()
