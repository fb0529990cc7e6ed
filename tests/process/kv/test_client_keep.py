"""Holds asked for through `Tiers`: behind the Offers before them, and answered whatever becomes of the store."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from client_engine import DEADLINE_S, LAYOUT, Engine, chain, content
from store_peers import Store, room_for

from dynamo_box.kv.client.jobs import Fetch, Fetched, Keep, Kept, Offer, Offered, Seek, Sought
from dynamo_box.protocol.kv import LONGEST_HOLD_S

KEY = b"k" * 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path, host_bytes=room_for(64, LAYOUT))
    yield one
    one.close()


@pytest.fixture
def engine(store: Store) -> Iterator[Engine]:
    one = Engine(store.path)
    yield one
    one.close()


def key(engine: Engine) -> int:
    """The engine checks at its end that every key had its result."""
    engine.last_key += 1
    return engine.last_key


def result(engine: Engine, kind: type, number: int) -> object:
    def there() -> object:
        return next((one for one in engine.results if isinstance(one, kind) and one.key == number), None)

    with engine.arrived:
        assert engine.arrived.wait_for(there, DEADLINE_S), engine.results
        return there()


def test_a_hold_waits_for_the_copies_before_it_and_is_claimed_by_another(store: Store, engine: Engine) -> None:
    blocks = chain(1, 40)
    go_on = threading.Event()

    def wait(_: Sequence[int]) -> None:
        assert go_on.wait(DEADLINE_S)

    engine.before_out = wait
    engine.pool.update({place: content(block.digest) for place, block in enumerate(blocks)})
    engine.tiers.offer(Offer(offer := key(engine), tuple(range(40)), blocks))
    engine.tiers.keep(Keep(keep := key(engine), KEY, tuple(block.digest for block in blocks), 60.0))
    assert not any(isinstance(one, Kept) for one in engine.results)
    go_on.set()
    assert result(engine, Kept, keep) == Kept(keep)
    assert isinstance(result(engine, Offered, offer), Offered)
    other = Engine(store.path)
    try:
        other.tiers.seek(Seek(seek := key(other), tuple(block.digest for block in blocks), KEY))
        sought = result(other, Sought, seek)
        assert isinstance(sought, Sought)
        assert sought.tiers == "2" * 40
        other.tiers.fetch(Fetch(fetch := key(other), sought.lease, tuple(range(40))))
        fetched = result(other, Fetched, fetch)
        assert isinstance(fetched, Fetched)
        assert fetched.count == 40
        store.figures_when(lambda figures: figures.leases == 0)

        # Nobody wants it any more: any worker of the layout may say so.
        engine.tiers.keep(Keep(again := key(engine), KEY, tuple(block.digest for block in blocks), LONGEST_HOLD_S))
        assert result(engine, Kept, again) == Kept(again)
        store.figures_when(lambda figures: figures.leases == 1)
        for _ in range(2):
            other.tiers.seek(Seek(seek := key(other), (), KEY))
            assert result(other, Sought, seek) == Sought(seek)
        store.figures_when(lambda figures: figures.leases == 0)
    finally:
        other.close()


def test_what_is_not_there_is_not_held(engine: Engine) -> None:
    engine.tiers.keep(Keep(keep := key(engine), KEY, tuple(block.digest for block in chain(2, 3)), 60.0))
    assert result(engine, Kept, keep) == Kept(keep, "0 of 3 blocks are there")


def test_every_keep_is_answered_when_the_store_dies(store: Store, engine: Engine) -> None:
    blocks = chain(3, 4)
    engine.pool.update({place: content(block.digest) for place, block in enumerate(blocks)})
    engine.before_out = lambda _: store.kill()
    engine.tiers.offer(Offer(key(engine), (0, 1, 2, 3), blocks))
    engine.tiers.keep(Keep(keep := key(engine), KEY, tuple(block.digest for block in blocks), 60.0))
    kept = result(engine, Kept, keep)
    assert isinstance(kept, Kept)
    assert kept.error
    engine.tiers.keep(Keep(late := key(engine), KEY, (blocks[0].digest,), 60.0))
    again = result(engine, Kept, late)
    assert isinstance(again, Kept)
    assert again.error
