"""Taking blocks off the disk, a little at a time: what was evicted, what is damaged, and all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dynamo_box.kv.store.disk_counts import Outbox
from dynamo_box.kv.store.disk_directory import TierDirectory
from dynamo_box.kv.store.disk_index import DiskIndex
from dynamo_box.kv.store.disk_life import DiskLife
from dynamo_box.kv.store.disk_pool import Job
from dynamo_box.kv.store.disk_uses import DiskUses
from dynamo_box.kv.store.disk_writes import DiskWrites

AT_ONCE = 64


class DiskRemoval:
    """To clear is to forget all blocks that aren't pinned, and then, when nobody is at a file, to put their directories
    aside: so it is done for good long before the last file is deleted. `cleared` is called at that point.
    """

    def __init__(
        self,
        life: DiskLife,
        writes: DiskWrites,
        uses: DiskUses,
        outbox: Outbox,
        *,
        failed: Callable[[TierDirectory, Exception], None],
        cleared: Callable[[TierDirectory], None],
    ) -> None:
        self.clearing = False
        """From the wish on until it is done; meanwhile nothing else may begin."""
        self._sent = False
        self._life = life
        self._writes = writes
        self._uses = uses
        self._outbox = outbox
        self._failed = failed
        self._cleared = cleared

    def delete(self, directory: TierDirectory, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), AT_ONCE):
            some = paths[start : start + AT_ONCE]

            def remove(_: Job, some: Sequence[str] = some) -> None:
                directory.remove(some)

            self._life.keeper.submit(remove, lambda _: None, lambda error: self._failed(directory, error))

    def begin_clear(self) -> int:
        """How many blocks are forgotten."""
        self.clearing = True
        self._writes.drop_waiting("cleared")
        return self._forget_unpinned()

    def go_on(self, directory: TierDirectory) -> None:
        """With clearing, as soon as nobody is at the files."""
        if self._sent or self._life.io.busy or self._uses.underway:
            return
        self._sent = True
        self._forget_unpinned()
        index = self._writes.index
        keep = {
            name: [(digest, index.filed_as(name, digest)) for digest in shelf.slots]
            for name, shelf in index.shelves.items()
        }

        def set_aside(job: Job) -> list[str]:
            return [directory.set_aside(layout, keep.get(layout.name, ())) for layout in directory.layouts(job.alive)]

        def done(names: list[str]) -> None:
            if directory is self._life.directory:
                self.clearing = self._sent = False
                self.sweep(directory, names)
                self._cleared(directory)

        self._life.keeper.submit(set_aside, done, lambda error: self._failed(directory, error))

    def lose(self) -> None:
        """The directory is no longer the tier's. What was to be cleared still is, when there is one again."""
        self._sent = False

    def sweep(self, directory: TierDirectory, names: list[str]) -> None:
        """Delete what was put aside."""
        if not names or directory is not self._life.directory:
            return

        def deleted(result: tuple[bool, int]) -> None:
            done, freed = result
            self._writes.doomed_bytes = max(0, self._writes.doomed_bytes - freed)
            self.sweep(directory, names[1:] if done else names)

        self._life.keeper.submit(
            lambda _: directory.delete_some(names[0], AT_ONCE), deleted, lambda error: self._failed(directory, error)
        )

    def _forget_unpinned(self) -> int:
        index = self._writes.index
        kept = self._writes.index = index.kept_by_clear()
        self._writes.doomed_bytes += index.used_bytes - kept.used_bytes
        for name in index.shelves:
            self._outbox.removed(name, _all_but(index, name, frozenset(kept.shelf(name).slots)))
        return len(index) - len(kept)


def _all_but(index: DiskIndex, layout: str, kept: frozenset[bytes]) -> Iterator[bytes]:
    """`index` is one that nobody changes any more."""
    return (digest for digest in index.shelf(layout).slots if digest not in kept)
