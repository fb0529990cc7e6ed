"""A GPU's memory behind the VMM interface, over a simulated driver: contexts, waiting, what it leaves on errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from cuda_devices import driver_of
from fakes.cuda_driver import CUmemAccess_flags, CUresult, FakeCudaDriver

from dynamo_box.gms.vmm import CudaVmm, Mapping, VmmError, VmmOutOfMemory

STEP = 2 << 20


@pytest.fixture
def driver() -> FakeCudaDriver:
    driver, _ = driver_of("simulated")
    assert isinstance(driver, FakeCudaDriver)
    return driver


@pytest.fixture
def vmm(driver: FakeCudaDriver) -> Iterator[CudaVmm]:
    vmm = CudaVmm(driver, driver_of("simulated")[1])
    yield vmm
    vmm.close()
    assert (driver.live_handles, driver.contexts, driver.reserved_bytes) == (0, 0, 0)


@pytest.fixture
def fd(vmm: CudaVmm) -> Iterator[int]:
    fd = vmm.create(STEP, "test")
    yield fd
    os.close(fd)


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(driver: FakeCudaDriver) -> None:
    with pytest.raises(VmmError, match=r"no GPU GPU-x: the driver shows GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"):
        CudaVmm(driver, "GPU-x")


def test_only_who_maps_has_a_context_and_one_is_enough(vmm: CudaVmm, driver: FakeCudaDriver, fd: int) -> None:
    address = vmm.reserve(4 * STEP)
    os.close(vmm.readonly(fd))
    assert driver.contexts == 0
    for number in range(3):
        vmm.map(address + number * STEP, STEP, fd)
    vmm.unmap(address, 2 * STEP)
    assert driver.contexts == 1
    vmm.close()
    vmm.close()
    assert driver.contexts == 0


def test_a_thread_gets_its_own_current_context_back(vmm: CudaVmm, driver: FakeCudaDriver, fd: int) -> None:
    addresses = [vmm.reserve(STEP) for _ in range(4)]
    refused: list[tuple[object, ...]] = []

    def use(address: int) -> None:
        for _ in range(20):
            vmm.map(address, STEP, fd)
            vmm.unmap(address, STEP)
        refused.append(driver.cuCtxPopCurrent())

    threads = [threading.Thread(target=use, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [(CUresult.CUDA_ERROR_INVALID_CONTEXT, None)] * len(threads)


@pytest.mark.parametrize("end", [lambda vmm, at: vmm.unmap(at, STEP), lambda vmm, at: vmm.close()])
def test_work_under_way_is_waited_for(
    vmm: CudaVmm, driver: FakeCudaDriver, fd: int, end: Callable[[CudaVmm, int], None]
) -> None:
    address = vmm.reserve(STEP)
    vmm.map(address, STEP, fd)
    driver.is_busy = True
    end(vmm, address)
    assert driver.faults == 0


def test_after_a_fault_it_is_said_that_this_process_is_done(vmm: CudaVmm, driver: FakeCudaDriver, fd: int) -> None:
    address = vmm.reserve(STEP)
    driver.faults = 1
    with pytest.raises(VmmError, match=r"nothing more can be done in this process: CUDA_ERROR_ILLEGAL_ADDRESS"):
        vmm.map(address, STEP, fd)
    driver.faults = 0


def test_readers_may_read_and_writers_write(vmm: CudaVmm, driver: FakeCudaDriver, fd: int) -> None:
    address = vmm.reserve(2 * STEP)
    vmm.map_all([Mapping(address, STEP, fd), Mapping(address + STEP, STEP, fd, writable=True)])
    assert driver.access(address) == CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    assert driver.access(address + STEP) == CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess", "cuCtxSynchronize", "cuCtxPushCurrent"]
)
def test_whatever_is_refused_leaves_nothing_mapped(
    vmm: CudaVmm, driver: FakeCudaDriver, fd: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = vmm.reserve(3 * STEP)
    wanted = [Mapping(address + number * STEP, STEP, fd) for number in range(3)]
    real, times = getattr(driver, call), {"cuCtxSynchronize": 1, "cuCtxPushCurrent": 1}.get(call, 3)
    calls = 0

    def last_is_refused(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None) if calls == times else real(*arguments)

    monkeypatch.setattr(driver, call, last_is_refused)
    with pytest.raises(VmmOutOfMemory):
        vmm.map_all(wanted)
    assert (vmm.mapped_bytes, driver.live_handles) == (0, 0)
    vmm.map_all(wanted)


def test_memory_is_given_back_when_its_last_descriptor_and_map_are_gone(vmm: CudaVmm, driver: FakeCudaDriver) -> None:
    fd = vmm.create(3 * STEP, "test")
    address = vmm.reserve(3 * STEP)
    vmm.map(address, 3 * STEP, fd)
    os.close(fd)
    assert driver.used_bytes() == 3 * STEP
    vmm.unmap(address, 3 * STEP)
    assert driver.used_bytes() == 0


def test_an_export_that_is_refused_gives_the_memory_back(
    vmm: CudaVmm, driver: FakeCudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = (CUresult.CUDA_ERROR_INVALID_VALUE, None)
    monkeypatch.setattr(driver, "cuMemExportToShareableHandle", lambda *arguments: refusal)
    with pytest.raises(VmmError, match="no 2097152 bytes for test"):
        vmm.create(STEP, "test")
    assert driver.used_bytes() == 0
