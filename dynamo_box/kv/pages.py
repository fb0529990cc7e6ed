"""Pages of a mapping, brought into this process before anybody needs them: a fault for each would take several times
as long, and just when somebody waits.
"""

from __future__ import annotations

import ctypes
from typing import Any

POPULATE_READ, POPULATE_WRITE = 22, 23
"""MADV_…, from Linux 5.14; `mmap` doesn't name them, and holds the interpreter's lock meanwhile."""

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def address_of(mapping: Any) -> int:
    """Of its first byte; it is the caller's to keep it mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def populate(address: int, length: int, how: int) -> bool:
    """Whether the kernel did; if not, pages come one by one as they are touched."""
    return bool(_madvise(address, length, how) == 0)
