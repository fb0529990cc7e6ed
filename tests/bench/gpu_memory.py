"""What a GPU's memory costs to map, and what it takes to copy into it: the figures that a layout's shape and a host
tier's blocks have to fit.

    python tests/bench/gpu_memory.py [--gib 16] [--host-gib 4] [--rounds 5] [--json]

Needs an NVIDIA GPU and cuda-python. A layout of `--gib` is mapped and unmapped in allocations of several sizes, by the
box's own code; the plain calls of the driver are not timed apart, since it adds some 10 µs an allocation to them. Then
a memory file of `--host-gib`, as the host tier is one, is registered with the driver, and copied from and to, as a
whole and in blocks; before it is registered for comparison. Medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_devices import done, driver_of

from dynamo_box.gms.vmm import CudaVmm, Mapping

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ALLOCATIONS = (2 * MIB, 32 * MIB, 256 * MIB, GIB)
BLOCKS = (16 * KIB, 128 * KIB, 720 * KIB, 2 * MIB)
COPIES = 2000


def timed(function: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def layouts(driver: Any, device: str, total: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in ALLOCATIONS:
        vmm = CudaVmm(driver, device)
        count = total // size
        fds: list[int] = []
        made = timed(lambda: fds.extend(vmm.create(size, "bench") for _ in range(count)))  # noqa: B023
        address = vmm.reserve(total)
        wanted = [Mapping(address + number * size, size, fd) for number, fd in enumerate(fds)]
        maps, unmaps = [], []
        for _ in range(rounds + 1):
            maps.append(timed(lambda: vmm.map_all(wanted)))  # noqa: B023
            unmaps.append(timed(lambda: vmm.unmap(address, total)))  # noqa: B023
        freed = timed(lambda: [os.close(fd) for fd in fds])  # noqa: B023
        vmm.close()
        rows.append(
            {
                "allocation_mib": size // MIB,
                "allocations": count,
                "make_ms": made,
                "first_map_ms": maps[0],  # gets the context too
                "map_ms": median(maps[1:]),
                "unmap_ms": median(unmaps[1:]),
                "free_ms": freed,
            }
        )
    return rows


def copies(driver: Any, device: str, size: int, rounds: int) -> dict[str, float]:
    """GB/s, and milliseconds to register."""
    vmm = CudaVmm(driver, device)
    fd = vmm.create(size, "bench")
    at = vmm.reserve(size)
    vmm.map(at, size, fd, writable=True)
    os.close(fd)
    done(driver.cuCtxSetCurrent(done(driver.cuDevicePrimaryCtxRetain(done(driver.cuDeviceGet(0))))))
    stream = done(driver.cuStreamCreate(0))
    arena = os.memfd_create("bench")
    os.ftruncate(arena, size)
    os.posix_fallocate(arena, 0, size)
    mapped = mmap.mmap(arena, size)
    os.close(arena)
    host = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    found: dict[str, float] = {}

    def rate(name: str, amount: int, copy: Callable[[], object]) -> None:
        copy()
        found[name] = amount / median(timed(copy) for _ in range(rounds)) / 1e6

    def blocks(size_of_one: int, count: int, into: bool) -> None:
        for number in range(count):
            offset = number * size_of_one
            if into:
                done(driver.cuMemcpyHtoDAsync(at + offset, host + offset, size_of_one, stream))
            else:
                done(driver.cuMemcpyDtoHAsync(host + offset, at + offset, size_of_one, stream))
        done(driver.cuStreamSynchronize(stream))

    rate("host to device, not registered", size, lambda: blocks(size, 1, True))
    rate("device to host, not registered", size, lambda: blocks(size, 1, False))
    found["register_ms"] = timed(lambda: done(driver.cuMemHostRegister(host, size, 0)))
    rate("host to device", size, lambda: blocks(size, 1, True))
    rate("device to host", size, lambda: blocks(size, 1, False))
    for block in BLOCKS:
        count = min(COPIES, size // block)
        rate(f"host to device, {block // KIB} KiB each", block * count, lambda: blocks(block, count, True))  # noqa: B023
        rate(f"device to host, {block // KIB} KiB each", block * count, lambda: blocks(block, count, False))  # noqa: B023
    found["unregister_ms"] = timed(lambda: done(driver.cuMemHostUnregister(host)))
    vmm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=int, default=16)
    parser.add_argument("--host-gib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        driver, device = driver_of("real")
    except pytest.skip.Exception as reason:
        sys.exit(f"gpu_memory.py: {reason}")
    rows = layouts(driver, device, options.gib * GIB, options.rounds)
    rates = copies(driver, device, options.host_gib * GIB, options.rounds)
    if options.json:
        print(json.dumps({"layouts": rows, "copies": rates}))
        return
    print(f"{options.gib} GiB   " + "  ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("         " + "  ".join(f"{value:14.2f}" for value in row.values()))
    for name, value in rates.items():
        print(f"{name:40} {value:8.1f}")


if __name__ == "__main__":
    main()
