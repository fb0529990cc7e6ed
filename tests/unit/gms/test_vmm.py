"""Host memory behind the VMM interface: bytes shared for real, and addresses that stay."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_box.gms.vmm import HostVmm, Mapping, StillMapped, Vmm, VmmError, VmmOutOfMemory
from dynamo_box.gms.vmm.host import GRANULARITY, view

STEP = GRANULARITY
EXITS_S = 60


@pytest.fixture
def vmm() -> Iterator[HostVmm]:
    before = (len(os.listdir("/proc/self/fd")), maps())
    vmm = HostVmm()
    yield vmm
    vmm.close()
    assert vmm.mapped_bytes == 0
    assert (len(os.listdir("/proc/self/fd")), maps()) == before


def maps() -> set[str]:
    """Memory files of ours that this process maps."""
    with open("/proc/self/maps") as lines:
        return {line for line in lines if "/memfd:test" in line}


@pytest.fixture
def create(vmm: HostVmm) -> Iterator[Callable[[int], int]]:
    made: list[int] = []

    def one(size: int = STEP) -> int:
        made.append(vmm.create(size, "test"))
        return made[-1]

    yield one
    for fd in made:
        os.close(fd)


Create = Callable[..., int]


def protection(address: int) -> str:
    with open("/proc/self/maps") as lines:
        for line in lines:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return line.split()[1]
    return ""


def test_the_host_fulfils_the_interface(vmm: HostVmm) -> None:
    device: Vmm = vmm
    assert device.granularity == 2 * 1024 * 1024


def test_memory_is_there_when_it_was_created_and_is_zero(vmm: HostVmm, create: Create) -> None:
    fd = create(3 * STEP)
    assert os.fstat(fd).st_blocks * 512 == 3 * STEP
    assert not os.get_inheritable(fd)
    address = vmm.reserve(3 * STEP)
    vmm.map(address, 3 * STEP, fd)
    assert bytes(view(address, 3 * STEP)) == bytes(3 * STEP)


def test_bytes_written_by_one_process_are_read_by_another(vmm: HostVmm, create: Create) -> None:
    fd = create(2 * STEP)
    address = vmm.reserve(2 * STEP)
    vmm.map(address, 2 * STEP, fd, writable=True)
    vmm.populate(address, 2 * STEP, write=True)
    pattern = os.urandom(4096) * (2 * STEP // 4096)
    view(address, 2 * STEP, writable=True)[:] = pattern
    vmm.unmap(address, 2 * STEP)
    vmm.seal(fd)
    done = child(
        f"""
        vmm.map(address, {2 * STEP}, fd)
        vmm.populate(address, {2 * STEP})
        sys.stdout.buffer.write(view(address, {2 * STEP}))
        """,
        vmm.readonly(fd),
        2 * STEP,
    )
    assert (done.returncode, done.stdout == pattern) == (0, True), done.stderr


def child(body: str, fd: int, size: int = STEP) -> subprocess.CompletedProcess[bytes]:
    """A process that got `fd`, which is closed here, and has reserved `address`."""
    lines = "\n".join(line.strip() for line in body.splitlines())
    code = f"""
import ctypes, os, sys
from dynamo_box.gms.vmm import HostVmm, VmmError
from dynamo_box.gms.vmm.host import view
vmm, fd = HostVmm(), {fd}
address = vmm.reserve({size})
{lines}
"""
    try:
        return subprocess.run([sys.executable, "-c", code], pass_fds=[fd], capture_output=True, timeout=EXITS_S)
    finally:
        os.close(fd)


def test_a_stray_write_kills_the_process_that_made_it_and_changes_nothing(vmm: HostVmm, create: Create) -> None:
    fd = create()
    vmm.seal(fd)
    done = child(
        f"vmm.map(address, {STEP}, fd); print(view(address, 1)[0], flush=True); ctypes.memset(address, 7, 1)",
        vmm.readonly(fd),
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, b"0\n"), done.stderr
    assert os.pread(fd, STEP, 0) == bytes(STEP)


def test_a_use_after_unmap_kills_the_process_that_made_it(vmm: HostVmm, create: Create) -> None:
    done = child(
        f"vmm.map(address, {STEP}, fd); it = view(address, 1); vmm.unmap(address, {STEP}); print(flush=True); it[0]",
        os.dup(create()),
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, b"\n"), done.stderr


def test_nobody_maps_a_sealed_memfd_writable(vmm: HostVmm, create: Create) -> None:
    fd = create()
    vmm.seal(fd)
    vmm.seal(fd)  # again is no error
    address = vmm.reserve(STEP)
    with pytest.raises(VmmError, match="not permitted"):
        vmm.map(address, STEP, fd, writable=True)
    reader = vmm.readonly(fd)
    again = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)  # the same user may
    try:
        with pytest.raises(VmmError, match="not permitted"):
            vmm.map(address, STEP, again, writable=True)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        # Readers map it, and what was refused before left the reservation as it was.
        assert protection(address) == "---p"
        vmm.map(address, STEP, reader)
        assert protection(address).startswith("r--s")
    finally:
        os.close(again)
        os.close(reader)


def test_what_could_be_written_is_not_sealed(vmm: HostVmm, create: Create) -> None:
    fd = create()
    address = vmm.reserve(STEP)
    vmm.map(address, STEP, fd, writable=True)
    with pytest.raises(StillMapped):
        vmm.seal(fd)
    vmm.unmap(address, STEP)
    reader = vmm.readonly(fd)
    vmm.map(address, STEP, reader)
    os.close(reader)
    vmm.seal(fd)  # a reader is not in the way


def test_addresses_stay_across_unmap_and_remap(vmm: HostVmm, create: Create) -> None:
    fd = create(2 * STEP)
    os.pwrite(fd, b"weights", STEP)
    address = vmm.reserve(4 * STEP)
    assert address % STEP == 0
    for _ in range(50):
        vmm.map(address + STEP, 2 * STEP, fd)
        assert bytes(view(address + 2 * STEP, 7)) == b"weights"
        vmm.unmap(address + STEP, 2 * STEP)
        other = mmap.mmap(-1, 4 * STEP)  # whoever maps memory meanwhile gets other addresses
        at = ctypes.addressof(ctypes.c_char.from_buffer(other))
        assert not address <= at < address + 4 * STEP
        assert protection(address + STEP) == "---p"


def test_a_closed_descriptor_does_not_take_the_map_along(vmm: HostVmm) -> None:
    fd = vmm.create(STEP, "test")
    os.pwrite(fd, b"x", 5)
    address = vmm.reserve(STEP)
    vmm.map(address, STEP, fd)
    os.close(fd)
    assert view(address, STEP)[5] == ord("x")


def test_several_maps_are_made_or_none(vmm: HostVmm, create: Create) -> None:
    fds = [create() for _ in range(4)]
    address = vmm.reserve(4 * STEP)
    sealed = create()
    vmm.seal(sealed)
    wanted = [Mapping(address + number * STEP, STEP, fd) for number, fd in enumerate(fds)]
    for bad in (
        Mapping(address + 3 * STEP, STEP, 9999),
        Mapping(address + 3 * STEP, STEP, sealed, writable=True),
        Mapping(address + 2 * STEP, STEP, fds[3]),
        Mapping(address + 4 * STEP, STEP, fds[3]),
    ):
        with pytest.raises(VmmError):
            vmm.map_all([*wanted[:3], bad])
        assert vmm.mapped_bytes == 0
        assert maps() == set()
    vmm.map_all(wanted)
    assert vmm.mapped_bytes == 4 * STEP


def test_a_lack_of_addresses_shows_and_leaves_nothing(vmm: HostVmm) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 1024 * 1024, limits[1]))
    try:
        with pytest.raises(VmmOutOfMemory):
            vmm.reserve(512 * 1024 * 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_populated_pages_are_resident_without_being_touched(vmm: HostVmm, create: Create) -> None:
    size = 8 * STEP
    fd = create(size)
    address = vmm.reserve(size)
    vmm.map(address, size, fd)
    assert resident(address) < size // 1024
    vmm.populate(address, size)
    assert resident(address) == size // 1024


def test_populating_works_on_a_kernel_that_has_no_call_for_it(
    vmm: HostVmm, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * STEP
    fd = create(size)
    os.pwrite(fd, b"kept", STEP)
    monkeypatch.setattr("dynamo_box.gms.vmm.host._MADV_POPULATE_READ", 9999)
    monkeypatch.setattr("dynamo_box.gms.vmm.host._MADV_POPULATE_WRITE", 9999)
    address = vmm.reserve(size)
    for writable in (True, False):
        vmm.map(address, size, fd, writable=writable)
        vmm.populate(address, size, write=writable)
        assert resident(address) == size // 1024
        assert bytes(view(address + STEP, 4)) == b"kept"
        vmm.unmap(address, size)


def test_asking_for_large_pages_keeps_the_bytes(vmm: HostVmm, create: Create) -> None:
    fd = create(2 * STEP)
    os.pwrite(fd, b"kept", STEP + 1)
    address = vmm.reserve(2 * STEP)
    vmm.map(address, 2 * STEP, fd)
    vmm.advise_hugepages(address, 2 * STEP)
    assert bytes(view(address + STEP + 1, 4)) == b"kept"
    with pytest.raises(VmmError):
        vmm.advise_hugepages(address, 4 * STEP)


def resident(address: int) -> int:
    """KiB of the map at `address`."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("it is not mapped")
