"""Which blocks of the host tier go to disk, and when."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_box.kv.store.disk_port import DiskPort
from dynamo_box.kv.store.slots import HostTier
from dynamo_box.protocol.spec import DiskAdmission

HITS_TO_ADMIT = 2
"""With the admission "second_hit": how often a block was found, or offered again."""


@dataclass(eq=False)
class Line:
    """The blocks of one layout that are to be written, by digest, the oldest first. They may still be evicted."""

    layout: str
    tier: HostTier
    data_of: Callable[[int], memoryview]
    waiting: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    refused: bool = False
    """The disk didn't take the first of them, when it was last asked."""


class WriteBack:
    """Hands blocks to the disk: at most `limit` at once, and of one layout those in half of its slots, since they can't
    be evicted meanwhile. The others wait in the host tier; what is evicted there first is dropped and counted.
    `changed()` is called as blocks are written.
    """

    def __init__(
        self,
        disk: DiskPort,
        admission: DiskAdmission,
        limit: int,
        dropped: Counter[str],
        changed: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._wanted_hits = HITS_TO_ADMIT if admission == "second_hit" else 0
        self._limit = max(limit, 1)
        self._dropped = dropped
        self._changed = changed
        self._lines: dict[str, Line] = {}
        self._writing = 0
        self._due = False
        self._loop = asyncio.get_running_loop()
        self.idle = asyncio.Event()
        """Nothing is being written, and what waits is refused."""
        self.idle.set()

    @property
    def waiting(self) -> int:
        """Blocks that are to be written, or are being written."""
        return self._writing + sum(len(line.waiting) for line in self._lines.values())

    def open(self, line: Line) -> None:
        self._lines[line.layout] = line

    def close(self, layout: str) -> None:
        self._dropped["given_up"] += len(self._lines.pop(layout).waiting)

    def consider(self, layout: str, slot: int) -> None:
        """The block in `slot` has come or was used: write it, if the disk hasn't got it and it is worth that."""
        line = self._lines[layout]
        if line.tier.hits(slot) < self._wanted_hits or line.tier.is_pinned(slot):
            return
        digest = line.tier.digest_in(slot)
        if digest not in line.waiting and not self._disk.has(layout, digest):
            line.waiting[digest] = None

    def pump(self) -> None:
        """Hand over what may be: nothing as long as the disk doesn't work, or doesn't know yet what it has."""
        self._due = False
        settled = self._disk.settled
        for line in self._lines.values():
            line.refused = not settled
            while line.waiting and self._writing < self._limit and not line.refused:
                if line.tier.pinned_slots >= max(line.tier.slots // 2, 1):
                    break
                self._hand_over(line)
        if self._writing or any(line.waiting and not line.refused for line in self._lines.values()):
            self.idle.clear()
        else:
            self.idle.set()

    def _hand_over(self, line: Line) -> None:
        digest, _ = line.waiting.popitem(last=False)
        slot = line.tier.slot_of(digest)
        if slot < 0:
            self._dropped["evicted"] += 1
            return
        if line.tier.is_pinned(slot) or self._disk.has(line.layout, digest):
            return
        line.tier.pin(slot)
        self._writing += 1
        if self._disk.write(
            line.layout, line.tier.block_in(slot), line.data_of(slot), lambda _written: self._done(line, slot)
        ):
            line.tier.unpin(slot)
            self._writing -= 1
            line.refused = True
            line.waiting[digest] = None
            line.waiting.move_to_end(digest, last=False)

    def _done(self, line: Line, slot: int) -> None:
        line.tier.unpin(slot)
        self._writing -= 1
        self._changed()
        if not self._due:
            self._due = True
            self._loop.call_soon(self.pump)
