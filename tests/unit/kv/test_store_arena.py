"""The memory of a layout: its slots, its headers, and what happens when the kernel says no."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_box.kv.store import arena as arena_module
from dynamo_box.kv.store.arena import STEP_BYTES, Arena, NoMemory, slots_in
from dynamo_box.protocol.kv import HEADER_BYTES, MODELLED, Block, KvLayout, arena_headers_bytes, header_names

PAGE = 4096
MIB = 1024 * 1024


def layout(block_bytes: int) -> KvLayout:
    return KvLayout("m", "float32", 16, block_bytes, "")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("dynbox:kv:test:x", layout(5000), 10 * MIB)
    yield made
    made.close()


def occupied(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


@pytest.mark.parametrize(
    ("capacity", "slots"),
    [(0, 0), (1, 0), (2 * PAGE - 1, 0), (2 * PAGE, 1), (65 * PAGE, 64), (66 * PAGE, 64), (67 * PAGE, 65)],
)
def test_as_many_slots_as_fit_with_their_headers(capacity: int, slots: int) -> None:
    assert slots_in(capacity, PAGE) == slots
    assert slots == 0 or arena_headers_bytes(slots) + slots * PAGE <= capacity
    assert arena_headers_bytes(slots + 1) + (slots + 1) * PAGE > capacity


def test_slots_have_memory_before_they_are_handed_out_and_the_file_keeps_its_length(arena: Arena) -> None:
    assert arena.bytes == arena.headers_bytes + arena.slots * 8192 <= 10 * MIB
    assert occupied(arena) == arena.headers_bytes
    assert arena.grow() == arena.slots == arena.backed
    assert occupied(arena) == arena.bytes == arena.backed_bytes
    assert not arena.may_grow and arena.grow() == 0
    for length in (arena.bytes - PAGE, arena.bytes + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, length)
    assert os.readlink(f"/proc/self/fd/{arena.fd}").startswith("/memfd:dynbox:kv:test:x")
    assert not os.get_inheritable(arena.fd)


def test_slots_of_a_rehearsal_count_with_their_bytes_and_have_a_header_only() -> None:
    modelled = Arena("dynbox:kv:test:m", KvLayout("m", "float16", 32, 10 * MIB, MODELLED), 512 * 1024 * MIB)
    real_slots = slots_in(512 * 1024 * MIB, 10 * MIB)
    assert (modelled.slots, modelled.bytes) == (real_slots, arena_headers_bytes(real_slots))
    while modelled.may_grow:
        modelled.grow()
    assert (modelled.backed, modelled.shortage) == (real_slots, "")
    assert modelled.backed_bytes == modelled.headers_bytes + real_slots * 10 * MIB
    assert occupied(modelled) == modelled.headers_bytes < 4 * MIB
    assert len(modelled.slot(real_slots - 1)) == 0
    modelled.write(7, 3, Block(b"d" * 16, b"", None))
    modelled.close()


def test_headers_and_slots_lie_where_the_protocol_says(arena: Arena) -> None:
    arena.grow()
    block = Block(b"d" * 16, b"p" * 16, 7)
    arena.write(3, 99, block)
    arena.slot(3)[:4] = b"data"
    header = os.pread(arena.fd, HEADER_BYTES, 3 * HEADER_BYTES)
    assert header_names(header, 99, block.digest)
    assert not header_names(header, 98, block.digest) and not header_names(header, 99, b"e" * 16)
    assert os.pread(arena.fd, 4, arena.headers_bytes + 3 * 8192) == b"data"
    assert os.pread(arena.fd, 2 * HEADER_BYTES, 2 * HEADER_BYTES)[:HEADER_BYTES] == bytes(HEADER_BYTES)
    arena.wipe(3)
    assert os.pread(arena.fd, 5 * HEADER_BYTES, 0) == bytes(5 * HEADER_BYTES)


def test_memory_comes_a_step_at_a_time() -> None:
    big = Arena("dynbox:kv:test:big", layout(16 * MIB), 200 * MIB)
    try:
        assert big.grow() == STEP_BYTES // (16 * MIB)
        assert big.backed == 4 < big.slots and big.may_grow
    finally:
        big.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_where_the_kernel_gives_no_more_there_are_fewer_slots_and_the_reason(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, most = os.posix_fallocate, arena.headers_bytes + 100 * 8192 + 1

    def short(fd: int, offset: int, length: int) -> None:
        if offset + length > most:
            raise OSError(code, os.strerror(code))
        real(fd, offset, length)

    monkeypatch.setattr(arena_module.os, "posix_fallocate", short)
    while arena.may_grow:
        arena.grow()
    assert arena.backed == 100
    assert os.strerror(code) in arena.shortage and str(arena.backed_bytes) in arena.shortage


def test_without_a_memory_file_there_is_no_arena_and_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(arena_module.os, "ftruncate", refuse)
    with pytest.raises(NoMemory, match="Cannot allocate memory"):
        Arena("dynbox:kv:test:none", layout(5000), MIB)
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not any("dynbox:kv:test:none" in str(link) for link in links)
