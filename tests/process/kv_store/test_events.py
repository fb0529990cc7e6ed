"""What a router learns of the tiers, with its own feed and index."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import pytest
from store_peers import DEADLINE_S, LAYOUT, MIB, Store, chain, digest, digests, room_for
from store_router import Router

from dynamo_box.kv.hashing import isolation_key, short_hash
from dynamo_box.protocol import PROTOCOL_VERSION, kv
from dynamo_box.protocol.framing import BlockingChannel, connect_unix
from dynamo_box.protocol.request import (
    Generate,
    Hello,
    Refused,
    Sampling,
    Subscribe,
    worker_decoder,
)

MakeStore = Callable[..., Store]


def test_a_router_knows_what_can_be_found_and_no_more(make_store: MakeStore) -> None:
    store = make_store(host_bytes=room_for(4))
    worker = store.worker()
    worker.store(*chain(1, 2))
    worker.reserve(*chain(3))
    router = Router(store)
    assert router.holds(1, 2, 3) == [1, 2]
    assert (router.tiers("g2"), router.tiers("g3")) == (2, 0)
    worker.store(*chain(4))
    worker.store(*chain(5))
    router.take_until(lambda: router.holds(5) == [5] and not router.holds(2))
    assert router.holds(1, 2, 3, 4, 5) == [1, 4, 5]
    found = worker.find(4)
    worker.send(kv.Distrust(found.slots))
    router.take_until(lambda: not router.holds(4))
    store.set("clear", "g2")
    router.take_until(lambda: not router.holds(1, 5))
    worker.store(*chain(6))
    router.subscribe()
    assert router.holds(1, 2, 3, 4, 5, 6) == [6]


def test_a_block_that_two_layouts_have_is_there_as_long_as_one_has_it(make_store: MakeStore) -> None:
    store = make_store(layouts=2)
    one, two = store.worker("w1"), store.worker("w2", msgspec.structs.replace(LAYOUT, shape="half"))
    router = Router(store)
    one.store(*chain(1))
    two.store(*chain(1))
    for worker, left in ((one, [1, 2]), (two, [2])):
        found = worker.find(1)
        worker.send(kv.Distrust(found.slots))
        one.store(*chain(2)) if worker is one else one.store(*chain(3))
        router.take_until(lambda worker=worker: router.holds(2) == [2] and (worker is one or not router.holds(1)))
        assert router.holds(1, 2) == left


def test_dumps_in_the_middle_of_changes_end_up_right(make_store: MakeStore) -> None:
    """Thousands of blocks come and go while a router subscribes again and again."""
    layout = msgspec.structs.replace(LAYOUT, block_bytes=64)
    store = make_store(host_bytes=40 * MIB)
    worker = store.worker(layout=layout)
    slots = worker.attached.slots
    assert slots > 2 * 4096
    last = 3 * slots
    done = threading.Event()

    def churn() -> None:
        for start in range(1, last, 1024):
            blocks = tuple(kv.Block(digest(number)) for number in range(start, min(start + 1024, last + 1)))
            worker.commit(*worker.reserve(*blocks))
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        router = Router(store)
        times = 0
        while not done.is_set():
            router.subscribe()
            times += 1
    finally:
        thread.join(DEADLINE_S)
    router.take_until(lambda: router.holds(last) == [last])
    there = {each for each in digests(*range(1, last + 1)) if router.index.holds("kvstore", short_hash(each))}
    fresh = Router(store)
    assert len(fresh.pages) > 3 and times > 1
    assert {each for page in fresh.pages for each in page.hashes} == {short_hash(each) for each in there}
    assert len(there) == slots
    assert worker.found(last) == "2" and worker.found(1) == ""


@pytest.mark.parametrize(
    "first",
    [
        Hello("router", PROTOCOL_VERSION + 1),
        Subscribe(),
        Generate(1, "r", b"", Sampling(1), isolation_key("m", block_size=16, kv_dtype="f")),
    ],
    ids=["version", "no-hello", "not-for-us"],
)
def test_who_talks_nonsense_to_the_event_socket_is_told_and_cut_off(store: Store, first: object) -> None:
    worker = store.worker()
    with BlockingChannel(connect_unix(store.events_path), worker_decoder) as channel:
        channel.send(first)
        assert isinstance(channel.receive(DEADLINE_S), Refused)
        assert channel.receive(DEADLINE_S) is None
    worker.store(*chain(1))
    assert Router(store).holds(1) == [1]
