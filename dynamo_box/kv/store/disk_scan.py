"""Finding out what is on disk: the layouts one after the other, each directory of their blocks at a time, in a thread,
and what it has is handed to the loop in slices that don't hold it up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from dynamo_box.kv.store.disk_counts import DiskCounts
from dynamo_box.kv.store.disk_directory import FoundBlock, Scanned, TierDirectory
from dynamo_box.kv.store.disk_pool import Pool
from dynamo_box.log import get_logger
from dynamo_box.protocol.kv import KvLayout

SLICE = 256
log = get_logger()


class DiskScan:
    """`found` gets blocks; `finished` is called whenever nothing is left to look at. `removed` gets the names of what
    was cleared in an earlier life and has yet to be deleted.
    """

    def __init__(
        self,
        directory: TierDirectory,
        keeper: Pool,
        attached: Collection[KvLayout],
        counts: DiskCounts,
        *,
        found: Callable[[KvLayout, Sequence[FoundBlock]], None],
        removed: Callable[[list[str]], None],
        finished: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._directory = directory
        self._keeper = keeper
        self._counts = counts
        self._found = found
        self._removed = removed
        self._finished = finished
        self._failed = failed
        self._began = time.monotonic()
        self._layouts = deque(attached)
        self._shelves: deque[str] = deque()
        self._seen = {layout.name for layout in attached}
        self._stopped = False
        self.left = len(attached) + 1
        """Layouts that aren't known whole."""
        self.took_s: float | None = None
        """All that was there at first."""
        self._damaged = self._foreign = 0
        keeper.submit(lambda job: (directory.layouts(job.alive), directory.removed()), self._listed, self._fail)

    def add(self, layout: KvLayout) -> None:
        """Look at this one too, if that hasn't been done."""
        if layout.name in self._seen:
            return
        self._seen.add(layout.name)
        self._layouts.append(layout)
        self.left += 1
        if self.left == 1:
            self._next_layout()

    def stop(self) -> None:
        self._stopped = True

    def _fail(self, error: Exception) -> None:
        if not self._stopped:
            self._failed(error)

    def _listed(self, listed: tuple[list[KvLayout], list[str]]) -> None:
        if self._stopped:
            return
        layouts, removed = listed
        new = [layout for layout in layouts if layout.name not in self._seen]
        self._seen.update(layout.name for layout in new)
        self._layouts.extend(new)
        self.left += len(new) - 1
        if removed:
            self._removed(removed)
        self._next_layout()

    def _next_layout(self) -> None:
        if not self._layouts:
            if self.took_s is None:
                self.took_s = time.monotonic() - self._began
            if self._damaged or self._foreign:
                log.info("files of the disk tier that are no blocks", deleted=self._damaged, left_alone=self._foreign)
                self._counts.failed += self._damaged
                self._damaged = self._foreign = 0
            self._finished()
            return
        layout = self._layouts.popleft()

        def prepared(shelves: list[str]) -> None:
            self._shelves = deque(shelves)
            self._next_shelf(layout)

        self._keeper.submit(lambda _: self._directory.prepare(layout), prepared, self._fail)

    def _next_shelf(self, layout: KvLayout) -> None:
        if self._stopped:
            return
        if not self._shelves:
            self.left -= 1
            self._next_layout()
            return
        shelf = self._shelves.popleft()

        def scanned(result: Scanned) -> None:
            self._damaged += result.damaged
            self._foreign += result.foreign
            self._hand_over(layout, result.blocks)

        self._keeper.submit(lambda job: self._directory.scan(layout, shelf, job.alive), scanned, self._fail)

    def _hand_over(self, layout: KvLayout, blocks: list[FoundBlock]) -> None:
        if self._stopped:
            return
        if blocks:
            self._found(layout, blocks[:SLICE])
        if len(blocks) > SLICE:
            asyncio.get_running_loop().call_soon(self._hand_over, layout, blocks[SLICE:])
        else:
            self._next_shelf(layout)
