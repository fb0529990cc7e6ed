"""Writing down on disk what is known of a block's use: when it was last used as the time of its file, and a priority
that was raised as part of its name. So the order of eviction survives a restart. It is done now and then, for a bounded
number of blocks; what doesn't get its turn is a little too old after a restart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_box.kv.store.disk_directory import TierDirectory
from dynamo_box.kv.store.disk_files import file_path
from dynamo_box.kv.store.disk_index import DiskIndex
from dynamo_box.kv.store.disk_pool import Pool

MOST_REMEMBERED = 4096
AT_ONCE = 512

Key = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class _Use:
    key: Key
    used_ns: int
    path: str
    priority: int | None
    new_path: str


class DiskUses:
    def __init__(self, keeper: Pool, *, failed: Callable[[TierDirectory, Exception], None]) -> None:
        self.renaming: dict[Key, int | None] = {}
        """To which priority: the file has its old name or this one. Such blocks are pinned."""
        self.underway = False
        self._keeper = keeper
        self._failed = failed
        self._used: dict[Key, int] = {}
        self._next = 0.0

    def add(self, layout: str, digest: bytes) -> None:
        key = layout, digest
        if key in self._used or len(self._used) < MOST_REMEMBERED:
            self._used[key] = time.time_ns()

    def due(self, now: float, every_s: float) -> bool:
        """Whether it is time to write down what there is."""
        if not self._used or self.underway or now < self._next:
            return False
        self._next = now + every_s
        return True

    def lose(self) -> None:
        """Forget what wasn't written down."""
        self._used.clear()

    def write_down(self, directory: TierDirectory, current: Callable[[], DiskIndex]) -> None:
        """`current` gives the index, which may be another one by the time that it is done."""
        index, uses = current(), []
        for key in list(self._used)[:AT_ONCE]:
            used_ns = self._used.pop(key)
            if index.has(*key):
                uses.append(self._use(index, key, used_ns))
        if not uses:
            return
        self.underway = True

        def over() -> None:
            self.underway = False
            for use in uses:
                if use.new_path:
                    self.renaming.pop(use.key, None)
                    current().unpin(use.key[0], (use.key[1],))

        def done(_: None) -> None:
            for use in uses:
                if use.new_path and current().has(*use.key):
                    current().filed(*use.key, use.priority)
            over()

        def failed(error: Exception) -> None:
            over()
            self._failed(directory, error)

        self._keeper.submit(lambda _: _write_down(directory.root, uses), done, failed)

    def _use(self, index: DiskIndex, key: Key, used_ns: int) -> _Use:
        path, priority = index.path_of(*key), index.priority_of(*key)
        new_path = file_path(*key, priority)
        if new_path == path or index.is_pinned(*key):  # a pinned one may be read, under the name that it has
            return _Use(key, used_ns, path, priority, "")
        index.pin(key[0], (key[1],))
        self.renaming[key] = priority
        return _Use(key, used_ns, path, priority, new_path)


def _write_down(root: int, uses: list[_Use]) -> None:
    for use in uses:
        with contextlib.suppress(FileNotFoundError):  # evicted, or dropped as damaged, meanwhile
            os.utime(use.path, ns=(use.used_ns, use.used_ns), dir_fd=root, follow_symlinks=False)
            if use.new_path:
                os.rename(use.path, use.new_path, src_dir_fd=root, dst_dir_fd=root)
