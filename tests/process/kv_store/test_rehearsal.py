"""Tiers of a rehearsal: all that is said of blocks is real, and there is nothing in them, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from store_peers import LAYOUT, MIB, Store, Worker, chain, digest
from store_router import Router

from dynamo_box.protocol import PROTOCOL_VERSION, kv
from dynamo_box.protocol.spec import TierRehearsal

GIB = 1024 * MIB
MODELLED = kv.KvLayout("sha256:m", "float16", 32, 10 * MIB, kv.MODELLED)
LIMITS = ("prlimit", f"--as={2 * GIB}", f"--fsize={64 * MIB}")
"""What a small machine gives: a two-hundredth of what the tier says it has."""

MakeStore = Callable[..., Store]


@pytest.fixture
def make_rehearsal(make_store: MakeStore) -> MakeStore:
    """`host` and `disk` are in blocks, with their headers."""

    def make(host: int, disk: int, *, bytes_per_s: float = 1e15, **changes: Any) -> Store:
        sizes = {"host_bytes": kv.arena_headers_bytes(host) + host * 10 * MIB, "disk_bytes": disk * (10 * MIB + 4096)}
        rates = TierRehearsal(disk_read_bytes_per_s=bytes_per_s, disk_write_bytes_per_s=bytes_per_s)
        return make_store(**sizes, rehearsal=rates, **changes)

    return make


def put(worker: Worker, *blocks: kv.Block) -> None:
    slots = worker.reserve(*blocks)
    assert min(slots) >= 0, slots
    assert not worker.commit(*slots).lost


def memory_files(store: Store) -> int:
    """Bytes that the arenas take."""
    fds = f"/proc/{store.process.pid}/fd"
    links = [f"{fds}/{fd}" for fd in os.listdir(fds)]
    found = [os.stat(link) for link in links if "memfd:dynbox:kv" in os.readlink(link)]
    return sum({one.st_ino: one.st_blocks * 512 for one in found}.values())


def test_a_small_machine_has_tiers_of_half_a_tebibyte(make_rehearsal: MakeStore) -> None:
    store = make_rehearsal(52_000, 1_000_000)
    store.kill()
    store.start(LIMITS)
    worker, router = store.worker(layout=MODELLED), Router(store)
    assert (worker.attached.slots, worker.attached.slot_bytes) == (52_000, 0)
    assert worker.attached.arena_bytes == kv.arena_headers_bytes(52_000) < 4 * MIB
    for first in range(0, 4096, 1024):
        put(worker, *chain(*range(first, first + 1024), after=first - 1 if first else None))
    figures = store.figures_when(lambda now: now.disk.blocks == 4096 and not now.disk.queued)
    assert figures.simulated and figures.directory == ""
    assert (figures.host.state, figures.disk.state, figures.disk.reason) == ("on", "on", "")
    assert figures.host.used_bytes == figures.host.in_bytes == figures.disk.in_bytes == 40 * GIB
    assert figures.host.capacity_bytes == store.spec.host_bytes
    assert memory_files(store) < 4 * MIB
    router.take_until(lambda: router.index.blocks("kvstore", "g2") == router.index.blocks("kvstore", "g3") == 4096)
    assert worker.found(*range(4096)) == "2" * 4096

    store.set("clear", "g2")
    found = worker.find(*range(64))
    assert found.tiers == "3" * 64
    loaded = worker.load(found.lease, 0, 64)
    assert not loaded.error
    for number, slot, generation in zip(range(64), loaded.slots, loaded.generations, strict=True):
        assert kv.header_names(worker.header(slot), generation, digest(number))
    assert store.figures_when(lambda now: now.disk.out_blocks == 64).disk.out_bytes == 640 * MIB


def test_what_is_full_evicts_by_priority_and_age_and_a_new_life_begins_empty(make_rehearsal: MakeStore) -> None:
    store = make_rehearsal(2, 4)
    worker = store.worker(layout=MODELLED)
    for number in range(6):
        put(worker, *chain(number, priority=90 if number == 0 else None))
        store.figures_when(lambda now, number=number: now.disk.in_blocks == number + 1)
    assert [worker.found(number) for number in range(6)] == ["2", "", "", "3", "3", "2"], "the first is worth most"
    figures = store.figures_when(lambda now: now.disk.blocks == 4)
    assert (figures.host.evicted, figures.disk.evicted) == (4, 2)
    (said,) = store.notes
    assert "nothing is written, and it begins empty" in said
    store.kill()
    store.start()
    assert store.worker(layout=MODELLED).found(0) == ""


def test_a_disk_takes_its_time_and_a_worker_need_not_wait_for_it(make_rehearsal: MakeStore) -> None:
    """One block an hour: nothing of it is there before the end of the test, and nothing waits for that."""
    store = make_rehearsal(8, 8, bytes_per_s=10 * MIB / 3600)
    worker = store.worker(layout=MODELLED)
    put(worker, *chain(1, 2, 3))
    figures = store.figures_when(lambda now: now.disk.queued == 3)
    assert (figures.disk.blocks, worker.found(1, 2, 3)) == (0, "222")
    assert store.set("clear", "all").text == "3 blocks gone from host memory; 0 blocks gone from disk"


def test_real_blocks_and_those_of_a_rehearsal_are_kept_apart(make_store: MakeStore, make_rehearsal: MakeStore) -> None:
    pretended = Worker(make_rehearsal(2, 2)).refusal(kv.Attach(PROTOCOL_VERSION, "w1", LAYOUT))
    assert pretended == kv.Refused("these KV tiers are those of a rehearsal: they take no real blocks", True)
    real = Worker(make_store()).refusal(kv.Attach(PROTOCOL_VERSION, "w1", MODELLED))
    assert real == kv.Refused("these KV tiers are those of no rehearsal: they take no modelled blocks", True)
