"""Bytes of one memory file into another, as fast as the kernel can.

`sendfile` copies page to page inside the kernel: nothing is mapped, the destination's pages are not zeroed first and
not faulted in one by one. It took 0.26 s for 512 MiB where `pwrite` from a mapping took 0.30-0.37 s and a memcpy
between two mappings 0.57-0.9 s; a second thread gained nothing, since making new pages is what takes the time.
"""

from __future__ import annotations

import os
import threading

SLICE = 16 * 1024 * 1024
"""Bytes between two looks at whether the copy is still wanted."""


class Abandoned(Exception):
    """Whoever wanted this goes away; what was begun is undone."""


def copy(source: int, destination: int, size: int, unwanted: threading.Event) -> None:
    """Fill the first `size` bytes of a fresh memory file, leaving its position behind them.

    Raises:
        OSError: no memory, or the source is shorter.
        Abandoned: `unwanted` was set.
    """
    os.lseek(destination, 0, os.SEEK_SET)
    done = 0
    while done < size:
        if unwanted.is_set():
            raise Abandoned
        sent = os.sendfile(destination, source, done, min(SLICE, size - done))
        if sent == 0:
            raise OSError(f"the source ends after {done} of {size} bytes")
        done += sent
