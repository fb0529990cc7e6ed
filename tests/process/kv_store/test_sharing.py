"""Workers share blocks through the store: byte for byte, only what is complete, and only what is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from store_peers import BLOCK_BYTES, DEADLINE_S, LAYOUT, MIB, Store, Worker, chain, content, digest, room_for
from store_router import Router

from dynamo_box.protocol import kv

MakeStore = Callable[..., Store]


def test_a_block_of_one_worker_is_read_by_another_byte_for_byte_once_it_is_committed(store: Store) -> None:
    one, other = store.worker("w1"), store.worker("w2")
    assert one.attached == other.attached and one.attached.slots > 10
    slots = one.reserve(*chain(1, 2, 3))
    assert sorted(set(slots)) == sorted(slots) and min(slots) >= 0
    for slot, number in zip(slots, (1, 2, 3), strict=True):
        one.fill(slot, content(number))
    assert other.found(1, 2, 3) == ""
    assert other.reserve(*chain(1, 2)) == (kv.BUSY, kv.BUSY)
    assert other.commit(*slots).lost == slots
    committed = one.commit(*slots[:2])
    assert not committed.lost and len(set(committed.generations)) == 2

    found = other.find(1, 2, 3)
    assert (found.tiers, found.slots, found.generations) == ("22", slots[:2], committed.generations)
    for number, slot, generation in zip((1, 2), found.slots, found.generations, strict=True):
        assert other.read(slot) == content(number)[:BLOCK_BYTES]
        assert kv.header_names(other.header(slot), generation, digest(number))
    other.send(kv.Release(found.lease, loaded={"g2": 2}))
    assert other.reserve(*chain(1, 2, 3, 4))[:3] == (kv.KNOWN, kv.KNOWN, kv.BUSY)

    figures = store.figures_when(lambda now: now.host.out_blocks == 2 and now.layouts[0].host_writing == 2)
    assert (figures.host.in_blocks, figures.host.in_bytes) == (2, 2 * BLOCK_BYTES)
    assert (figures.host.lookups, figures.host.hits, figures.leases) == (6, 2, 0)
    (layout,) = figures.layouts
    assert (layout.name, layout.owners, layout.host_blocks) == (LAYOUT.name, ("w1", "w2"), 2)
    one.send(kv.Abandon(slots[2:]))
    assert other.reserve(*chain(3))[0] >= 0


def test_workers_whose_kv_differs_in_anything_share_nothing(make_store: MakeStore) -> None:
    values = {"fingerprint": "m2", "kv_dtype": "f", "block_size": 32, "block_bytes": 2 * BLOCK_BYTES, "shape": "s"}
    store = make_store(layouts=1 + len(values))
    one = store.worker("w1")
    one.store(*chain(1, 2))
    for field, value in values.items():
        other = store.worker(field, msgspec.structs.replace(LAYOUT, **{field: value}))
        assert other.found(1, 2) == ""
        other.store(*chain(1, 2))
    assert one.found(1, 2) == "22"
    assert one.found(1, 3, 2) == "2"
    figures = store.figures_when(lambda now: now.host.blocks == 12)
    assert len({layout.name for layout in figures.layouts}) == 6


def test_a_slot_that_is_given_to_another_block_stops_saying_what_was_in_it(make_store: MakeStore) -> None:
    store = make_store(host_bytes=room_for(1))
    one, other = store.worker("w1"), store.worker("w2")
    assert one.attached.slots == 1
    one.store(*chain(1))
    found = other.find(1)
    assert one.reserve(*chain(2)) == (kv.FULL,)
    other.send(kv.Release(found.lease))
    assert other.found(1) == "2"
    assert one.reserve(*chain(2)) == (0,)
    assert not kv.header_names(other.header(0), found.generations[0], digest(1))
    assert other.header(0) == bytes(kv.HEADER_BYTES)
    (generation,) = one.commit(0).generations
    assert kv.header_names(other.header(0), generation, digest(2))
    figures = store.figures_when(lambda now: now.host.evicted == 1)
    assert figures.host.dropped == {"store_full": 1}


def test_a_header_with_a_flipped_bit_is_no_block_s_and_what_is_doubted_is_forgotten(store: Store) -> None:
    one, other = store.worker("w1"), store.worker("w2")
    (slot,) = one.store(*chain(1))
    found = other.find(1)
    header = other.header(slot)
    used = 8 + 8 + 16 + 16 + 1 + 3 + 4
    for bit in range(used * 8):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not kv.header_names(bytes(flipped), found.generations[0], digest(1)), bit
    assert one.arena is not None
    one.arena[slot * kv.HEADER_BYTES] ^= 1
    assert not kv.header_names(other.header(slot), found.generations[0], digest(1))
    other.send(kv.Distrust((slot,)))
    assert other.found(1) == ""
    (again,) = one.reserve(*chain(1))
    assert again not in (slot, kv.KNOWN), "somebody still holds a lease on that slot"
    one.commit(again)
    other.send(kv.Release(found.lease, failed={"g2": 1}))
    assert other.found(1) == "2"
    store.figures_when(lambda now: now.host.failed == 1)


def test_what_goes_is_of_the_lowest_priority_and_then_what_was_used_least_recently(make_store: MakeStore) -> None:
    worker = make_store(host_bytes=room_for(4)).worker()
    assert worker.attached.slots == 4
    worker.store(*chain(1, priority=90))
    worker.store(*chain(2))
    worker.store(*chain(3, priority=20))
    worker.store(*chain(4, priority=35))
    assert worker.find(2).priorities == (None,)  # and it stays leased for now
    assert worker.reserve(*chain(3, priority=95)) == (kv.KNOWN,)
    assert worker.find(3).priorities == (95,)
    went = []
    there = {1, 2, 3, 4}
    for new in (11, 12):
        worker.store(*chain(new, priority=100))
        now = {number for number in there if worker.found(number)}
        went += there - now
        there = now
    assert went == [4, 1]
    assert worker.reserve(*chain(13, 14, 15))[2] == kv.FULL


@pytest.mark.parametrize("host_bytes", [0, room_for(1) - 1])
def test_where_not_a_single_block_fits_workers_are_told_so(make_store: MakeStore, host_bytes: int) -> None:
    store = make_store(host_bytes=host_bytes)
    worker = store.worker()
    assert worker.attached.slots == 0
    assert worker.found(1) == ""
    assert worker.reserve(*chain(1)) == (kv.FULL,)
    figures = store.figures_when(lambda now: bool(now.layouts))
    assert figures.host.state == "off"
    assert bool(figures.host.reason) == bool(host_bytes)


def test_killed_workers_give_back_what_they_wrote_and_leased(store: Store) -> None:
    """And what they had half written is found by nobody."""
    worker = store.worker()
    worker.store(*chain(1, 2))
    script = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from store_peers import *
class There: path, peers = Path({str(store.path)!r}), []
worker = Worker(There, "victim")
worker.attach()
slots = worker.reserve(*chain(5, 6, 7))
worker.fill(slots[0], b"x" * BLOCK_BYTES)
worker.commit(slots[2])
assert worker.find(1, 2).lease
print("ready", flush=True)
time.sleep(1000)
"""
    victim = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    before = store.figures_when(lambda now: now.leases == 1)
    assert (before.layouts[0].host_writing, before.layouts[0].host_leased, before.connections) == (2, 2, 2)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(DEADLINE_S)
    victim.stdout.close()
    after = store.figures_when(lambda now: now.connections == 1)
    assert (after.leases, after.reclaimed, after.layouts[0].host_writing) == (0, 1, 0)
    assert after.layouts[0].host_leased == 0 and after.layouts[0].owners == ("w1",)
    assert after.host.dropped == {"writer_gone": 2}
    assert worker.found(5, 6) == "" and worker.found(7) == "2"
    assert min(worker.reserve(*chain(5, 6))) >= 0


def test_each_layout_has_an_even_share_and_an_idle_one_makes_place_for_a_new_one(make_store: MakeStore) -> None:
    store = make_store(host_bytes=2 * room_for(8), layouts=2)
    others = [msgspec.structs.replace(LAYOUT, fingerprint=f"other{number}") for number in range(3)]
    one, two = store.worker("w1"), store.worker("w2", others[0])
    assert one.attached.slots == two.attached.slots == 8
    one.store(*chain(1))
    two.store(*chain(2))
    refused = Worker(store, "w3").refusal(kv.Attach(1, "w3", others[1]))
    assert "w1, w2" in refused.reason and not refused.permanent
    router = Router(store)
    assert router.holds(1, 2) == [1, 2]
    two.close()
    store.figures_when(lambda now: now.connections == 1 and len(now.layouts) == 2)
    three = store.worker("w3", others[1])
    router.take_until(lambda: router.holds(1, 2) == [1])
    there = {LAYOUT.fingerprint, "other1"}
    figures = store.figures_when(lambda now: {layout.fingerprint for layout in now.layouts} == there)
    assert figures.connections == 2
    assert three.found(2) == "" and one.found(1) == "2"
    assert figures.host.evicted == 1


def test_memory_comes_in_steps_and_all_of_it_can_be_used(make_store: MakeStore) -> None:
    layout = msgspec.structs.replace(LAYOUT, block_bytes=16 * MIB)
    store = make_store(host_bytes=room_for(12, layout))
    worker = store.worker(layout=layout)
    assert worker.attached.slots == 12
    slots = worker.reserve(*chain(*range(1, 13)))
    assert sorted(slots) == list(range(12))
    assert worker.reserve(*chain(20)) == (kv.FULL,)
    worker.commit(*slots)
    found = worker.find(*range(1, 13))
    assert found.tiers == "2" * 12
    for slot in slots:
        worker.fill(slot, content(slot))


def test_a_kernel_that_gives_no_memory_leaves_a_store_without_a_host_tier_that_says_why(make_store: MakeStore) -> None:
    store = make_store()
    store.kill()
    store.start(wrapper=["prlimit", f"--fsize={MIB}"])
    worker = store.worker()
    assert worker.attached.slots == 0
    figures = store.figures_when(lambda now: bool(now.layouts))
    assert figures.host.state == "suspended" and "File too large" in figures.host.reason
    assert figures.host.capacity_bytes == 0
    assert any("File too large" in note for note in store.notes)
