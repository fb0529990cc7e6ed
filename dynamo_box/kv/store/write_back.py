"""Which blocks of the host tier go to disk."""

from __future__ import annotations

import asyncio
from collections import Counter

from dynamo_box.kv.store.disk_port import DiskPort
from dynamo_box.kv.store.slots import HostTier
from dynamo_box.protocol.spec import DiskAdmission

HITS_TO_ADMIT = 2
"""With the admission "second_hit": how often a block was found, or offered again."""


class WriteBack:
    """Blocks in at most half of a layout's slots may wait for the disk, since those can't be evicted meanwhile; how many
    in all is the disk tier's to say. What finds no place is dropped, and looked at again when it is used again.
    """

    def __init__(self, disk: DiskPort, admission: DiskAdmission, dropped: Counter[str]) -> None:
        self._disk = disk
        self._wanted_hits = HITS_TO_ADMIT if admission == "second_hit" else 0
        self._dropped = dropped
        self.queued = 0
        self.idle = asyncio.Event()
        """Nothing waits or is being written."""
        self.idle.set()

    def consider(self, layout_name: str, tier: HostTier, slot: int, data: memoryview) -> None:
        """The block in `slot` has come or was used: write it, if the disk hasn't got it and it is worth that."""
        if tier.hits(slot) < self._wanted_hits or tier.is_pinned(slot):
            return
        block = tier.block_in(slot)
        if self._disk.has(layout_name, block.digest):
            return
        if tier.pinned_slots >= max(tier.slots // 2, 1):
            self._dropped["slots_busy"] += 1
            return

        def done(_written: bool) -> None:
            tier.unpin(slot)
            self._count(-1)

        tier.pin(slot)
        self._count(1)
        if self._disk.write(layout_name, block, data, done):
            done(False)

    def _count(self, change: int) -> None:
        self.queued += change
        if self.queued:
            self.idle.clear()
        else:
            self.idle.set()
