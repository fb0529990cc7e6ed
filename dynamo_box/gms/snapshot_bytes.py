"""Bytes of a snapshot between its shards and memory: in pieces, read one ahead of what is summed and used.

Shards are read past the page cache (O_DIRECT) by a second thread, one buffer ahead of what is summed (7 GiB/s a core)
and copied into memory files. It takes buffers in large pages: into those a virtual disk gave 512 MiB in 0.17 s, into
small ones in 0.25 to 1.5 s, and through the page cache in 0.3 to 0.4 s. A file system without O_DIRECT is read through
the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

from dynamo_box.gms.copying import MoveFailed, check_stop
from dynamo_box.protocol.gms import EpochRecord

_PIECE_BYTES = 8 << 20
_BLOCK_BYTES = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of, at most."""


class Stream:
    """All allocations of a record end to end: what the shards cut into pieces."""

    def __init__(self, record: EpochRecord) -> None:
        self.sizes = [allocation.size for allocation in record.allocations]
        self._ends = list(accumulate(self.sizes))

    @property
    def bytes(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, descriptors: Sequence[int], view: memoryview, offset: int) -> None:
        done = 0
        for number, at, count in self._parts(offset, len(view)):
            if read_fully(descriptors[number], view[done : done + count], at) < count:
                raise MoveFailed(f"allocation {number} has less than its {self.sizes[number]} bytes")
            done += count

    def write(self, descriptors: Sequence[int], view: memoryview, offset: int) -> None:
        done = 0
        for number, at, count in self._parts(offset, len(view)):
            end = done + count
            while done < end:
                written = os.pwrite(descriptors[number], view[done:end], at)
                done += written
                at += written

    def _parts(self, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(number of the allocation, offset in it, bytes)."""
        number, end = bisect_right(self._ends, start), start + size
        while start < end:
            count = min(self._ends[number], end) - start
            yield number, start - (self._ends[number] - self.sizes[number]), count
            start += count
            number += 1


def pump(
    size: int,
    read: Callable[[memoryview, int], None],
    consume: Callable[[memoryview, int], None],
    stop: Callable[[], bool],
) -> None:
    """`consume` piece after piece of `size` bytes (a view, its offset), while a second thread reads the next one."""
    buffers = [_buffer(min(size, _PIECE_BYTES)) for _ in range(2 if size else 0)]
    with ThreadPoolExecutor(1, "snapshot reader") as reader:
        before: tuple[memoryview, int, Future[None]] | None = None
        for turn, offset in enumerate(range(0, size, _PIECE_BYTES)):
            check_stop(stop)
            view = buffers[turn % 2][: size - offset]
            if before is not None:
                before[2].result()
            pending = reader.submit(read, view, offset)
            if before is not None:
                consume(*before[:2])
            before = view, offset, pending
        if before is not None:
            before[2].result()
            consume(*before[:2])


def _buffer(size: int) -> memoryview:
    """In large pages where there are any, and aligned for O_DIRECT."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class ShardFile:
    """Reads past the page cache where the file system can."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            self._direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self._direct = -1
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, view: memoryview, offset: int) -> int:
        """Bytes read: fewer than asked only at the end of the file."""
        if self._direct >= 0 and (offset | len(view)) % _BLOCK_BYTES == 0:
            try:
                return read_fully(self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # blocks, or pieces, that don't fit its alignment
                    raise
        return read_fully(self._descriptor, view, offset)

    def close(self) -> None:
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._direct >= 0:
            os.close(self._direct)


def write_fully(descriptor: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])


def read_fully(descriptor: int, view: memoryview, offset: int) -> int:
    """Bytes read: fewer than asked only at the end of the file."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
