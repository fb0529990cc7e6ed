"""Weight memory of the cpu device: memfds, mapped at fixed addresses.

A reservation is an inaccessible private mapping; a map replaces part of it, and unmapping replaces that by
inaccessible pages again, in one call each: at no moment can another thread's mmap get an address in between.

Large pages: memfds get them by advice alone only where the system is told so (`shmem_enabled`), which it seldom is.
Collapsing what is there works without, costs one copy, and every later map of it, in whatever process, is entered into
the page table 80 times as fast. That pays at the start, when nobody waits, but not in a move: collapsing takes three
times as long as entering small pages once (1.7 s a GiB to 0.6 s), also where all but one page in 2 MiB are holes.

A map that could write keeps its memfd from being sealed, and so does a read-only one made through a writable
descriptor, so readers map through `readonly`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Sequence

from dynamo_box.gms.vmm.base import Addresses, Mapping, StillMapped, VmmError, VmmOutOfMemory, check_offset
from dynamo_box.limits import Cgroups, memory_use

GRANULARITY = 2 * 1024 * 1024
MARGIN = 256 * 1024 * 1024
"""Bytes left to the rest of the machine."""

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 22, 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostVmm:
    """See `Vmm`. Safe to use from several threads."""

    granularity = GRANULARITY

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cgroups = Cgroups()
        self._addresses = Addresses(GRANULARITY)

    def create(self, size: int, name: str) -> int:
        self._addresses.check_aligned(size)
        available = self._available_bytes()
        if available is not None and size > available - MARGIN:
            raise VmmOutOfMemory(f"no {size} bytes for {name}: {max(available - MARGIN, 0)} can be had")
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)  # a lack of memory shows here, not as SIGBUS at a touch
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise _failure(f"no {size} bytes for {name}", error.errno) from error
        return fd

    def reserve(self, size: int) -> int:
        self._addresses.check_aligned(size)
        # The kernel aligns to pages alone: reserve one step more and give back both ends.
        span = size + GRANULARITY
        got = _mmap(0, span, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        address = -(-got // GRANULARITY) * GRANULARITY
        if address > got:
            _munmap(got, address - got)
        _munmap(address + size, got + span - (address + size))
        with self._lock:
            self._addresses.reserved[address] = size
        return address

    def map(self, address: int, size: int, fd: int, offset: int = 0, writable: bool = False) -> None:
        check_offset(offset)
        self.map_all([Mapping(address, size, fd, writable)])

    def map_all(self, mappings: Sequence[Mapping]) -> None:
        done: list[Mapping] = []
        with self._lock:
            try:
                for one in mappings:
                    self._check_free(one)
                    self._map(one)
                    done.append(one)
            except BaseException:
                for one in done:
                    self._unmap(one.address, one.size)
                raise

    def unmap(self, address: int, size: int) -> None:
        with self._lock:
            for start, length in self._addresses.check_whole(address, size).items():
                self._unmap(start, length)

    def release(self, address: int, size: int) -> None:
        with self._lock:
            self._addresses.check_empty(address, size)
            del self._addresses.reserved[address]
            _munmap(address, size)

    def populate(self, address: int, size: int, write: bool = False) -> None:
        self._check_mapped(address, size)
        while _libc.madvise(address, size, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # a kernel before 5.14
                _touch(address, size, write)
                return
            if code not in (errno.EINTR, errno.EAGAIN):
                raise _failure(f"no pages for {size} bytes at {address:#x}", code, pages=True)

    def advise_hugepages(self, address: int, size: int) -> None:
        self._check_mapped(address, size)
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            _libc.madvise(address, size, advice)  # refused where there are none, or none left: small ones serve too

    def seal(self, fd: int) -> None:
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise StillMapped("a map that could write to it is still alive") from error
            raise _failure("it can't be sealed", error.errno) from error

    def readonly(self, fd: int) -> int:
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failure("it can't be opened for readers", error.errno) from error

    def close(self) -> None:
        with self._lock:
            for address, size in self._addresses.mapped:
                self._unmap(address, size)
            for address, size in list(self._addresses.reserved.items()):
                del self._addresses.reserved[address]
                _munmap(address, size)

    @property
    def mapped_bytes(self) -> int:
        with self._lock:
            return self._addresses.mapped_bytes

    def _available_bytes(self) -> int | None:
        """What can be had without taking it from others, in this cgroup. Memory files are not refused by the kernel
        when they pass it: it kills processes, of whomever, until there is room. None if it can't be read, for want of
        a descriptor say, of which there will be none for a memory file either.
        """
        return memory_use(self._cgroups).available

    def _map(self, one: Mapping) -> None:
        protection = _PROT_READ | (_PROT_WRITE if one.writable else 0)
        try:
            _mmap(one.address, one.size, protection, _MAP_SHARED | _MAP_FIXED, one.fd)
        except VmmError:
            _hide(one.address, one.size)  # the kernel may have taken away what was there before it refused
            raise
        self._addresses.enter(one.address, one.size)

    def _unmap(self, address: int, size: int) -> None:
        _hide(address, size)
        self._addresses.leave(address)

    def _check_free(self, one: Mapping) -> None:
        self._addresses.check_free(one.address, one.size)
        try:
            there = os.fstat(one.fd).st_size
        except OSError as error:
            raise _failure(f"descriptor {one.fd} is no allocation", error.errno) from error
        if there != one.size:
            raise VmmError(f"the allocation has {there} bytes and is mapped as a whole, not as {one.size}")

    def _check_mapped(self, address: int, size: int) -> None:
        with self._lock:
            self._addresses.check_whole(address, size)


def view(address: int, nbytes: int, *, writable: bool = False) -> memoryview:
    """Mapped bytes. It knows nothing of the map: using it after `unmap` ends the process."""
    if nbytes == 0:
        return memoryview(bytearray() if writable else b"")
    whole = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
    return whole if writable else whole.toreadonly()


def _hide(address: int, size: int) -> None:
    _mmap(address, size, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)


def _touch(address: int, size: int, write: bool) -> None:
    pages = view(address, size, writable=write)[::_PAGE]
    if write:
        pages[:] = pages
    else:
        bytes(pages)


def _mmap(address: int, size: int, protection: int, flags: int, fd: int) -> int:
    got = _libc.mmap(address, size, protection, flags, fd, 0)
    if got == _MAP_FAILED:
        raise _failure(f"mmap of {size} bytes", ctypes.get_errno())
    return int(got or 0)


def _munmap(address: int, size: int) -> None:
    if size and _libc.munmap(address, size) != 0:
        raise _failure(f"munmap of {size} bytes", ctypes.get_errno())


def _failure(what: str, code: int | None, *, pages: bool = False) -> VmmError:
    """`pages`: what the kernel answers when pages can't be had, for a map that is known to be there."""
    number = code or 0
    out = {errno.ENOSPC, errno.ENOMEM} | ({errno.EFAULT} if pages else set())
    return (VmmOutOfMemory if number in out else VmmError)(f"{what}: {os.strerror(number)}")
