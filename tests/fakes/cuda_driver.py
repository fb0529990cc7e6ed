"""The driver's virtual memory management as `cuda.bindings.driver` shows it, for one made-up GPU in one process.

It refuses what a real one refuses, with the same status, and lets pass what a real one lets pass: an H100 with driver
580.159 (CUDA 13.0) answered the calls in tests/unit/gms/test_cuda_driver.py in the same way. Memory is a memfd of which
nothing is touched: whoever holds a descriptor, a handle or a map of it holds its bytes.
"""

from __future__ import annotations

import enum
import itertools
import os
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

STEP = 2 << 20
UUID = bytes(range(16))
MAX_ADDRESSES = 1 << 47


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


class CUmemAllocationHandleType(enum.IntEnum):
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1


class CUmemAllocationType(enum.IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(enum.IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAccess_flags(enum.IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READ = 1
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class CUmemAllocationGranularity_flags(enum.IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1


@dataclass
class CUmemLocation:
    type: Any = None
    id: int = -1


@dataclass
class CUmemAllocationProp:
    type: Any = None
    location: CUmemLocation = field(default_factory=CUmemLocation)
    requestedHandleTypes: Any = None


@dataclass
class CUmemAccessDesc:
    location: CUmemLocation = field(default_factory=CUmemLocation)
    flags: Any = None


class Refused(Exception):
    def __init__(self, status: CUresult) -> None:
        self.status = status


@dataclass(eq=False)
class Handle:
    fd: int
    size: int
    is_live: bool = True


@dataclass
class Shown:
    handle_fd: int
    size: int
    access: Any = None


def answers(function: Any) -> Any:
    """As the bindings do: a tuple that begins with the status, never an exception."""

    def wrapped(self: FakeCudaDriver, *arguments: Any) -> tuple[Any, ...]:
        try:
            if not self.is_initialised and function.__name__ != "cuInit":
                raise Refused(CUresult.CUDA_ERROR_NOT_INITIALIZED)
            value = function(self, *arguments)
        except Refused as refused:
            return (refused.status, None)
        return (CUresult.CUDA_SUCCESS,) if value is None else (CUresult.CUDA_SUCCESS, value)

    wrapped.__name__ = function.__name__
    return wrapped


class FakeCudaDriver:
    CUresult = CUresult
    CUmemAllocationHandleType = CUmemAllocationHandleType
    CUmemAllocationType = CUmemAllocationType
    CUmemLocationType = CUmemLocationType
    CUmemAccess_flags = CUmemAccess_flags
    CUmemAllocationGranularity_flags = CUmemAllocationGranularity_flags
    CUmemAllocationProp = CUmemAllocationProp
    CUmemAccessDesc = CUmemAccessDesc

    def __init__(self, memory: int = 80 << 30) -> None:
        self.memory = memory
        self.is_initialised = False
        self.contexts = 0
        self.is_busy = False
        """Kernels that were launched and not waited for touch everything that is mapped."""
        self.faults = 0
        self._stacks = threading.local()
        self._handles: list[Handle] = []
        self._reserved: dict[int, int] = {}
        self._shown: dict[int, Shown] = {}
        self._next = itertools.count(1)
        self._top = 0x7F00_0000_0000

    @property
    def live_handles(self) -> int:
        return sum(handle.is_live for handle in self._handles)

    @property
    def reserved_bytes(self) -> int:
        return sum(self._reserved.values())

    def access(self, address: int) -> Any:
        """Of the map that begins there."""
        return self._shown[address].access

    def used_bytes(self) -> int:
        """Of allocations of which anybody has a descriptor, handle or map."""
        held = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                if "/memfd:cuda" in os.readlink(f"/proc/self/fd/{name}"):
                    about = os.stat(f"/proc/self/fd/{name}")
                    held[about.st_ino] = about.st_size
            except FileNotFoundError:
                continue  # the directory's own
        return sum(held.values())

    @answers
    def cuInit(self, flags: int) -> None:
        self.is_initialised = True

    @answers
    def cuDeviceGetCount(self) -> int:
        return 1

    @answers
    def cuDeviceGet(self, index: int) -> int:
        if index:
            raise Refused(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return index

    @answers
    def cuDeviceGetUuid(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(bytes=UUID)

    @answers
    def cuDevicePrimaryCtxRetain(self, device: int) -> str:
        self.contexts += 1
        return "primary"

    @answers
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        if not self.contexts:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.contexts -= 1

    def _stack(self) -> list[Any]:
        if not hasattr(self._stacks, "one"):
            self._stacks.one = []
        stack: list[Any] = self._stacks.one
        return stack

    @answers
    def cuCtxPushCurrent(self, context: Any) -> None:
        if context != "primary" or not self.contexts:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._stack().append(context)

    @answers
    def cuCtxPopCurrent(self) -> Any:
        if not self._stack():
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self._stack().pop()

    @answers
    def cuCtxSynchronize(self) -> None:
        if not self._stack():
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        if self.faults:
            raise Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        self.is_busy = False

    @answers
    def cuMemGetAllocationGranularity(self, properties: CUmemAllocationProp, option: Any) -> int:
        self._check_properties(properties)
        return STEP

    @answers
    def cuMemCreate(self, size: int, properties: CUmemAllocationProp, flags: int) -> Handle:
        self._check_properties(properties)
        if size <= 0 or size % STEP:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if self.used_bytes() + size > self.memory:
            raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        fd = os.memfd_create(f"cuda{next(self._next)}")
        os.ftruncate(fd, size)
        return self._handle(fd)

    @answers
    def cuMemRelease(self, handle: Handle) -> None:
        if not handle.is_live:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        handle.is_live = False
        os.close(handle.fd)

    @answers
    def cuMemExportToShareableHandle(self, handle: Handle, kind: Any, flags: int) -> int:
        if not handle.is_live or kind != CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        fd = os.dup(handle.fd)
        os.set_inheritable(fd, True)
        return fd

    @answers
    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> Handle:
        try:
            is_ours = "/memfd:cuda" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            is_ours = False
        if not is_ours:
            raise Refused(CUresult.CUDA_ERROR_UNKNOWN)
        return self._handle(os.dup(fd))

    @answers
    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> int:
        if size <= 0 or size % STEP:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if self.reserved_bytes + size >= MAX_ADDRESSES:
            raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        self._top -= size
        self._reserved[self._top] = size
        return self._top

    @answers
    def cuMemAddressFree(self, address: int, size: int) -> None:
        if self._reserved.get(address) != size or self._overlapping(address, size):
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        del self._reserved[address]

    @answers
    def cuMemMap(self, address: int, size: int, offset: int, handle: Handle, flags: int) -> None:
        """A map may pass from one reservation into the next: only its addresses must be reserved."""
        covered = sum(
            max(0, min(address + size, start + length) - max(address, start))
            for start, length in self._reserved.items()
        )
        if size <= 0 or address % STEP or covered == 0 or self._overlapping(address, size) or not handle.is_live:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if offset or size != handle.size:
            raise Refused(CUresult.CUDA_ERROR_NOT_SUPPORTED)
        if covered != size:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        self._shown[address] = Shown(os.dup(handle.fd), size)

    @answers
    def cuMemUnmap(self, address: int, size: int) -> None:
        """Of what isn't mapped it says nothing."""
        found = self._overlapping(address, size)
        if any(start < address or start + shown.size > address + size for start, shown in found.items()):
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if found and self.is_busy:
            self.faults += 1
        for start, shown in found.items():
            os.close(shown.handle_fd)
            del self._shown[start]

    @answers
    def cuMemSetAccess(self, address: int, size: int, accesses: list[CUmemAccessDesc], count: int) -> None:
        found = self._overlapping(address, size)
        inside = sum(
            shown.size for start, shown in found.items() if address <= start and start + shown.size <= address + size
        )
        if inside != size or (count, len(accesses)) != (1, 1) or accesses[0].location.id != 0:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        for shown in found.values():
            shown.access = accesses[0].flags

    def _handle(self, fd: int) -> Handle:
        self._handles.append(Handle(fd, os.fstat(fd).st_size))
        return self._handles[-1]

    def _overlapping(self, address: int, size: int) -> dict[int, Shown]:
        end = address + size
        return {start: one for start, one in self._shown.items() if start < end and address < start + one.size}

    def _check_properties(self, properties: CUmemAllocationProp) -> None:
        wanted = (
            CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED,
            CUmemLocation(CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 0),
        )
        if (properties.type, properties.location) != wanted:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
