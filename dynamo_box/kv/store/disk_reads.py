"""Reading blocks from disk: spread over the threads, each checked where it lands, whatever is doubtful dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_box.kv.store.disk_counts import DiskCounts
from dynamo_box.kv.store.disk_directory import TierDirectory, Unusable
from dynamo_box.kv.store.disk_files import BlockId, Damaged, read_block
from dynamo_box.kv.store.disk_pool import Job, Pool
from dynamo_box.protocol.kv import MAX_BATCH, KvLayout

MOST_WAITING = MAX_BATCH
"""Blocks."""
_LARGEST_PART = 16


@dataclass(frozen=True, slots=True)
class ReadResult:
    """One `good` for each block that was asked for: its bytes are where they were wanted, and their checksum is right.
    `error` says why others aren't.
    """

    good: list[bool]
    took_s: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """`paths` are those that its file may have; none: it isn't there."""

    digest: bytes
    into: memoryview
    paths: tuple[str, ...]


@dataclass(eq=False, slots=True)
class Part:
    """What one job read: how far each block went, "" if all was well. `error` ended it: the rest wasn't tried."""

    verdicts: list[str]
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Read:
    results: list[bool]
    left: int
    began: float
    error: str
    over: Callable[[ReadResult], None]


class DiskReads:
    """`bad` is told of blocks that can't be used; `failed` of what the tier can't go on with."""

    def __init__(
        self,
        pool: Pool,
        threads: int,
        counts: DiskCounts,
        *,
        bad: Callable[[TierDirectory, KvLayout, Sequence[tuple[bytes, str]]], None],
        failed: Callable[[TierDirectory, Exception], None],
    ) -> None:
        self._pool = pool
        self._threads = threads
        self._counts = counts
        self._bad = bad
        self._failed = failed
        self.waiting = 0
        """Blocks that were asked for and not yet answered."""

    def read(
        self,
        directory: TierDirectory,
        layout: KvLayout,
        wanted: Sequence[Wanted],
        over: Callable[[ReadResult], None],
    ) -> None:
        """`over` is called when no thread writes to the memory any more."""
        self.waiting += len(wanted)
        self._counts.reading.begin()
        size = max(1, min(_LARGEST_PART, -(-len(wanted) // (2 * self._threads))))
        starts = range(0, len(wanted), size)
        read = _Read([False] * len(wanted), len(starts), time.monotonic(), "", over)
        for start in starts:
            self._submit(directory, layout, wanted[start : start + size], read, start)

    def _submit(
        self, directory: TierDirectory, layout: KvLayout, wanted: Sequence[Wanted], read: _Read, start: int
    ) -> None:
        def done(part: Part) -> None:
            bad: list[tuple[bytes, str]] = []
            for number, (block, verdict) in enumerate(zip(wanted, part.verdicts, strict=False)):
                if not verdict:
                    read.results[start + number] = True
                    self._counts.out_blocks += 1
                    self._counts.out_bytes += layout.block_bytes
                elif block.paths:
                    bad.append((block.digest, verdict))
                read.error = read.error or verdict
            if part.error is not None:
                read.error = read.error or str(part.error)
            if bad:
                self._bad(directory, layout, bad)
            if part.error is not None:
                self._failed(directory, part.error)
            self._end(read, len(wanted))

        self._pool.submit(
            lambda job: _read_part(job, directory, layout, wanted), done, lambda error: done(Part([], error))
        )

    def _end(self, read: _Read, blocks: int) -> None:
        self.waiting -= blocks
        read.left -= 1
        if not read.left:
            self._counts.reading.end()
            read.over(ReadResult(read.results, time.monotonic() - read.began, read.error))


def _read_part(job: Job, directory: TierDirectory, layout: KvLayout, wanted: Sequence[Wanted]) -> Part:
    part = Part([])
    missing = "is gone"
    for block in wanted:
        job.alive()
        if not block.paths:
            part.verdicts.append(missing)
            continue
        try:
            read_block(
                directory.root,
                BlockId(layout.name, block.digest, layout.block_bytes),
                block.paths,
                block.into,
                direct=directory.direct,
            )
            part.verdicts.append("")
        except Damaged as damage:
            part.verdicts.append(str(damage))
        except FileNotFoundError:
            try:
                directory.check()
            except (OSError, Unusable) as error:  # it isn't the block that is gone
                part.error = error
                return part
            part.verdicts.append(missing)
        except OSError as error:
            part.verdicts.append(f"can't be read: {error.strerror}")
            part.error = error
            return part
    return part
