"""Weight memory of an NVIDIA GPU: the driver's virtual memory management, through cuda-python.

Physical memory is made for export as a descriptor, which alone keeps it: no handle of the driver outlives the call that
got it. Whoever makes memory, or holds and passes on its descriptor, needs no CUDA context, which would take 0.5 GiB of
the device; the first map gets the device's primary one, shared with torch in an engine, and `close` gives it back.

Maps and unmaps are waited for. Work that was started before an unmap may still touch the addresses, which ends the
process with Xid 31; and a map right after an unmap elsewhere may find its memory not yet free.

Nothing is sealed, since the driver has no such thing. A reader's map can't be written to through it: a kernel that
tries fails, and with it everything else that this process wants of the GPU; the bytes, and other processes, stay as
they were.

Entering a map takes about 50 µs beside 150 µs a GiB: allocations should be few and large. (16 GiB on an H100, with
import and access: 1 ms as one allocation, 6 as 64, 43 as 512, 610 as 8,192.)
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from dynamo_box.gms.vmm.base import Addresses, Mapping, VmmError, VmmOutOfMemory, check_offset


class CudaVmm:
    """See `Vmm`. Safe to use from several threads. `driver` is the module `cuda.bindings.driver`; `device` a UUID as
    NVML and `CUDA_VISIBLE_DEVICES` write it. `close` it in the process that made it.

    Raises:
        VmmError: the driver can't be used, or shows no such GPU.
    """

    def __init__(self, driver: Any, device: str) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._context: Any = None
        self._call("the driver can't be used", driver.cuInit, 0)
        self._device = self._find(device)
        self._granularity = int(
            self._call(
                "the granularity can't be told",
                driver.cuMemGetAllocationGranularity,
                self._properties(),
                driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            )
        )
        self._addresses = Addresses(self._granularity)

    @property
    def granularity(self) -> int:
        return self._granularity

    @property
    def mapped_bytes(self) -> int:
        with self._lock:
            return self._addresses.mapped_bytes

    def create(self, size: int, name: str) -> int:
        """Zero, as the driver hands out all memory, lest one process read another's."""
        self._addresses.check_aligned(size)
        what = f"no {size} bytes for {name}"
        handle = self._call(what, self._driver.cuMemCreate, size, self._properties(), 0)
        try:
            fd = int(self._call(what, self._driver.cuMemExportToShareableHandle, handle, self._handle_type, 0))
        finally:
            self._call(what, self._driver.cuMemRelease, handle)
        os.set_inheritable(fd, False)
        return fd

    def reserve(self, size: int) -> int:
        self._addresses.check_aligned(size)
        what = f"no {size} bytes of addresses"
        address = int(self._call(what, self._driver.cuMemAddressReserve, size, self._granularity, 0, 0))
        with self._lock:
            self._addresses.reserved[address] = size
        return address

    def map(self, address: int, size: int, fd: int, offset: int = 0, writable: bool = False) -> None:
        check_offset(offset)
        self.map_all([Mapping(address, size, fd, writable)])

    def map_all(self, mappings: Sequence[Mapping]) -> None:
        done: list[Mapping] = []
        with self._lock, self._current_context():
            try:
                for one in mappings:
                    self._addresses.check_free(one.address, one.size)
                    self._map(one)
                    done.append(one)
                self._synchronise()
            except BaseException:
                for one in done:
                    self._unmap(one.address, one.size)
                raise

    def unmap(self, address: int, size: int) -> None:
        with self._lock:
            inside = self._addresses.check_whole(address, size)
            with self._current_context():
                self._synchronise()
                for start, length in inside.items():
                    self._unmap(start, length)

    def release(self, address: int, size: int) -> None:
        with self._lock:
            self._addresses.check_empty(address, size)
            self._release(address, size)

    def populate(self, address: int, size: int, write: bool = False) -> None:
        """All pages of a map are entered when it is made."""
        self._check_mapped(address, size)

    def advise_hugepages(self, address: int, size: int) -> None:
        """The granularity is that of a large page."""
        self._check_mapped(address, size)

    def seal(self, fd: int) -> None:
        """Nothing: see above."""

    def readonly(self, fd: int) -> int:
        try:
            return os.dup(fd)
        except OSError as error:
            raise VmmError(f"descriptor {fd} can't be copied for readers: {error.strerror}") from error

    def close(self) -> None:
        with self._lock:
            if self._addresses.mapped:
                with self._current_context():
                    self._synchronise()
                    for address, size in self._addresses.mapped:
                        self._unmap(address, size)
            for address, size in list(self._addresses.reserved.items()):
                self._release(address, size)
            if self._context is not None:
                self._context = None
                self._call("the context can't be given back", self._driver.cuDevicePrimaryCtxRelease, self._device)

    @property
    def _handle_type(self) -> Any:
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _properties(self) -> Any:
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = int(self._device)
        properties.requestedHandleTypes = self._handle_type
        return properties

    def _access(self, writable: bool) -> Any:
        driver = self._driver
        flags = driver.CUmemAccess_flags
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = int(self._device)
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        return access

    def _find(self, device: str) -> Any:
        seen = []
        for index in range(self._call("the GPUs can't be counted", self._driver.cuDeviceGetCount)):
            found = self._call(f"GPU {index} can't be opened", self._driver.cuDeviceGet, index)
            identity = self._call(f"GPU {index} has no UUID", self._driver.cuDeviceGetUuid, found)
            seen.append(f"GPU-{uuid.UUID(bytes=bytes(identity.bytes))}")
            if seen[-1] == device:
                return found
        raise VmmError(f"no GPU {device}: the driver shows {', '.join(seen) or 'none'}")

    def _map(self, one: Mapping) -> None:
        driver = self._driver
        what = f"descriptor {one.fd}, which is mapped as a whole, can't be as {one.size} bytes at {one.address:#x}"
        no_allocation = f"descriptor {one.fd} is no allocation of a GPU"
        if one.fd < 0:
            raise VmmError(no_allocation)
        handle = self._call(no_allocation, driver.cuMemImportFromShareableHandle, one.fd, self._handle_type)
        try:
            self._call(what, driver.cuMemMap, one.address, one.size, 0, handle, 0)
        finally:
            self._call(what, driver.cuMemRelease, handle)
        self._addresses.enter(one.address, one.size)
        try:
            self._call(what, driver.cuMemSetAccess, one.address, one.size, [self._access(one.writable)], 1)
        except VmmError:
            self._unmap(one.address, one.size)
            raise

    def _unmap(self, address: int, size: int) -> None:
        self._call(f"{size} bytes at {address:#x} can't be unmapped", self._driver.cuMemUnmap, address, size)
        self._addresses.leave(address)

    def _release(self, address: int, size: int) -> None:
        what = f"{size} bytes at {address:#x} can't be released"
        self._call(what, self._driver.cuMemAddressFree, address, size)
        del self._addresses.reserved[address]

    def _check_mapped(self, address: int, size: int) -> None:
        with self._lock:
            self._addresses.check_whole(address, size)

    @contextlib.contextmanager
    def _current_context(self) -> Iterator[None]:
        """The current context is a thread's own: this one's is put back afterwards."""
        if self._context is None:
            self._context = self._call("no context", self._driver.cuDevicePrimaryCtxRetain, self._device)
        self._call("the context can't be entered", self._driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            self._call("the context can't be left", self._driver.cuCtxPopCurrent)

    def _synchronise(self) -> None:
        self._call(
            "work on the GPU has failed, and nothing more can be done in this process", self._driver.cuCtxSynchronize
        )

    def _call(self, what: str, function: Any, *arguments: Any) -> Any:
        """What the driver answers.

        Raises:
            VmmOutOfMemory, VmmError: it refused; `what` begins the text.
        """
        status, *values = function(*arguments)
        if status == self._driver.CUresult.CUDA_SUCCESS:
            return values[0] if values else None
        is_full = status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        raise (VmmOutOfMemory if is_full else VmmError)(f"{what}: {status.name}")
