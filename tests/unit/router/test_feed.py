"""One worker's messages in, an index that holds only what is right out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.protocol.request import KvCleared, KvDump, KvRemoved, KvStored
from dynamo_box.router.feed import MAX_WAITING_HASHES, PARENT_DOUBT_EVERY_S, SLICE_HASHES, Feed, KvMessage
from dynamo_box.router.index import KvIndex

_rng = random.Random(3)
HASHES = tuple(_rng.getrandbits(64) for _ in range(3 * SLICE_HASHES))


class Heard:
    def __init__(self) -> None:
        self.doubts: list[str] = []
        self.clears = 0
        self.full = 0

    def doubt(self, reason: str) -> None:
        self.doubts.append(reason)

    def cleared(self) -> None:
        self.clears += 1

    def index_full(self) -> None:
        self.full += 1


class Rig:
    """A feed, its index, what it told, and a clock."""

    def __init__(self, cap: int = 2**20, *, chains: bool = True) -> None:
        self.index = KvIndex(cap)
        self.heard = Heard()
        self.now = 1000.0
        self.feed = Feed(self.index, "a", self.heard, clock=lambda: self.now, chains=chains)

    def take(self, *messages: KvMessage) -> None:
        for message in messages:
            self.feed.receive(message)
        while self.feed.apply():
            pass

    def held(self) -> int:
        return self.index.blocks("a")


def dump(next_event_id: int, *hashes: int) -> KvDump:
    return KvDump(next_event_id, hashes, first=True, more=False)


def test_a_dump_and_the_events_after_it() -> None:
    rig = Rig()
    rig.take(
        KvDump(5, HASHES[:2], first=True, more=True),
        KvDump(5, HASHES[2:4], first=False, more=False),
        KvStored(5, HASHES[4:6], HASHES[3]),
        KvRemoved(6, HASHES[5:6]),
    )
    assert rig.index.match(HASHES) == {"a": 5}
    assert rig.heard.doubts == []
    rig.take(KvCleared(7))
    assert (rig.held(), rig.heard.clears) == (0, 1)


def test_events_before_the_first_dump_are_none_of_ours() -> None:
    rig = Rig()
    rig.take(KvStored(0, HASHES[:1], None), KvDump(1, HASHES[:2], first=False, more=False))
    assert rig.held() == 0
    assert rig.heard.doubts == []


@pytest.mark.parametrize(
    "wrong",
    [
        KvStored(7, HASHES[4:5], HASHES[3]),
        KvRemoved(4, HASHES[:1]),
        KvCleared(6),
        KvDump(5, HASHES[:2], first=False, more=False),
    ],
    ids=["gap", "repeated", "gap before clear", "page out of place"],
)
def test_what_is_out_of_order_empties_the_index_until_a_new_dump(wrong: KvMessage) -> None:
    rig = Rig()
    rig.take(dump(5, *HASHES[:4]), wrong)
    assert rig.held() == 0
    assert len(rig.heard.doubts) == 1
    rig.take(KvStored(8, HASHES[:3], None))
    assert rig.held() == 0, "what follows belongs to the doubtful past"
    rig.take(dump(9, *HASHES[:4]), KvStored(9, HASHES[4:5], HASHES[3]))
    assert rig.index.match(HASHES) == {"a": 5}
    assert len(rig.heard.doubts) == 1


def test_an_event_in_the_middle_of_a_dump_is_a_doubt() -> None:
    rig = Rig()
    rig.take(KvDump(5, HASHES[:2], first=True, more=True), KvStored(5, HASHES[2:3], HASHES[1]))
    assert rig.held() == 0
    assert "middle of a dump" in rig.heard.doubts[0]


def test_a_dump_that_starts_over_counts_from_there() -> None:
    rig = Rig()
    rig.take(KvDump(5, HASHES[:2], first=True, more=True), dump(6, *HASHES[:1]))
    assert rig.index.match(HASHES) == {"a": 1}
    assert rig.heard.doubts == []


def test_a_parent_that_nobody_stored_is_a_doubt_once_a_minute() -> None:
    rig = Rig()
    orphan = KvStored(0, HASHES[4:5], HASHES[3])
    rig.take(dump(0, *HASHES[:2]), orphan)
    assert "parent" in rig.heard.doubts[0]
    rig.take(dump(0, *HASHES[:2]), orphan)
    assert len(rig.heard.doubts) == 1
    assert rig.held() == 3
    rig.now += PARENT_DOUBT_EVERY_S
    rig.take(KvStored(1, HASHES[9:10], HASHES[8]))
    assert len(rig.heard.doubts) == 2


def test_tiers_may_evict_a_parent_before_its_child() -> None:
    rig = Rig(chains=False)
    rig.take(dump(0), KvStored(0, HASHES[1:2], HASHES[0], tier="g2"))
    assert rig.heard.doubts == []
    assert rig.held() == 1


def test_a_dump_of_tiers_is_pages_of_each_and_events_move_blocks_between_them() -> None:
    rig = Rig(chains=False)
    rig.take(
        KvDump(5, HASHES[:4], first=True, more=True, tier="g2"),
        KvDump(5, HASHES[2:8], first=False, more=False, tier="g3"),
    )
    assert (rig.index.blocks("a", "g2"), rig.index.blocks("a", "g3"), rig.held()) == (4, 6, 10)
    rig.take(KvRemoved(5, HASHES[2:4], tier="g2"), KvStored(6, HASHES[:2], None, tier="g3"))
    assert (rig.index.blocks("a", "g2"), rig.index.blocks("a", "g3")) == (2, 8)
    rig.take(KvCleared(7, tier="g3"))
    assert (rig.index.blocks("a", "g2"), rig.index.blocks("a", "g3")) == (2, 0)
    assert rig.index.match(HASHES) == {"a": 2}


def test_a_large_message_is_applied_in_slices() -> None:
    rig = Rig()
    rig.feed.receive(dump(0, *HASHES))
    rig.feed.receive(KvRemoved(0, HASHES))
    turns = 1
    while rig.feed.apply():
        turns += 1
        assert rig.held() <= turns * SLICE_HASHES
    assert turns >= 6
    assert rig.held() == 0


def test_a_backlog_without_end_is_a_doubt() -> None:
    rig = Rig()
    page = KvDump(0, (1,) * (MAX_WAITING_HASHES // 4), first=True, more=True)
    for _ in range(4):
        rig.feed.receive(page)
    assert len(rig.heard.doubts) == 1
    assert not rig.feed.apply()


def test_a_worker_that_holds_more_than_the_index_is_told_once() -> None:
    rig = Rig(cap=3)
    rig.take(dump(0, *HASHES[:5]), KvStored(0, HASHES[5:6], HASHES[4]), KvStored(1, HASHES[6:7], HASHES[5]))
    assert rig.index.match(HASHES) == {"a": 3}
    assert rig.heard.full == 1
    assert rig.heard.doubts == [], "a parent that was left out is no contradiction"


@given(st.data())
def test_losing_or_doubling_any_event_never_leaves_a_wrong_index(data: st.DataObject) -> None:
    """A worker with a real cache; some of its messages are lost or doubled on the way."""
    rig = Rig()
    held: set[int] = set()
    rig.take(dump(0))
    for event_id in range(data.draw(st.integers(1, 12))):
        depth = len(held)
        event: KvMessage
        if depth and data.draw(st.booleans()):
            event = KvRemoved(event_id, (HASHES[depth - 1],))
            held.discard(HASHES[depth - 1])
        else:
            event = KvStored(event_id, (HASHES[depth],), HASHES[depth - 1] if depth else None)
            held.add(HASHES[depth])
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 0, 2]))):
            rig.take(event)
        if rig.heard.doubts:
            assert rig.held() == 0
            rig.take(dump(event_id + 1, *HASHES[: len(held)]))
            rig.heard.doubts.clear()
            assert rig.index.match(HASHES) == ({"a": len(held)} if held else {})
