"""A worker's side of the tiers against a store that does as it is told: what is copied, believed and waits."""

from __future__ import annotations

import dataclasses
import gc
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from client_engine import DEADLINE_S, IMPATIENT, LAYOUT, PATIENT, Engine, chain, content, mapped
from strict_store import SILENCE, HangUp, StrictStore, as_it_is, replace

from dynamo_box.kv.client.jobs import Fetch, Fetched, Forgo, Offer, Offered, Seek, Sought
from dynamo_box.kv.client.tiers import Tiers
from dynamo_box.protocol.kv import (
    FULL,
    Abandon,
    Attach,
    Attached,
    Commit,
    Committed,
    Distrust,
    Find,
    Found,
    Load,
    Loaded,
    Refused,
    Release,
    Reserve,
    Reserved,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[StrictStore]:
    one = StrictStore(path, LAYOUT)
    yield one
    one.close()


@pytest.fixture
def engine(store: StrictStore) -> Iterator[Engine]:
    one = Engine(store.path)
    yield one
    one.close()


def disk(store: StrictStore, blocks: Sequence[Any]) -> None:
    store.disk.update({one.digest: content(one.digest) for one in blocks})


def gate(entered: threading.Event, go_on: threading.Event) -> Callable[[Sequence[int]], None]:
    """For a copy that says when it has begun, and waits."""

    def wait(places: Sequence[int]) -> None:
        entered.set()
        assert go_on.wait(DEADLINE_S)

    return wait


# What is copied


def test_what_one_worker_stores_another_loads(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 40, priority=7)
    offered = engine.store(blocks)
    assert (offered.stored, offered.known, offered.dropped) == (40, 0, {})
    assert offered.bytes == 40 * LAYOUT.block_bytes
    assert engine.store(blocks).known == 40

    other = Engine(store.path)
    sought = other.find([*blocks, *chain(2, 1)])
    assert sought.tiers == "2" * 40
    assert sought.priorities == (7,) * 40
    fetched = other.load(sought, blocks[:35])
    assert (fetched.count, fetched.failed_tier, fetched.error) == (35, "", "")
    assert fetched.bytes == {"2": 35 * LAYOUT.block_bytes}
    assert store.wait_for(Release) == [Release(1, {"g2": 35}, {}, {"g2": 5})]
    assert other.find(chain(2, 3)) == Sought(other.last_key)
    other.close()

    totals = engine.tiers.totals()
    assert (totals.stored, totals.known, totals.stored_bytes, totals.queued) == (40, 40, offered.bytes, 0)
    totals = other.tiers.totals()
    assert (totals.matched, totals.loaded, totals.wasted) == ({"2": 40}, {"2": 35}, {"2": 5})
    assert other.tiers.rates()["2"] == pytest.approx(fetched.bytes["2"] / fetched.seconds["2"])
    assert other.tiers.rates()["3"] is None


def test_host_and_disk_in_turn_and_a_part_of_a_lease(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 50)
    for block in blocks[20:25]:
        store.put(block, content(block.digest))
    disk(store, blocks[:20])
    disk(store, blocks[25:])
    sought = engine.find(blocks)
    assert sought.tiers == "3" * 20 + "2" * 5 + "3" * 25
    fetched = engine.load(sought, blocks[3:48], skip=3)
    assert (fetched.count, fetched.error) == (45, "")
    size = LAYOUT.block_bytes
    assert fetched.bytes == {"2": 5 * size, "3": 40 * size}
    assert set(fetched.seconds) == {"2", "3"}
    assert [(one.start, one.count) for one in store.of(Load)] == [(3, 16), (19, 1), (25, 16), (41, 7)]
    assert store.wait_for(Release) == [Release(1, {"g2": 5, "g3": 40}, {}, {"g3": 5})]
    assert engine.tiers.rates()["3"] is not None


def test_a_lease_is_used_once(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 3)
    engine.store(blocks)
    engine.tiers.forgo(Forgo(engine.find(blocks).lease))
    assert store.wait_for(Release)[-1] == Release(1, {}, {}, {"g2": 3})
    sought = engine.find(blocks)
    assert engine.load(sought, blocks).count == 3
    assert engine.load(sought, blocks) == Fetched(engine.last_key, 0, error=engine.results[-1].error)
    assert "lease" in engine.results[-1].error
    sought = engine.find(blocks)
    assert engine.load(sought, blocks[1:], skip=2).error == "2 blocks from block 2 on of a lease on 3"
    assert engine.load(engine.find(blocks), []) == Fetched(engine.last_key, 0)
    assert store.wait_for(Release, 4)[2:] == [Release(3, {}, {}, {"g2": 3}), Release(4, {}, {}, {"g2": 3})]


def test_an_offer_names_a_place_for_each_block(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 blocks names 1 pool blocks"):
        engine.tiers.offer(Offer(1, (0,), chain(1, 2)))


def test_behind_a_hole_nothing_is_copied(path: Path) -> None:
    store = StrictStore(path, LAYOUT)
    engine = Engine(path)
    long, short = chain(1, 40), chain(2, 2)

    def full_once(request: Any) -> Any:
        """No slot for the second block of the long chain, though there are some for those after it."""
        if not isinstance(request, Reserve) or request.blocks[0] != long[0]:
            return None
        slots = store.answer(request).slots
        del store.here.peer.reserved[slots[1]]
        return Reserved(request.id, (slots[0], FULL, *slots[2:]))

    store.script = full_once
    copied: list[int] = []
    engine.before_out = copied.extend
    offered = engine.store([*long, *short])
    assert (offered.stored, offered.dropped) == (3, {"store_full": 39})
    assert len(copied) == 3
    assert [len(one.slots) for one in store.of(Abandon)] == [30, 8]
    assert [len(one.blocks) for one in store.of(Reserve)] == [32, 10]
    engine.close()
    store.close()


def test_a_store_that_is_full(path: Path) -> None:
    store = StrictStore(path, LAYOUT, slots=1)
    engine = Engine(path)
    offered = engine.store(chain(1, 3))
    assert (offered.stored, offered.dropped, offered.bytes) == (1, {"store_full": 2}, LAYOUT.block_bytes)
    engine.close()
    store.close()


def test_a_block_that_somebody_else_writes(store: StrictStore, engine: Engine) -> None:
    other = Engine(store.path)
    entered, go_on = threading.Event(), threading.Event()
    other.before_out = gate(entered, go_on)
    blocks = chain(1, 3)
    theirs = other.offer(blocks[:2])
    assert entered.wait(DEADLINE_S)
    assert engine.store(blocks).dropped == {"store_busy": 2}
    go_on.set()
    assert other.result(theirs).stored == 2
    assert engine.find(blocks).tiers == "222"
    other.close()


# What is believed


def test_a_slot_that_holds_another_block_ends_the_fetch_there(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 10)
    engine.store(blocks)
    slot = store.held[blocks[6].digest].slot
    sought = engine.find(blocks)
    store.overwrite_header(slot)
    copied: list[int] = []
    engine.before_in = copied.extend
    fetched = engine.load(sought, blocks)
    assert (fetched.count, fetched.failed_tier) == (6, "2")
    assert len(copied) == 6, "nothing in doubt is copied at all"
    assert store.wait_for(Distrust) == [Distrust((slot,))]
    assert store.wait_for(Release) == [Release(1, {"g2": 6}, {"g2": 1}, {"g2": 3})]
    assert engine.find(blocks).tiers == "2" * 6
    assert engine.tiers.totals().failed == {"2": 1}


def test_a_slot_that_changes_under_the_copy_ends_the_fetch_there(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 20)
    disk(store, blocks)
    sought = engine.find(blocks)
    changed: list[int] = []

    def change(places: Sequence[int]) -> None:
        """A bit of the header of the third block of the second batch, once its copy has begun."""
        if len(places) == 4:
            changed.append(store.loaded_to[blocks[18].digest])
            store.overwrite_header(changed[0], b"\1" + bytes(63))

    engine.before_in = change
    fetched = engine.load(sought, blocks)
    assert (fetched.count, fetched.failed_tier) == (18, "3")
    assert store.wait_for(Distrust) == [Distrust((changed[0],))]
    assert store.wait_for(Release) == [Release(1, {"g3": 18}, {"g3": 1}, {"g3": 1})]


def test_a_disk_that_stops_in_the_middle(path: Path) -> None:
    store = StrictStore(path, LAYOUT, slots=20)
    engine = Engine(path)
    blocks = chain(1, 40)
    disk(store, blocks)
    fetched = engine.load(engine.find(blocks), blocks)
    assert (fetched.count, fetched.failed_tier, fetched.error) == (20, "3", "no free slot")
    assert store.wait_for(Release) == [Release(1, {"g3": 20}, {"g3": 1}, {"g3": 19})]
    engine.close()
    store.close()


def test_a_copier_that_raises_costs_its_job(store: StrictStore, caplog: pytest.LogCaptureFixture) -> None:
    """And keeps nothing mapped, though what it logs of the error is kept."""
    engine = Engine(store.path)
    copy_in, copy_out = engine.copy_in, engine.copy_out
    calls: list[int] = []

    def fail(slots: Sequence[memoryview]) -> None:
        part = slots[0][:10]
        calls.append(len(slots))
        raise RuntimeError(f"no such block for {len(part)} bytes")

    blocks = chain(1, 40)
    engine.copy_out = lambda places, slots: fail(slots)  # type: ignore[method-assign]
    engine.copy_in = lambda slots, places: fail(slots)  # type: ignore[method-assign]
    assert engine.store(blocks).dropped == {"copy_failed": 40}
    assert calls == [32], "nothing more is copied of an Offer that has failed"
    assert [len(one.slots) for one in store.wait_for(Abandon, 2)] == [32, 8]
    engine.copy_out = copy_out  # type: ignore[method-assign]
    assert engine.store(blocks).stored == 40
    fetched = engine.load(engine.find(blocks), blocks)
    assert (fetched.count, fetched.failed_tier) == (0, "2")
    assert store.of(Distrust) == []
    engine.copy_in = copy_in  # type: ignore[method-assign]
    assert engine.load(engine.find(blocks), blocks).count == 40
    assert len([one for one in caplog.records if one.exc_info]) == 2
    assert mapped(store.inode)
    engine.close()
    assert not mapped(store.inode)


def test_a_copier_that_leaves_a_cycle_behind_keeps_nothing_mapped(store: StrictStore) -> None:
    engine = Engine(store.path)
    copy_in = engine.copy_in

    def tangle(slots: Sequence[memoryview], places: Sequence[int]) -> None:
        cycle: list[Any] = [slots[0][:10]]
        cycle.append(cycle)
        copy_in(slots, places)

    engine.copy_in = tangle  # type: ignore[method-assign]
    blocks = chain(1, 2)
    engine.store(blocks)
    gc.disable()
    try:
        assert engine.load(engine.find(blocks), blocks).count == 2
        engine.close()
        assert not mapped(store.inode)
    finally:
        gc.enable()


def test_an_engine_that_cannot_take_a_result(store: StrictStore) -> None:
    engine = Engine(store.path)
    keep = engine.deliver

    def fail_after(result: Any) -> None:
        keep(result)
        raise RuntimeError("not now")

    engine.tiers._to_engine = fail_after
    blocks = chain(1, 2)
    engine.store(blocks)
    assert engine.load(engine.find(blocks), blocks).count == 2
    engine.close()


# What waits


def test_a_slow_offload_delays_no_fetch(store: StrictStore, engine: Engine) -> None:
    blocks = chain(1, 4)
    engine.store(blocks)
    entered, go_on = threading.Event(), threading.Event()
    engine.before_out = gate(entered, go_on)
    slow = engine.offer(chain(2, 4))
    assert entered.wait(DEADLINE_S)
    assert engine.load(engine.find(blocks), blocks).count == 4
    assert engine.of(slow) == []
    go_on.set()
    assert engine.result(slow).stored == 4


def test_a_long_fetch_delays_no_seek_and_no_short_fetch(store: StrictStore, engine: Engine) -> None:
    long, short = chain(1, 50), chain(2, 4)
    engine.store(long)
    engine.store(short)
    sought = engine.find(short)
    entered, go_on = threading.Event(), threading.Event()
    engine.before_in = gate(entered, go_on)
    first, places = engine.fetch(engine.find(long).lease, 50)
    assert entered.wait(DEADLINE_S)
    second, _ = engine.fetch(sought.lease, 4)
    third = engine.seek(long)
    go_on.set()
    engine.check(engine.result(first), places, long)
    order = [one.key for one in engine.results]
    assert order.index(third) < order.index(second) < order.index(first)


def test_a_slow_disk_delays_no_seek_and_no_fetch_from_memory(store: StrictStore, engine: Engine) -> None:
    slow, fast = chain(1, 40), chain(2, 20)
    disk(store, slow)
    engine.store(fast)
    answers: list[Callable[[], None]] = []

    def late(request: Any) -> Any:
        if not isinstance(request, Load):
            return None
        answers.append(store.later(request))
        return SILENCE

    store.script = late
    first, places = engine.fetch(engine.find(slow).lease, 40)
    store.wait_for(Load, 2)
    assert engine.load(engine.find(fast), fast).count == 20
    assert len(store.of(Load)) == 2, "no more than two batches ahead"
    assert engine.of(first) == []
    store.script = as_it_is
    for answer in reversed(answers):
        answer()
    fetched = engine.result(first)
    engine.check(fetched, places, slow)
    assert fetched.count == 40


def test_a_copy_that_takes_long_is_no_silence_of_the_store(store: StrictStore, engine: Engine) -> None:
    """The engine is busy, or the whole process was held up: the store has answered all the while."""
    entered, go_on = threading.Event(), threading.Event()
    first = gate(entered, go_on)
    engine.before_out = lambda places: first(places) if len(places) == 32 else engine.give_up_after(PATIENT)
    key = engine.offer(chain(1, 40))
    assert entered.wait(DEADLINE_S)
    store.wait_for(Reserve, 2)
    engine.give_up_after(IMPATIENT)
    assert not go_on.wait(2 * IMPATIENT.store_s)
    go_on.set()
    assert engine.result(key).stored == 40


def test_a_full_queue_refuses(store: StrictStore) -> None:
    engine = Engine(store.path, queued_blocks=10)
    entered, go_on = threading.Event(), threading.Event()
    engine.before_out = gate(entered, go_on)
    keys = [engine.offer(chain(1, 12))]
    assert entered.wait(DEADLINE_S)
    keys += [engine.offer(chain(2, 1))]
    assert engine.tiers.totals().queued == 12
    go_on.set()
    assert engine.result(keys[0]).stored == 12, "one that finds the queue empty is taken whatever its size"
    assert engine.result(keys[1]) == Offered(keys[1], dropped={"queue_full": 1})
    assert engine.store(chain(3, 10)).stored == 10
    assert engine.tiers.totals().dropped == {"queue_full": 1}
    engine.close()


# How it ends


def test_close_answers_everything(path: Path) -> None:
    store = StrictStore(path, LAYOUT, slots=512)
    engine = Engine(store.path)
    blocks, others = chain(1, 40), chain(2, 40)
    engine.store(blocks[:20])
    disk(store, blocks[20:])
    sought = [engine.find(blocks) for _ in range(6)]
    inside, go_on = threading.Semaphore(0), threading.Event()
    wait = lambda places: (inside.release(), go_on.wait(DEADLINE_S))  # noqa: E731
    engine.before_in = engine.before_out = wait  # type: ignore[assignment]
    keys = [engine.fetch(one.lease, 40)[0] for one in sought[:5]]
    keys += [engine.offer(others), engine.offer(blocks)]
    assert inside.acquire(timeout=DEADLINE_S) and inside.acquire(timeout=DEADLINE_S)
    seek = engine.seek(blocks)
    engine.tiers._out.close()  # what `close` does first; then it waits
    engine.tiers._in.close()
    go_on.set()
    engine.tiers.close()
    assert "closed" in engine.result(seek).error
    assert engine.result(keys[0]).count in (16, 32), "what was copied until then is right"
    assert all("closed" in engine.result(key).error for key in keys[1:5])
    assert engine.result(keys[5]).dropped["store_gone"] >= 8
    assert engine.result(keys[6]).dropped == {"store_gone": 40}
    assert not mapped(store.inode)
    late = [engine.offer(others), engine.seek(others), engine.fetch(1, 1)[0]]
    assert engine.result(late[0]).dropped == {"store_gone": 40}
    assert all("closed" in engine.result(key).error for key in late[1:])
    engine.close()
    assert engine.tiers.status
    store.close()


def test_closed_before_it_was_started(path: Path) -> None:
    results: list[Any] = []
    tiers = Tiers(path, "test", LAYOUT, None, results.append)  # type: ignore[arg-type]  # nothing is copied
    tiers.seek(Seek(1, (b"\0" * 16,)))
    tiers.offer(Offer(2, (0,), chain(1, 1)))
    tiers.fetch(Fetch(3, 1, (0,)))
    assert results == []
    tiers.close()
    assert sorted(one.key for one in results) == [1, 2, 3]


def test_a_store_that_dies_in_each_step(path: Path) -> None:
    """What was asked has one answer, the old memory is gone before a successor's is taken, and all goes on there."""
    engine = Engine(path, connect=False)
    engine.until_status_says("no kvstore")
    assert "no kvstore" in engine.lose(chain(1, 1))
    blocks = chain(1, 20)
    old = 0

    def stay_clear(request: Any) -> None:
        assert not (isinstance(request, Attach) and old and mapped(old)), "connected again before it has let go"

    for kind in (Reserve, Commit, Find, Load):
        store = StrictStore(path, LAYOUT, script=stay_clear)
        assert engine.tiers.wait_connected(DEADLINE_S)
        host, on_disk = chain(2, 20), chain(3, 20)
        engine.store(host)
        disk(store, on_disk)
        first, second, third = engine.find(host), engine.find(on_disk), engine.find(host)

        def die(request: Any, kind: type = kind) -> None:
            if isinstance(request, kind):
                raise HangUp

        store.script = die
        keys = [engine.offer(blocks), engine.seek(blocks), engine.seek(host)]
        fetches = [(*engine.fetch(first.lease, 20), host), (*engine.fetch(second.lease, 20), on_disk)]
        for key in keys:
            engine.result(key)
        for key, places, wanted in fetches:
            engine.check(engine.result(key), places, wanted)
        if kind in (Reserve, Commit):
            assert engine.result(keys[0]).dropped == {"store_gone": 20}
        elif kind is Find:
            assert "ended" in engine.result(keys[1]).error
        else:
            assert engine.result(fetches[1][0]).failed_tier == "3"
        store.script = as_it_is
        old = store.inode
        store.close()
        engine.lose(host)
        successor = StrictStore(path, LAYOUT, script=stay_clear)
        assert engine.tiers.wait_connected(DEADLINE_S)
        assert not mapped(old)
        engine.store(host)
        while engine.find(host).tiers and successor.last_lease < 10:
            pass
        assert engine.load(third, host).count == 0, "a lease of the store before, with a number that its successor gave"
        old = successor.inode
        successor.close()
        engine.lose(host)
    engine.close()


def test_one_connection_that_ends_takes_the_other_with_it(path: Path) -> None:
    store = StrictStore(path, LAYOUT)
    engine = Engine(path)

    def hang_up(request: Any) -> None:
        if isinstance(request, Reserve):
            raise HangUp

    store.script = hang_up
    engine.store(chain(1, 1))
    store.wait_for(Attach, 4)
    assert engine.tiers.wait_connected(DEADLINE_S)
    assert engine.find(chain(1, 1)).error == ""
    engine.close()
    store.close()


def test_a_store_that_falls_silent(path: Path) -> None:
    """In each step, with limits of a fraction of a second: it counts as gone, and nobody waits for it for ever."""
    for kind in (Reserve, Commit, Find, Load):
        store = StrictStore(path, LAYOUT)
        engine = Engine(path)
        host, on_disk = chain(2, 20), chain(3, 20)
        engine.store(host)
        disk(store, on_disk)
        sought = engine.find(on_disk)
        engine.give_up_after(IMPATIENT)
        store.script = lambda request, kind=kind: SILENCE if isinstance(request, kind) else None
        if kind is Load:
            assert "has not answered" in engine.load(sought, on_disk).error
        elif kind is Find:
            assert "has not answered" in engine.find(host).error
        else:
            assert engine.store(chain(4, 5)).dropped == {"store_gone": 5}
        store.script = lambda request: SILENCE if isinstance(request, Attach) else None
        store.wait_for(Attach, 4)
        assert engine.find(host).error, "answered at once while a store lets us wait"
        store.script = as_it_is
        assert engine.tiers.wait_connected(DEADLINE_S)
        engine.give_up_after(PATIENT)
        assert engine.find(host).error == ""
        engine.close()
        store.close()


def test_two_lives_of_a_store_are_not_mixed(path: Path) -> None:
    """One thread reaches the old store, the other its successor: both let go and meet at the same one."""
    old = StrictStore(path, LAYOUT, script=lambda request: None if len(old.of(Attach)) == 1 else SILENCE)
    engine = Engine(path, connect=False, limits=IMPATIENT)
    old.wait_for(Attach, 2)
    new = StrictStore(path, LAYOUT)
    assert engine.tiers.wait_connected(DEADLINE_S)
    engine.give_up_after(PATIENT)
    engine.store(chain(1, 3))
    assert engine.find(chain(1, 3)).tiers == "222"
    assert mapped(new.inode) and not mapped(old.inode)
    engine.close()
    old.close()
    new.close()


def test_a_view_that_is_kept_keeps_the_next_store_away(path: Path) -> None:
    store = StrictStore(path, LAYOUT)
    engine = Engine(path)
    kept: list[memoryview] = []
    copy_in = engine.copy_in

    def keep(slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        kept.append(slots[0][:100])
        copy_in(slots, blocks)

    engine.copy_in = keep  # type: ignore[method-assign]
    blocks = chain(1, 3)
    engine.store(blocks)
    assert engine.load(engine.find(blocks), blocks).count == 3
    old = store.inode
    store.close()
    engine.lose(blocks)
    store = StrictStore(path, LAYOUT)
    engine.until_status_says("still mapped")
    assert mapped(old) and store.seen == []
    assert bytes(kept[0][:16]) == blocks[0].digest
    kept.clear()
    assert engine.tiers.wait_connected(DEADLINE_S)
    assert not mapped(old)
    engine.close()
    store.close()


# What no store says


def lies() -> dict[str, tuple[type, Callable[[Any, Any], Any]]]:
    """By name: what is answered wrongly, and how, from the request and the right answer."""
    return {
        "a slot short": (Reserve, lambda ask, right: replace(right, slots=right.slots[1:])),
        "a slot beyond the arena": (Reserve, lambda ask, right: replace(right, slots=(64, *right.slots[1:]))),
        "a negative slot": (Reserve, lambda ask, right: replace(right, slots=(-4, *right.slots[1:]))),
        "a slot twice": (Reserve, lambda ask, right: replace(right, slots=(right.slots[0],) * len(right.slots))),
        "another answer": (Reserve, lambda ask, right: Committed(ask.id, ())),
        "another question": (Reserve, lambda ask, right: replace(right, id=right.id + 1000)),
        "an Attached": (Reserve, lambda ask, right: Attached(0, 0, 0, 0)),
        "more than was asked": (Find, lambda ask, right: Found(ask.id, 1, "2" * 9, (0,) * 9, (1,) * 9, (None,) * 9)),
        "another tier": (Find, lambda ask, right: Found(ask.id, 1, "4", (0,), (1,), (None,))),
        "a lease on nothing": (Find, lambda ask, right: Found(ask.id, 1, "")),
        "nothing leased": (Find, lambda ask, right: Found(ask.id, 0, "2", (0,), (1,), (None,))),
        "a slot of none": (Find, lambda ask, right: Found(ask.id, 1, "2", (64,), (1,), (None,))),
        "no priorities": (Find, lambda ask, right: Found(ask.id, 1, "2", (0,), (1,))),
        "more than was to be loaded": (Load, lambda ask, right: Loaded(ask.id, (0,) * 17, (1,) * 17, 0.0)),
        "loaded to nowhere": (Load, lambda ask, right: Loaded(ask.id, (64,), (1,), 0.0)),
        "no generation": (Load, lambda ask, right: Loaded(ask.id, (0,), (), 0.0)),
    }


@pytest.mark.parametrize("name", lies())
def test_a_store_that_talks_nonsense_is_left(path: Path, name: str) -> None:
    kind, lie = lies()[name]
    store = StrictStore(path, LAYOUT)
    engine = Engine(path)
    blocks, on_disk = chain(1, 3), chain(2, 5)
    engine.store(blocks)
    disk(store, on_disk)
    sought = engine.find(on_disk)
    store.script = lambda request: lie(request, Reserved(request.id, (4, 5, 6))) if isinstance(request, kind) else None
    if kind is Reserve:
        assert engine.store(chain(3, 3)).dropped == {"store_gone": 3}
    elif kind is Find:
        assert engine.find(blocks).error
    else:
        assert engine.load(sought, on_disk).count == 0
    store.script = as_it_is
    store.wait_for(Attach, 4)
    assert engine.tiers.wait_connected(DEADLINE_S)
    assert engine.load(engine.find(blocks), blocks).count == 3
    engine.close()
    store.close()


@pytest.mark.parametrize(
    "answer",
    [
        Attached(64, LAYOUT.slot_bytes, 4096, 1 << 30),
        Attached(64, LAYOUT.slot_bytes, 4096, 4096),
        Attached(64, 4096, 4096, 4096 * 65),
        Attached(10_000, 8192, 4096, 4096 * 129),
        Attached(64, LAYOUT.slot_bytes, 0, 64 * LAYOUT.slot_bytes),
        Attached(-1, 8192, 4096, 4096),
        Attached(64, LAYOUT.slot_bytes, 4096, 64 * LAYOUT.slot_bytes + 4096, descriptors=0),
        Found(1, 0, ""),
    ],
)
def test_memory_that_cannot_be_is_not_mapped(path: Path, answer: Any) -> None:
    store = StrictStore(path, LAYOUT, script=lambda request: answer)
    engine = Engine(path, connect=False)
    store.wait_for(Attach, 2)
    assert engine.find(chain(1, 1)).error
    assert engine.tiers.status
    assert not mapped(store.inode)
    store.script = as_it_is
    assert engine.tiers.wait_connected(DEADLINE_S)
    engine.close()
    store.close()


def test_refused_for_now_and_for_ever(path: Path) -> None:
    store = StrictStore(path, LAYOUT, script=lambda request: Refused("full of connections"))
    engine = Engine(path, connect=False)
    store.wait_for(Attach, 3)
    store.script = as_it_is
    assert engine.tiers.wait_connected(DEADLINE_S)
    store.close()
    engine.lose(chain(1, 1))
    store = StrictStore(path, LAYOUT, script=lambda request: Refused("another version", permanent=True))
    store.wait_for(Attach, 2)
    engine.until_status_says("another version")
    assert "another version" in engine.find(chain(1, 1)).error
    assert engine.store(chain(1, 2)).dropped == {"store_gone": 2}
    store.script = as_it_is
    assert not engine.tiers.wait_connected(0.5)
    assert len(store.of(Attach)) == 2
    engine.close()
    store.close()


def test_a_tier_without_room_for_a_block(path: Path) -> None:
    store = StrictStore(path, LAYOUT, slots=0)
    engine = Engine(path, connect=False)
    engine.until_status_says("no room")
    blocks = chain(1, 2)
    store.wait_for(Attach, 2)
    assert engine.store(blocks).dropped in ({"store_full": 2}, {"store_gone": 2})
    engine.close()
    store.close()


def test_slots_that_are_being_written_are_not_given_up(path: Path) -> None:
    """The end of a connection gives its slots to others: it waits for the copy, though all else has failed."""
    store = StrictStore(path, LAYOUT)
    engine = Engine(path)
    out = engine.tiers._out

    def hung_up() -> bool:
        assert out._session is not None
        poll = select.poll()
        poll.register(out._session.fileno(), 0)
        return bool(poll.poll(0))

    entered, go_on, told = threading.Event(), threading.Event(), threading.Event()
    engine.before_out = gate(entered, go_on)
    let_go = out.let_go
    out.let_go = lambda: (let_go(), told.set())  # type: ignore[method-assign,assignment,func-returns-value]
    first = engine.offer(chain(1, 3))
    assert entered.wait(DEADLINE_S)

    def hang_up(request: Any) -> None:
        if isinstance(request, Find):
            raise HangUp

    store.script = hang_up
    assert engine.find(chain(1, 3)).error
    assert told.wait(DEADLINE_S)
    assert not hung_up() and mapped(store.inode)
    store.script = as_it_is
    go_on.set()
    assert engine.result(first).dropped == {"store_gone": 3}
    assert engine.tiers.wait_connected(DEADLINE_S)

    entered.clear()
    go_on.clear()
    second = engine.offer(chain(1, 3))
    assert entered.wait(DEADLINE_S)
    out.close()
    assert not hung_up()
    go_on.set()
    engine.close()
    assert engine.result(second).dropped == {"store_gone": 3}
    store.close()


def test_a_disk_that_answers_nothing_is_not_asked_without_end(store: StrictStore) -> None:
    """Fetches end for want of time, one after the other, while what they asked for stays unanswered."""
    engine = Engine(store.path, limits=dataclasses.replace(PATIENT, fetch_s=0.01))
    blocks = chain(1, 40)
    disk(store, blocks)
    answers: list[Callable[[], None]] = []

    def late(request: Any) -> Any:
        if not isinstance(request, Load):
            return None
        answers.append(store.later(request))
        return SILENCE

    store.script = late
    for _ in range(20):
        fetched = engine.load(engine.find(blocks), blocks)
        assert (fetched.count, fetched.failed_tier) == (0, "3")
        assert "0.01 s" in fetched.error
    assert len(store.of(Load)) == 32
    assert len(store.wait_for(Release, 20)) == 20
    for answer in answers:
        answer()
    assert engine.find(blocks).error == ""
    session = engine.tiers._in._session
    assert session is not None
    assert (session.unanswered, session._answers) == (0, {}), "what came too late is dropped"
    assert len(store.of(Attach)) == 2
    engine.close()
