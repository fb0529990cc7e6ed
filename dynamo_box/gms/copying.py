"""Bytes of a layout from one set of memory files into another, all or nothing; and the errors of everything that moves
them (see `snapshot_files.py` for the disk).

    MoveFailed             nothing of the move is left, and what was there before is untouched
    ├── OutOfMemory        a destination can't be made, or not be filled
    ├── MoveStopped        the caller's `stop` said so
    ├── DiskFull           the file system has no room for a snapshot
    └── SnapshotDamaged    files that must not be used

The kernel copies from page to page (`sendfile`): on two cores of a virtual machine 1.7 GiB/s, a write from a mapping of
the source 1.6, mapping both sides and memcpy 0.8 (every page of the destination is cleared before it is written, and
faults), and two threads are as fast as one, since what takes the time is new pages. Nothing is mapped, so a source that
is too short is an error here and no SIGBUS, and a full tmpfs or memory limit an ENOSPC.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SLICE_BYTES = 32 << 20
"""Copied at a time, before `stop` is asked again: some 20 ms."""

Make = Callable[[int, int], int]
"""(number of the allocation, its bytes) -> descriptor of a new memory file of at least that size, all zero. May raise
OSError or MemoryError. Whoever calls it owns the descriptor.
"""


class MoveFailed(Exception):
    """`__cause__` is what failed, where something beneath did."""


class OutOfMemory(MoveFailed):
    pass


class MoveStopped(MoveFailed):
    pass


def never() -> bool:
    return False


def copy_memory(
    sources: Sequence[int], sizes: Sequence[int], make: Make, *, stop: Callable[[], bool] = never
) -> list[int]:
    """New memory files, made by `make`, with the first `sizes[i]` bytes of `sources[i]` each.

    All are made before a byte is copied. Takes seconds: call it off the event loop; the GIL is free while bytes move.

    Raises:
        OutOfMemory, MoveStopped, MoveFailed: every destination made is closed; the sources are as they were.
    """
    with destinations(sizes, make) as made:
        for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
            os.lseek(made[number], 0, os.SEEK_SET)
            done = 0
            while done < size:
                check_stop(stop)
                count = os.sendfile(made[number], source, done, min(SLICE_BYTES, size - done))
                if count == 0:
                    raise MoveFailed(f"allocation {number} has {done} bytes where {size} should be")
                done += count
        return made


@contextmanager
def destinations(sizes: Sequence[int], make: Make) -> Iterator[list[int]]:
    """Descriptors from `make`; they stay open if the block ends well, else all are closed and the error is typed."""
    made: list[int] = []
    try:
        for number, size in enumerate(sizes):
            made.append(make(number, size))
        yield made
    except BaseException as error:
        for descriptor in made:
            os.close(descriptor)
        if isinstance(error, (OSError, MemoryError)):
            raise typed(error) from error
        raise


def typed(error: OSError | MemoryError) -> MoveFailed:
    """For whatever fills memory: tmpfs says ENOSPC when it is full."""
    if isinstance(error, MemoryError) or error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT):
        return OutOfMemory(f"no memory to move weights into: {error}")
    return MoveFailed(f"weights can't be moved: {error}")


def check_stop(stop: Callable[[], bool]) -> None:
    if stop():
        raise MoveStopped("the move was stopped")
