"""Blocks that are kept for another worker: all of them, until they are claimed or the time is up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from store_peers import Store, Worker, chain, content, digests, room_for

from dynamo_box.protocol import kv

MakeStore = Callable[..., Store]
KEY, OTHER_KEY = b"k" * 16, b"o" * 16


def hold(worker: Worker, key: bytes, *numbers: int, ttl_s: float = 60.0) -> str:
    answer = worker.ask(kv.Hold(900, key, digests(*numbers), ttl_s))
    assert isinstance(answer, kv.Held), answer
    return answer.error


def claim(worker: Worker, key: bytes, *numbers: int) -> kv.Found:
    answer = worker.ask(kv.Find(901, digests(*numbers), key))
    assert isinstance(answer, kv.Found), answer
    return answer


def test_what_is_held_outlives_its_worker_and_is_evicted_only_once_it_was_claimed(make_store: MakeStore) -> None:
    store = make_store(host_bytes=room_for(3))
    prefill, decode = store.worker("prefill"), store.worker("decode")
    prefill.store(*chain(1, 2, 3))
    assert hold(prefill, KEY, 1, 2, 3) == ""
    prefill.close()
    assert decode.reserve(*chain(10, 11)) == (kv.FULL, kv.FULL)
    found = claim(decode, KEY, 1, 2, 3)
    assert found.tiers == "222"
    assert [decode.read(slot) for slot in found.slots] == [content(number)[:5000] for number in (1, 2, 3)]
    assert decode.reserve(*chain(10)) == (kv.FULL,), "the claim is a lease by now"
    decode.send(kv.Release(found.lease))
    assert decode.reserve(*chain(10))[0] >= 0
    store.figures_when(lambda figures: figures.leases == 0)


def test_a_hold_that_nobody_claims_ends_by_itself(make_store: MakeStore) -> None:
    store = make_store(host_bytes=room_for(2))
    one = store.worker()
    one.store(*chain(1, 2))
    assert hold(one, KEY, 1, 2, ttl_s=0.2) == ""
    store.figures_when(lambda figures: figures.leases == 0 and figures.requests > 3)
    assert min(one.reserve(*chain(7, 8))) >= 0
    found = claim(one, KEY, 1, 2)
    assert (found.tiers, found.lease) == ("", 0)


def test_a_prompt_of_131072_tokens_is_held_and_found_as_a_whole(make_store: MakeStore) -> None:
    count = 131_072 // 16
    small = kv.KvLayout("m", "float32", 16, 64, "")
    store = make_store(host_bytes=room_for(count, small))
    one, other = store.worker("prefill", small), store.worker("decode", small)
    numbers = range(1, count + 1)
    blocks = chain(*numbers)
    reserved: list[int] = []
    for start in range(0, count, 1024):
        slots = one.reserve(*blocks[start : start + 1024])
        assert isinstance(one.ask(kv.Commit(800, slots)), kv.Committed)
        reserved += slots
    assert hold(one, KEY, *numbers) == ""
    found = claim(other, KEY, *numbers)
    assert found.tiers == "2" * count and list(found.slots) == reserved


def test_all_or_nothing_and_a_key_once(store: Store) -> None:
    one = store.worker()
    one.store(*chain(1, 2))
    assert hold(one, KEY, 1, 2, 3) == "2 of 3 blocks are there"
    assert hold(one, KEY, 4) == "0 of 1 blocks are there"
    assert hold(one, KEY, 1, 2) == ""
    assert hold(one, KEY, 1) == "there is a hold with this key"
    assert hold(one, OTHER_KEY, 1) == ""
    assert claim(one, KEY, 1).tiers == "2"
    assert hold(one, KEY, 1) == ""


def test_what_lies_on_disk_only_is_held_there(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(host_bytes=room_for(2), disk_bytes=1 << 20, directory=str(tmp_path / "disk"))
    one = store.worker()
    one.store(*chain(1, 2))
    store.figures_when(lambda figures: figures.disk.blocks == 2)
    one.store(*chain(8, 9))
    store.figures_when(lambda figures: figures.disk.blocks == 4)
    assert hold(one, KEY, 1, 2) == ""
    found = claim(one, KEY, 1, 2)
    assert found.tiers == "33"
    loaded = one.load(found.lease, 0, 2)
    assert (loaded.error, [one.read(slot) for slot in loaded.slots]) == (
        "",
        [content(number)[:5000] for number in (1, 2)],
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (kv.Hold(1, b"short", digests(1), 1.0), "16 bytes"),
        (kv.Hold(1, b"", digests(1), 1.0), "a key and blocks"),
        (kv.Hold(1, KEY, (), 1.0), "a key and blocks"),
        (kv.Hold(1, KEY, digests(1), 0.0), "ttl_s"),
        (kv.Hold(1, KEY, digests(1), float("nan")), "ttl_s"),
        (kv.Hold(1, KEY, digests(1), 1e9), "ttl_s"),
        (kv.Find(1, digests(1), b"x"), "16 bytes"),
    ],
)
def test_nonsense_ends_the_connection_only(store: Store, message: kv.Hold | kv.Find, says: str) -> None:
    bystander = store.worker("bystander")
    assert says in store.worker().refusal(message).reason
    bystander.store(*chain(1))
