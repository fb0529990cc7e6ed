"""The store's memory as a worker maps it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_box.kv.client import arena as arena_module
from dynamo_box.kv.client.arena import Arena
from dynamo_box.kv.store.arena import Arena as StoreArena
from dynamo_box.protocol.kv import Attached, KvLayout

MIB = 1024 * 1024
LAYOUT = KvLayout("m", "float32", 16, 16 * MIB, "")
NAME = "dynbox:kv:test:client"


@pytest.fixture
def store() -> Iterator[StoreArena]:
    made = StoreArena(NAME, LAYOUT, 200 * MIB)
    yield made
    made.close()


def attached(store: StoreArena) -> Arena:
    return Arena(Attached(store.slots, store.stride, store.headers_bytes, store.bytes), store.fd, LAYOUT.bytes_in_slot)


def mapped_bytes() -> list[int]:
    """What of each mapping of the store's file is in the page table: the store's own one and the worker's."""
    found: list[int] = []
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if NAME in line:
            rss = next(line for line in lines if line.startswith("Rss:"))
            found.append(int(rss.split()[1]) * 1024)
    return sorted(found)


def test_what_the_store_has_memory_for_is_mapped_ahead_and_nothing_else(store: StoreArena) -> None:
    worker = attached(store)
    assert not worker.map_ahead(), "no slot has memory yet"
    for _ in range(2):
        new = store.grow()
        turns = 0
        while worker.map_ahead():
            turns += 1
        assert turns == new * 16 * MIB // arena_module.AHEAD_BYTES
        least, most = mapped_bytes()
        assert least >= store.backed * 16 * MIB and most <= store.backed_bytes
    with worker.views([0, 7]) as views:
        views[1][:4] = b"data"
    assert os.pread(store.fd, 4, store.headers_bytes + 7 * 16 * MIB) == b"data"
    assert os.fstat(store.fd).st_blocks * 512 == store.backed_bytes, "it has given the store no memory by itself"
    assert worker.close()


def test_all_of_a_small_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreArena(NAME, KvLayout("m", "float32", 16, 4096, ""), MIB)
    store.grow()
    before = os.listdir("/proc/self/fd")
    worker = Arena(Attached(store.slots, store.stride, store.headers_bytes, store.bytes), store.fd, 4096)
    monkeypatch.setattr(arena_module, "AHEAD_BYTES", 8192)
    while worker.map_ahead():
        continue
    assert not worker.map_ahead(), "there is no more"
    assert worker.close() and worker.close()
    assert os.listdir("/proc/self/fd") == before
    store.close()


def test_a_kernel_that_maps_nothing_ahead(store: StoreArena, monkeypatch: pytest.MonkeyPatch) -> None:
    store.grow()
    monkeypatch.setattr(arena_module, "populate", lambda *_: False)
    worker = attached(store)
    assert not worker.map_ahead()
    with worker.views([3]) as (view,):
        view[:4] = b"data"
    assert os.pread(store.fd, 4, store.headers_bytes + 3 * 16 * MIB) == b"data"
    assert worker.close()
