"""Blocks that outlive the store: written behind the workers' backs, and brought back into slots when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from store_peers import BLOCK_BYTES, DEADLINE_S, MIB, Store, Worker, chain, content, digest, room_for
from store_router import Router

from dynamo_box.protocol import kv, status
from dynamo_box.protocol.figures import KvStoreFigures

MakeStore = Callable[..., Store]


@pytest.fixture
def make_disk_store(make_store: MakeStore, tmp_path: Path) -> MakeStore:
    def make(**changes: object) -> Store:
        store = make_store(**{"disk_bytes": 64 * MIB, "directory": str(tmp_path / "disk"), **changes})
        store.figures_when(indexed)
        return store

    return make


def indexed(figures: KvStoreFigures) -> bool:
    return figures.disk.state == "on" and not figures.indexing and figures.indexed_in_s is not None


def on_disk(blocks: int) -> Callable[[KvStoreFigures], bool]:
    return lambda now: now.disk.blocks == blocks and now.disk.queued == 0


def check(worker: Worker, numbers: Iterable[int], slots: Iterable[int], generations: Iterable[int]) -> None:
    for number, slot, generation in zip(numbers, slots, generations, strict=True):
        assert kv.header_names(worker.header(slot), generation, digest(number))
        assert worker.read(slot) == content(number)[:BLOCK_BYTES], number


def test_what_a_killed_store_had_written_comes_back_with_its_priority(make_disk_store: MakeStore) -> None:
    store = make_disk_store()
    worker = store.worker()
    worker.store(*chain(1, 2))
    worker.store(*chain(3, priority=77, after=2))
    figures = store.figures_when(on_disk(3))
    assert (figures.disk.in_blocks, figures.disk.in_bytes) == (3, 3 * BLOCK_BYTES)
    assert figures.layouts[0].disk_blocks == 3
    store.kill()

    store.start()
    worker = store.worker()
    store.figures_when(lambda now: indexed(now) and now.disk.blocks == 3)
    assert worker.reserve(*chain(1, 2, 3, 4))[:3] == (kv.KNOWN, kv.KNOWN, kv.KNOWN)
    found = worker.find(1, 2, 3, 4)
    assert (found.tiers, found.slots, found.priorities) == ("333", (-1, -1, -1), (None, None, 77))
    router = Router(store)
    assert (router.tiers("g2"), router.tiers("g3")) == (0, 3)
    loaded = worker.load(found.lease, 0, 2)
    assert (len(loaded.slots), loaded.error) == (2, "") and loaded.took_s > 0
    check(worker, (1, 2), loaded.slots, loaded.generations)
    rest = worker.load(found.lease, 1, 2)
    assert rest.slots[0] == loaded.slots[1]
    check(worker, (2, 3), rest.slots, rest.generations)
    worker.send(kv.Release(found.lease, loaded={"g3": 3}))
    again = worker.find(1, 2, 3)
    assert (again.tiers, again.priorities) == ("222", (None, None, 77))
    figures = store.figures_when(lambda now: now.host.out_blocks == 3)
    assert (figures.disk.out_blocks, figures.disk.lookups, figures.disk.hits) == (3, 4, 3)
    assert figures.disk.in_blocks == 0, "what came from disk needn't be written there"
    router.subscribe()
    assert (router.tiers("g2"), router.tiers("g3")) == (3, 3)


def test_a_tier_of_one_slot_loads_a_block_at_a_time(make_disk_store: MakeStore) -> None:
    store = make_disk_store(host_bytes=room_for(1))
    worker = store.worker()
    for number in (1, 2, 3):
        worker.store(*chain(number))
        store.figures_when(on_disk(number))
    found = worker.find(1, 2, 3)
    assert found.tiers == "332"
    loaded = worker.load(found.lease, 0, 2)
    assert loaded.slots == () and "no slot" in loaded.error
    worker.send(kv.Release(found.lease, wasted={"g3": 2, "g2": 1}))
    found = worker.find(1, 2)
    loaded = worker.load(found.lease, 0, 2)
    check(worker, (1,), loaded.slots, loaded.generations)
    assert "no slot" in loaded.error
    worker.send(kv.Release(found.lease, loaded={"g3": 1}))
    assert worker.found(1, 2, 3) == "233"


def test_two_workers_that_load_the_same_get_the_same_slots_and_the_disk_is_read_once(
    make_disk_store: MakeStore,
) -> None:
    numbers = range(1, 201)
    store = make_disk_store(host_bytes=room_for(300))
    store.worker().store(*chain(*numbers))
    store.figures_when(on_disk(200))
    store.set("clear", "g2")
    one, two = store.worker("w1"), store.worker("w2")
    found = [worker.find(*numbers) for worker in (one, two)]
    gone = store.worker("w3")
    gone.send(kv.Load(7, gone.find(*numbers).lease, 0, 200))
    for worker, lease in zip((one, two), found, strict=True):
        worker.send(kv.Load(9, lease.lease, 0, 200))
    gone.send(kv.Release(3))
    gone.close()
    answers = [worker.receive() for worker in (one, two)]
    assert answers[0].slots == answers[1].slots and answers[0].error == answers[1].error == ""
    check(two, numbers, answers[1].slots, answers[1].generations)
    store.figures_when(lambda now: now.leases == 2 and now.disk.out_blocks == 200)
    one.send(kv.Release(found[0].lease))
    two.close()
    figures = store.figures_when(lambda now: now.leases == 0 and now.connections == 2)
    assert figures.layouts[0].host_leased == 0 and figures.layouts[0].host_writing == 0
    assert one.found(*numbers) == "2" * 200


def test_a_damaged_block_ends_a_load_and_is_found_no_more(make_disk_store: MakeStore, tmp_path: Path) -> None:
    store = make_disk_store()
    worker = store.worker()
    worker.store(*chain(1, 2, 3))
    store.figures_when(on_disk(3))
    store.set("clear", "g2")
    (file,) = [path for path in (tmp_path / "disk").rglob("*") if digest(2).hex() in path.name]
    data = bytearray(file.read_bytes())
    data[-BLOCK_BYTES // 2] ^= 1
    file.write_bytes(data)
    found = worker.find(1, 2, 3)
    assert found.tiers == "333"
    loaded = worker.load(found.lease, 0, 3)
    check(worker, (1,), loaded.slots, loaded.generations)
    assert loaded.error
    worker.send(kv.Release(found.lease, loaded={"g3": 1}, failed={"g3": 1}, wasted={"g3": 1}))
    assert worker.found(1, 2, 3) == "2"
    assert worker.found(3) == "2", "it was read well, and is there"
    figures = store.figures_when(lambda now: now.disk.failed == 1)
    assert figures.layouts[0].host_writing == 0
    worker.store(*chain(2))
    assert worker.found(1, 2, 3) == "222"


def test_with_second_hit_only_what_is_used_again_twice_goes_to_disk(make_disk_store: MakeStore) -> None:
    store = make_disk_store(disk_admission="second_hit")
    worker = store.worker()
    store.figures_when(indexed)
    worker.store(*chain(1, 2, 3))
    assert worker.found(1, 2) == "22"
    assert worker.found(9) == ""
    assert worker.found(1) == "2"
    assert worker.reserve(*chain(3)) == (kv.KNOWN,)
    figures = store.figures_when(on_disk(1))
    assert figures.admission == "second_hit"
    assert worker.reserve(*chain(3)) == (kv.KNOWN,)
    store.figures_when(on_disk(2))
    store.set("clear", "g2")
    assert [worker.found(number) for number in (1, 2, 3)] == ["3", "", "3"]


def test_all_that_was_stored_in_one_go_gets_to_disk_behind_it(make_disk_store: MakeStore) -> None:
    """However few may be on their way at once."""
    store = make_disk_store(host_bytes=room_for(64), write_queue_blocks=2)
    worker = store.worker()
    worker.store(*chain(*range(1, 65)))
    figures = store.figures_when(on_disk(64))
    assert not figures.disk.dropped


def test_a_drain_writes_out_what_waits_and_clearing_takes_all_that_is_not_in_use(make_disk_store: MakeStore) -> None:
    store = make_disk_store(host_bytes=room_for(400), flush_s=DEADLINE_S)
    worker = store.worker()
    numbers = range(1, 151)
    worker.store(*chain(*numbers))
    store.status.send(status.Drain(DEADLINE_S))
    store.expect(status.Draining, lambda told: told.in_flight == 0)
    assert store.ends() == 0
    store.status.close()

    store.start()
    worker = store.worker()
    store.figures_when(lambda now: indexed(now) and now.disk.blocks == 150)
    found = worker.find(1, 2)
    assert worker.load(found.lease, 0, 2).error == ""
    lease = worker.find(5)
    worker.load(lease.lease, 0, 1)
    worker.send(kv.Release(lease.lease))
    answer = store.set("clear", "g2")
    assert answer.text == "1 blocks gone from host memory, 2 stay: they are being read"
    assert worker.found(1, 2, 3) == "223"
    worker.send(kv.Release(found.lease))
    answer = store.set("clear", "all")
    assert answer.text == "2 blocks gone from host memory; 150 blocks gone from disk"
    assert worker.found(1) == "" and worker.found(5) == ""
    assert "not 'everything'" in store.set("clear", "everything").error
    assert "no setting 'x'" in store.set("x", "1").error
    worker.store(*chain(1))
    store.figures_when(on_disk(1))
    store.status.send(status.Stop())
    assert store.ends() == 0
