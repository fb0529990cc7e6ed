"""What a driver refuses and lets pass: the simulation and, with `-m gpu`, a real one are held to the same table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cuda_devices import DRIVERS, done, driver_of

STEP = 2 << 20
INVALID, UNSUPPORTED, UNKNOWN, FULL, FINE = (
    "CUDA_ERROR_INVALID_VALUE",
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_UNKNOWN",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA_SUCCESS",
)

Calls = list[tuple[str, str, Callable[[], str]]]


class Raw:
    """The driver's calls with one status as their answer, the first that isn't success."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self.properties = driver.CUmemAllocationProp()
        self.properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = 0
        self.properties.requestedHandleTypes = self.kind

    def create(self, size: int) -> str:
        status, handle = self.driver.cuMemCreate(size, self.properties, 0)
        if status.name == FINE:
            done(self.driver.cuMemRelease(handle))
        return str(status.name)

    def export(self, size: int) -> int:
        handle = done(self.driver.cuMemCreate(size, self.properties, 0))
        fd = int(done(self.driver.cuMemExportToShareableHandle(handle, self.kind, 0)))
        done(self.driver.cuMemRelease(handle))
        return fd

    def load(self, fd: int) -> str:
        status, handle = self.driver.cuMemImportFromShareableHandle(fd, self.kind)
        if status.name == FINE:
            done(self.driver.cuMemRelease(handle))
        return str(status.name)

    def map(self, address: int, size: int, fd: int, offset: int = 0) -> str:
        handle = done(self.driver.cuMemImportFromShareableHandle(fd, self.kind))
        (status,) = self.driver.cuMemMap(address, size, offset, handle, 0)[:1]
        done(self.driver.cuMemRelease(handle))
        return str(status.name)

    def reserve(self, size: int) -> str:
        status, address = self.driver.cuMemAddressReserve(size, 0, 0, 0)
        if status.name == FINE:
            done(self.driver.cuMemAddressFree(address, size))
        return str(status.name)

    def unmap(self, address: int, size: int) -> str:
        return str(self.driver.cuMemUnmap(address, size)[0].name)

    def release(self, address: int, size: int) -> str:
        return str(self.driver.cuMemAddressFree(address, size)[0].name)

    def access(self, address: int, size: int) -> str:
        access = self.driver.CUmemAccessDesc()
        access.location.type = self.driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = 0
        access.flags = self.driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        return str(self.driver.cuMemSetAccess(address, size, [access], 1)[0].name)


@pytest.fixture(params=DRIVERS)
def raw(request: pytest.FixtureRequest) -> Iterator[Raw]:
    """Without a context: none of these calls needs one."""
    driver, _ = driver_of(request.param)
    done(driver.cuInit(0))
    yield Raw(driver)


def test_what_it_says(raw: Raw) -> None:
    with contextlib.ExitStack() as closing:
        fd, small = raw.export(2 * STEP), raw.export(STEP)
        for each in (fd, small, memfd := os.memfd_create("none"), null := os.open("/dev/null", os.O_RDWR)):
            closing.callback(os.close, each)
        at = int(done(raw.driver.cuMemAddressReserve(8 * STEP, 0, 0, 0)))
        assert at % STEP == 0
        free: Calls = [
            ("map from the second step", UNSUPPORTED, lambda: raw.map(at, STEP, fd, offset=STEP)),
            ("map a size off the granularity", UNSUPPORTED, lambda: raw.map(at, STEP + 4096, fd)),
            ("map at an address off the granularity", INVALID, lambda: raw.map(at + 4096, 2 * STEP, fd)),
            ("map nothing", INVALID, lambda: raw.map(at, 0, fd)),
            ("map a part", UNSUPPORTED, lambda: raw.map(at, STEP, fd)),
            ("map more than there is", UNSUPPORTED, lambda: raw.map(at, 4 * STEP, fd)),
            ("map outside of any reservation", INVALID, lambda: raw.map(at + (1 << 40), 2 * STEP, fd)),
            ("import no descriptor", UNKNOWN, lambda: raw.load(9999)),
            ("import a device", UNKNOWN, lambda: raw.load(null)),
            ("import a memory file", UNKNOWN, lambda: raw.load(memfd)),
            ("unmap what isn't mapped", FINE, lambda: raw.unmap(at, 2 * STEP)),
            ("make a page", INVALID, lambda: raw.create(4096)),
            ("make nothing", INVALID, lambda: raw.create(0)),
            ("make more than there is", FULL, lambda: raw.create(1 << 40)),
            ("reserve a byte less than a step", INVALID, lambda: raw.reserve(STEP - 1)),
            ("reserve a page", INVALID, lambda: raw.reserve(4096)),
            ("reserve everything", FULL, lambda: raw.reserve(1 << 47)),
            ("reserve much", FINE, lambda: raw.reserve(1 << 44)),
            ("release a part", INVALID, lambda: raw.release(at, 2 * STEP)),
            ("release from the middle", INVALID, lambda: raw.release(at + STEP, 7 * STEP)),
            ("map", FINE, lambda: raw.map(at, 2 * STEP, fd)),
            ("map the next", FINE, lambda: raw.map(at + 2 * STEP, STEP, small)),
            ("map over it", INVALID, lambda: raw.map(at, 2 * STEP, fd)),
            ("map over half of it", INVALID, lambda: raw.map(at + STEP, 2 * STEP, fd)),
            ("unmap its first half", INVALID, lambda: raw.unmap(at, STEP)),
            ("unmap its second half", INVALID, lambda: raw.unmap(at + STEP, STEP)),
            ("unmap half of it and the next", INVALID, lambda: raw.unmap(at + STEP, 2 * STEP)),
            ("access to both and a hole", INVALID, lambda: raw.access(at, 4 * STEP)),
            ("access to half of it", INVALID, lambda: raw.access(at, STEP)),
            ("access to both", FINE, lambda: raw.access(at, 3 * STEP)),
            ("release what is mapped", INVALID, lambda: raw.release(at, 8 * STEP)),
            ("unmap both and a hole", FINE, lambda: raw.unmap(at, 4 * STEP)),
            ("map again", FINE, lambda: raw.map(at, 2 * STEP, fd)),
            ("map the next again", FINE, lambda: raw.map(at + 2 * STEP, STEP, small)),
            ("map it elsewhere too", FINE, lambda: raw.map(at + 4 * STEP, 2 * STEP, fd)),
            ("unmap two that adjoin", FINE, lambda: raw.unmap(at, 3 * STEP)),
            ("unmap them again", FINE, lambda: raw.unmap(at, 3 * STEP)),
            ("unmap the other", FINE, lambda: raw.unmap(at + 4 * STEP, 2 * STEP)),
            ("release", FINE, lambda: raw.release(at, 8 * STEP)),
            ("release again", INVALID, lambda: raw.release(at, 8 * STEP)),
            ("map what was released", INVALID, lambda: raw.map(at, 2 * STEP, fd)),
        ]
        told = [(what, call()) for what, _, call in free]
    assert told == [(what, expected) for what, expected, _ in free]
