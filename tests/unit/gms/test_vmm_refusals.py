"""One interface over two kinds of memory, refusing the same: the host's, and a GPU's (simulated or, `-m gpu`, real)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cuda_devices import driver_of

from dynamo_box.gms.vmm import CudaVmm, HostVmm, Mapping, Vmm, VmmError, VmmOutOfMemory

STEP = 2 << 20

Create = Callable[..., int]


@pytest.fixture(params=["host", "simulated GPU", pytest.param("real GPU", marks=pytest.mark.gpu)])
def vmm(request: pytest.FixtureRequest) -> Iterator[Vmm]:
    made: HostVmm | CudaVmm
    driver: Any = None
    if request.param == "host":
        made = HostVmm()
    else:
        driver, device = driver_of(request.param.split()[0])
        made = CudaVmm(driver, device)
    before = None if request.param == "real GPU" else os.listdir("/proc/self/fd")
    yield made
    made.close()
    assert made.mapped_bytes == 0
    if before is not None:  # a real driver opens files of its own as it goes
        assert os.listdir("/proc/self/fd") == before
    if request.param == "simulated GPU":
        assert (driver.live_handles, driver.contexts, driver.reserved_bytes, driver.used_bytes()) == (0, 0, 0, 0)


@pytest.fixture
def create(vmm: Vmm) -> Iterator[Create]:
    made: list[int] = []

    def one(size: int = STEP) -> int:
        made.append(vmm.create(size, "test"))
        return made[-1]

    yield one
    for fd in made:
        os.close(fd)


def test_descriptors_do_not_reach_programs_that_are_started(vmm: Vmm, create: Create) -> None:
    fd = create()
    reader = vmm.readonly(fd)
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(reader)
    os.close(reader)
    with pytest.raises(VmmError):
        vmm.readonly(9999)


def test_a_reader_maps_what_is_sealed(vmm: Vmm, create: Create) -> None:
    fd = create(2 * STEP)
    address = vmm.reserve(2 * STEP)
    vmm.map(address, 2 * STEP, fd, writable=True)
    vmm.populate(address, 2 * STEP, write=True)
    vmm.advise_hugepages(address, 2 * STEP)
    vmm.unmap(address, 2 * STEP)
    vmm.seal(fd)
    reader = vmm.readonly(fd)
    vmm.map(address, 2 * STEP, reader)
    os.close(reader)
    vmm.populate(address, 2 * STEP)
    vmm.unmap(address, 2 * STEP)
    vmm.release(address, 2 * STEP)


def test_what_cuda_refuses_is_refused(vmm: Vmm, create: Create) -> None:
    fd, small = create(2 * STEP), create(STEP)
    address = vmm.reserve(8 * STEP)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("first byte", lambda: vmm.map(address, STEP, fd, offset=STEP)),
        ("multiples", lambda: vmm.map(address, STEP + 4096, fd)),
        ("multiples", lambda: vmm.map(address + 4096, 2 * STEP, fd)),
        ("multiples", lambda: vmm.map(address, 0, fd)),
        ("multiples", lambda: vmm.map(address, -STEP, fd)),
        ("as a whole", lambda: vmm.map(address, STEP, fd)),
        ("as a whole", lambda: vmm.map(address, 4 * STEP, fd)),
        ("one reservation", lambda: vmm.map(address - 2 * STEP, 2 * STEP, fd)),
        ("one reservation", lambda: vmm.map(address + 7 * STEP, 2 * STEP, fd)),
        ("no allocation", lambda: vmm.map(address, 2 * STEP, 9999)),
        ("mapped", lambda: vmm.unmap(address, 2 * STEP)),
        ("not mapped", lambda: vmm.populate(address, 2 * STEP)),
        ("multiples", lambda: vmm.create(4096, "test")),
        ("multiples", lambda: vmm.create(0, "test")),
        ("multiples", lambda: vmm.reserve(STEP - 1)),
        ("no reservation", lambda: vmm.release(address, 2 * STEP)),
        ("no reservation", lambda: vmm.release(address + STEP, 7 * STEP)),
    ]
    for text, call in refused:
        with pytest.raises(VmmError, match=text) if text != "mapped" else pytest.raises(VmmError):
            call()
    vmm.map(address, 2 * STEP, fd)
    vmm.map(address + 2 * STEP, STEP, small)
    while_mapped: list[Callable[[], object]] = [
        lambda: vmm.map(address, 2 * STEP, fd),
        lambda: vmm.map(address + STEP, 2 * STEP, fd),
        lambda: vmm.unmap(address, STEP),
        lambda: vmm.unmap(address + STEP, STEP),
        lambda: vmm.unmap(address + STEP, 2 * STEP),
        lambda: vmm.unmap(address, 4 * STEP),
        lambda: vmm.populate(address, 4 * STEP),
        lambda: vmm.release(address, 8 * STEP),
    ]
    for call in while_mapped:
        with pytest.raises(VmmError):
            call()
    vmm.unmap(address, 3 * STEP)  # adjoining whole ones in one call, as CUDA does
    with pytest.raises(VmmError):
        vmm.unmap(address, 3 * STEP)
    vmm.release(address, 8 * STEP)
    with pytest.raises(VmmError):
        vmm.release(address, 8 * STEP)
    with pytest.raises(VmmError, match="one reservation"):
        vmm.map(address, 2 * STEP, fd)


def test_several_maps_are_made_or_none(vmm: Vmm, create: Create) -> None:
    fds = [create() for _ in range(4)]
    address = vmm.reserve(4 * STEP)
    wanted = [Mapping(address + number * STEP, STEP, fd) for number, fd in enumerate(fds)]
    for bad in (
        Mapping(address + 3 * STEP, STEP, 9999),
        Mapping(address + 3 * STEP, STEP, -1),
        Mapping(address + 2 * STEP, STEP, fds[3]),
        Mapping(address + 4 * STEP, STEP, fds[3]),
    ):
        with pytest.raises(VmmError):
            vmm.map_all([*wanted[:3], bad])
        vmm.map_all(wanted)  # nothing was left in the way
        vmm.unmap(address, 4 * STEP)
    vmm.release(address, 4 * STEP)


def test_a_lack_shows_and_leaves_nothing(vmm: Vmm) -> None:
    for call in (
        lambda: vmm.create(2**50, "test"),
        lambda: vmm.create(2**63 - STEP, "test"),
        lambda: vmm.reserve(2**47),
    ):
        with pytest.raises(VmmOutOfMemory):
            call()


def test_addresses_stay_and_a_closed_descriptor_does_not_take_the_map_along(vmm: Vmm) -> None:
    fd = vmm.create(2 * STEP, "test")
    address = vmm.reserve(4 * STEP)
    for _ in range(20):
        vmm.map(address + STEP, 2 * STEP, fd)
        vmm.unmap(address + STEP, 2 * STEP)
    vmm.map(address + STEP, 2 * STEP, fd)
    os.close(fd)
    vmm.populate(address + STEP, 2 * STEP)
