"""Host memory as a device: memfds, mapped at reserved addresses.

A reservation is an inaccessible, unaccounted mapping; memory is mapped over a part of it in place, and unmapping puts
the inaccessible mapping back, so nothing else can ever come to lie there in between.

Memory is backed when it is created: a memfd is lazy, and one that runs out of memory later does so as SIGBUS in
whoever touches it. Where the kernel gives huge pages to shared memory on advice, backing it through an advised mapping
gets them, and with them a remap that fills page tables by 2 MiB instead of 4 KiB.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

from dynamo_box.gms.vmm.base import VmmRefused

GRANULARITY = 2 * 1024 * 1024
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value
_HUGE_SHARED_MEMORY = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostVmm:
    """One process's view; see `base.Vmm`."""

    granularity = GRANULARITY

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._handles: dict[int, int] = {}

    def create(self, size: int, name: str) -> int:
        self._check_size(size)
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            if _huge_pages_on_advice():
                _back_with_huge_pages(fd, size)
            os.posix_fallocate(fd, 0, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def seal(self, fd: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)

    def reopen_read_only(self, fd: int) -> int:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def import_(self, fd: int) -> int:
        try:
            size = os.fstat(fd).st_size
            self._check_size(size)
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            self._handles[fd] = size
        return fd

    def release(self, handle: int) -> None:
        with self._lock:
            if self._handles.pop(handle, None) is None:
                raise VmmRefused(f"handle {handle} is not held")
        os.close(handle)

    def reserve(self, size: int) -> int:
        self._check_size(size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        found = _mmap(0, size + GRANULARITY, _PROT_NONE, flags, -1)
        address = -(-found // GRANULARITY) * GRANULARITY
        if address > found:
            _munmap(found, address - found)
        _munmap(address + size, found + GRANULARITY - address)
        with self._lock:
            self._reserved[address] = size
        return address

    def free_address(self, address: int, size: int) -> None:
        with self._lock:
            if self._reserved.get(address) != size:
                raise VmmRefused(f"{size} bytes at {address:#x} are not a reservation")
            if self._overlaps(address, size):
                raise VmmRefused(f"memory is still mapped in the reservation at {address:#x}")
            _munmap(address, size)
            del self._reserved[address]

    def map(self, address: int, size: int, handle: int, offset: int, *, writable: bool) -> None:
        self._check_size(size)
        if offset != 0:
            raise VmmRefused(f"offset {offset}: memory is mapped from its start")
        if address % GRANULARITY:
            raise VmmRefused(f"address {address:#x} is not aligned to {GRANULARITY}")
        with self._lock:
            if handle not in self._handles:
                raise VmmRefused(f"handle {handle} is not held")
            if self._handles[handle] != size:
                raise VmmRefused(f"{size} bytes of memory that has {self._handles[handle]}: it is mapped whole")
            if not any(start <= address and address + size <= start + room for start, room in self._reserved.items()):
                raise VmmRefused(f"{size} bytes at {address:#x} are not reserved")
            if self._overlaps(address, size):
                raise VmmRefused(f"something is mapped at {address:#x} already")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            _mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, handle)
            self._mapped[address] = size
        if _huge_pages_on_advice():
            _madvise(address, size, _MADV_HUGEPAGE)

    def unmap(self, address: int, size: int) -> None:
        with self._lock:
            if self._mapped.get(address) != size:
                raise VmmRefused(f"{size} bytes at {address:#x} are not one whole mapping")
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            _mmap(address, size, _PROT_NONE, flags, -1)
            del self._mapped[address]

    def populate(self, address: int, size: int, *, writable: bool) -> None:
        if not self._is_mapped(address, size):
            raise VmmRefused(f"{size} bytes at {address:#x} are not one whole mapping")
        try:
            _madvise(address, size, _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A kernel before 5.14. Reading is enough for a writable mapping too: its memory is backed already.
            _ = bytes(memoryview((ctypes.c_char * size).from_address(address))[:: mmap.PAGESIZE])

    def close(self) -> None:
        for address, size in list(self._mapped.items()):
            self.unmap(address, size)
        for address, size in list(self._reserved.items()):
            self.free_address(address, size)
        for handle in list(self._handles):
            self.release(handle)

    def _is_mapped(self, address: int, size: int) -> bool:
        with self._lock:
            return self._mapped.get(address) == size

    def _overlaps(self, address: int, size: int) -> bool:
        return any(start < address + size and address < start + length for start, length in self._mapped.items())

    def _check_size(self, size: int) -> None:
        if size <= 0 or size % GRANULARITY:
            raise VmmRefused(f"size {size} is not a multiple of {GRANULARITY}")


def _huge_pages_on_advice() -> bool:
    try:
        return "[advise]" in _HUGE_SHARED_MEMORY.read_text()
    except OSError:  # a kernel without them
        return False


def _back_with_huge_pages(fd: int, size: int) -> None:
    address = _mmap(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
    try:
        _madvise(address, size, _MADV_HUGEPAGE)
        _madvise(address, size, _MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an old kernel; it is backed by small pages then
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    finally:
        _munmap(address, size)


def _mmap(address: int, size: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, 0)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _munmap(address: int, size: int) -> None:
    if size and _libc.munmap(address, size) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _madvise(address: int, size: int, advice: int) -> None:
    if _libc.madvise(address, size, advice) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
