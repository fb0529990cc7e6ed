"""Weight memory on a real GPU: bytes shared between processes, read-only for readers, freed when nobody holds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from box_under_test import eventually

from dynamo_box.gms.vmm import CudaVmm

pytestmark = pytest.mark.gpu

MIB = 1 << 20
GIB = 1 << 30
SIZE = 4 * GIB
SLACK = 64 * MIB
"""What the driver's own accounting moves by."""


def test_bytes_of_one_process_are_read_by_others_and_outlive_it(vmm: CudaVmm, start: Callable[..., Any]) -> None:
    fd = vmm.create(SIZE, "weights")
    writer = start(fd, SIZE, writable=True)
    assert writer.tell("read 16") == "00" * 16
    assert writer.tell("write " + "ab" * 16) == "done"
    readers = [start(vmm.readonly(fd), SIZE) for _ in range(2)]
    writer.kill()
    assert [reader.tell("read 16") for reader in readers] == ["ab" * 16] * 2
    os.close(fd)


def test_a_stray_write_ends_the_process_that_made_it_and_changes_nothing(
    vmm: CudaVmm, start: Callable[..., Any]
) -> None:
    fd = vmm.create(SIZE, "weights")
    stray, neighbour = start(fd, SIZE), start(fd, SIZE)
    assert stray.tell("write 07") == "CUDA_ERROR_INVALID_VALUE", "a copy is refused by the driver"
    assert stray.tell("poke") == "CUDA_ERROR_ILLEGAL_ADDRESS", "a kernel runs into it"
    assert stray.tell("read 1") == "CUDA_ERROR_ILLEGAL_ADDRESS", "and then that process can do nothing any more"
    assert neighbour.tell("read 1") == "00"
    os.close(fd)


def test_memory_is_the_descriptors_and_the_maps(
    vmm: CudaVmm, start: Callable[..., Any], used_bytes: Callable[[], int]
) -> None:
    before = used_bytes()
    fd = vmm.create(SIZE, "weights")
    assert SIZE <= used_bytes() - before < SIZE + SLACK, "no context, which takes 0.5 GiB"
    reader = start(fd, SIZE)
    with_reader = used_bytes()
    os.close(fd)
    assert abs(used_bytes() - with_reader) < SLACK, "the reader's map and descriptor hold it"
    reader.kill()
    eventually(lambda: used_bytes() - before < SLACK, "all of it is free again")


def test_the_last_descriptor_holds_it_after_every_unmap(
    vmm: CudaVmm, start: Callable[..., Any], used_bytes: Callable[[], int]
) -> None:
    fd = vmm.create(SIZE, "weights")
    reader = start(fd, SIZE)
    before = used_bytes()
    assert reader.tell("unmap") == "done"
    assert abs(used_bytes() - before) < SLACK
    reader.kill()
    held = used_bytes()
    os.close(fd)
    eventually(lambda: held - used_bytes() > SIZE - SLACK, "it is free")
