"""What of a prompt a worker has, and what it could load from the box's tiers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.router.credit import BoxTiers, Credit, credit_each
from dynamo_box.router.index import KvIndex

STORE = "kvstore"
_rng = random.Random(5)
PROMPT = tuple(_rng.getrandbits(64) for _ in range(24))


class Rig:
    """Where each block of PROMPT is, one letter a block: "1" in the pool of worker a, "2" in host memory, "3" on disk,
    "5" in host memory and on disk, "." nowhere.
    """

    def __init__(self, places: str) -> None:
        self.pool = KvIndex()
        self.tiers = BoxTiers(STORE)
        for block, place in zip(PROMPT, places, strict=False):
            if place == "1":
                self.pool.store("a", [block])
            for letter, tier in (("2", "g2"), ("3", "g3"), ("5", "g2"), ("5", "g3")):
                if place == letter:
                    self.tiers.index.store(STORE, [block], tier)

    def credit(self, predicted: int = 0, blocks: int = len(PROMPT)) -> Credit:
        return credit_each(["a"], [predicted], pool=self.pool, tiers=self.tiers, hashes=PROMPT[:blocks])[0]


@pytest.mark.parametrize(
    ("places", "credit"),
    [
        ("", Credit()),
        ("111", Credit(own=3)),
        ("222", Credit(host=3)),
        ("333", Credit(disk=3)),
        ("555", Credit(host=3)),
        ("112233", Credit(own=2, host=2, disk=2)),
        ("12131", Credit(own=3, host=1, disk=1)),
        ("353", Credit(host=1, disk=2)),
        ("11.22", Credit(own=2)),
        (".222", Credit()),
        ("22.11", Credit(host=2)),
    ],
)
def test_own_first_then_host_then_disk_up_to_the_first_block_that_is_nowhere(places: str, credit: Credit) -> None:
    assert Rig(places).credit() == credit


def test_a_prompt_ends_before_what_is_kept() -> None:
    assert Rig("1122").credit(blocks=3) == Credit(own=2, host=1)
    assert Rig("1122").credit(blocks=0) == Credit()


@pytest.mark.parametrize(
    ("places", "predicted", "credit"),
    [
        ("....2222", 4, Credit(own=4, host=4, awaited=4)),
        ("11..22", 4, Credit(own=4, host=2, awaited=2)),
        ("2222", 2, Credit(own=2, host=2)),  # being loaded for the earlier request: nobody computes it
        ("22..", 4, Credit(own=4, awaited=2)),
        (".1.133", 4, Credit(own=4, disk=2, awaited=4)),  # computed from its first gap on
        ("1111", 2, Credit(own=4)),
        ("..", 4, Credit(own=4, awaited=4)),
        ("...3", 2, Credit(own=2, awaited=2)),
    ],
)
def test_what_is_predicted_is_the_workers_own_and_goes_on_in_the_tiers(
    places: str, predicted: int, credit: Credit
) -> None:
    rig = Rig(places)
    rig.tiers.index.store(STORE, [1], "g2")  # whether this prompt is in the tiers or not, something is
    assert rig.credit(predicted) == credit


def test_every_worker_gets_credit_for_the_tiers() -> None:
    pool, tiers = KvIndex(), BoxTiers(STORE)
    pool.store("a", PROMPT[:4])
    pool.store("b", PROMPT[:10])
    tiers.index.store(STORE, PROMPT[2:8], "g2")
    tiers.index.store(STORE, PROMPT[8:12], "g3")
    tiers.index.store(STORE, PROMPT[:4], "g3")
    found = credit_each(["a", "b", "new"], [0, 0, 0], pool=pool, tiers=tiers, hashes=PROMPT)
    assert found == [
        Credit(own=4, host=4, disk=4),
        Credit(own=10, disk=2),
        Credit(host=6, disk=6),
    ]


def test_who_holds_nothing_gets_no_credit_beyond_what_others_hold() -> None:
    rig = Rig("212121")
    found = credit_each(["a", "new"], [0, 0], pool=rig.pool, tiers=rig.tiers, hashes=PROMPT)
    assert found == [Credit(own=3, host=3), Credit(host=1)]


def test_forgotten_tiers_give_no_credit_before_they_are_swept() -> None:
    rig = Rig("1122")
    rig.tiers.index.forget(STORE)
    assert rig.tiers.empty
    assert rig.credit() == Credit(own=2)
    rig.tiers.index.store(STORE, [1], "g2")
    assert rig.credit() == Credit(own=2), "the bits of the life before mean nothing now"


@given(st.data())
def test_it_is_what_a_walk_block_by_block_gives(data: st.DataObject) -> None:
    workers = ("a", "b", "c")
    kinds = data.draw(st.lists(st.sets(st.sampled_from((*workers, "g2", "g3"))), min_size=1, max_size=4))
    places = data.draw(st.lists(st.sampled_from(kinds), max_size=len(PROMPT)))
    hashes = PROMPT[: len(places)]
    predicted = [data.draw(st.integers(0, len(hashes))) for _ in workers]
    pool, tiers = KvIndex(), BoxTiers(STORE)
    for block, place in zip(hashes, places, strict=False):
        for holder in place:
            if holder in workers:
                pool.store(holder, [block])
            else:
                tiers.index.store(STORE, [block], holder)
    found = credit_each(workers, predicted, pool=pool, tiers=tiers, hashes=hashes)
    if tiers.empty:
        matched = pool.match(hashes)
        assert [each.own for each in found] == [
            max(matched.get(worker, 0), soon) for worker, soon in zip(workers, predicted, strict=True)
        ]
    else:
        expected = [_walk(worker, soon, places) for worker, soon in zip(workers, predicted, strict=True)]
        assert found == expected


def _walk(worker: str, predicted: int, places: Sequence[set[str]]) -> Credit:
    counts = {"own": predicted, "host": 0, "disk": 0, "awaited": 0}
    gap = False
    for depth, place in enumerate(places):
        where = "own" if worker in place else "host" if "g2" in place else "disk" if "g3" in place else None
        if depth < predicted:
            gap = gap or where is None
            counts["awaited"] += gap
        elif where is None:
            break
        else:
            counts[where] += 1
    return Credit(**counts)
