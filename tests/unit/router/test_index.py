"""The index against a model that anybody can check by reading it."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_box.router.index import KvIndex

WORKERS = [f"worker.{number}" for number in range(8)]
TIERS = ["g1", "g2", "g3"]


def chain(seed: int, length: int) -> list[int]:
    """Hashes of a prompt's blocks, spread over all of 64 bits as real ones are."""
    rng = random.Random(seed)
    return [rng.getrandbits(64) for _ in range(length)]


CHAINS = [chain(1, 12), chain(2, 12), chain(1, 5) + chain(3, 7), chain(2, 9) + chain(4, 2)]

workers = st.sampled_from(WORKERS)
tiers = st.sampled_from(TIERS)


@st.composite
def stretches(draw: st.DrawFn) -> list[int]:
    hashes = draw(st.sampled_from(CHAINS))
    start = draw(st.integers(0, len(hashes) - 1))
    return hashes[start : draw(st.integers(start, len(hashes)))]


class IndexAgainstSets(RuleBasedStateMachine):
    """`held[worker][tier]` is a plain set of hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex()
        self.held: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))

    @rule(worker=workers, tier=tiers, hashes=stretches())
    def store(self, worker: str, tier: str, hashes: list[int]) -> None:
        assert self.index.store(worker, hashes, tier) == 0
        self.held[worker][tier] |= set(hashes)

    @rule(worker=workers, tier=tiers, hashes=stretches())
    def remove(self, worker: str, tier: str, hashes: list[int]) -> None:
        self.index.remove(worker, hashes, tier)
        self.held[worker][tier] -= set(hashes)

    @rule(worker=workers, tier=tiers)
    def clear(self, worker: str, tier: str) -> None:
        self.index.clear(worker, tier)
        self.held[worker][tier].clear()

    @rule(worker=workers)
    def forget(self, worker: str) -> None:
        self.index.forget(worker)
        self.held.pop(worker, None)

    @rule(worker=workers, dump=st.lists(stretches(), max_size=3))
    def resync(self, worker: str, dump: list[list[int]]) -> None:
        self.index.forget(worker)
        self.held.pop(worker, None)
        for page in dump:
            self.index.store(worker, page)
            self.held[worker]["g1"] |= set(page)

    @rule(budget=st.integers(1, 6000))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @rule()
    def sweep_all(self) -> None:
        while self.index.sweep():
            pass
        held = {block for tiers in self.held.values() for blocks in tiers.values() for block in blocks}
        assert self.index.map_entries == len(held)

    @invariant()
    def matches_the_sets(self) -> None:
        for hashes in CHAINS:
            expected = {}
            for worker, tiers in self.held.items():
                anywhere = set().union(*tiers.values())
                overlap = next((i for i, block in enumerate(hashes) if block not in anywhere), len(hashes))
                if overlap:
                    expected[worker] = overlap
                assert self.index.holds(worker, hashes[0]) == (hashes[0] in anywhere)
            assert self.index.match(hashes) == expected

    @invariant()
    def counts_add_up(self) -> None:
        for worker in WORKERS:
            held = self.held.get(worker, {})
            assert self.index.blocks(worker) == sum(map(len, held.values()))
        assert self.index.total_blocks == sum(map(self.index.blocks, WORKERS))


TestIndexAgainstSets = IndexAgainstSets.TestCase
TestIndexAgainstSets.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_overlap_ends_at_the_first_gap() -> None:
    index = KvIndex()
    hashes = chain(0, 10)
    index.store("a", hashes)
    index.remove("a", hashes[4:5])
    assert index.match(hashes) == {"a": 4}
    assert index.match(hashes[5:]) == {"a": 5}
    assert index.match([]) == {}


def test_a_block_counts_in_whatever_tier_it_is() -> None:
    index = KvIndex()
    hashes = chain(0, 10)
    index.store("a", hashes[:6], "g1")
    index.store("a", hashes[4:], "g2")
    assert index.match(hashes) == {"a": 10}
    index.clear("a", "g1")
    assert index.match(hashes) == {}
    assert index.match(hashes[4:]) == {"a": 6}


def test_a_forgotten_worker_may_come_back_before_the_sweep() -> None:
    index = KvIndex()
    hashes = chain(0, 100)
    index.store("a", hashes)
    index.forget("a")
    index.store("a", hashes[:3])
    assert index.match(hashes) == {"a": 3}
    while index.sweep():
        pass
    assert index.match(hashes) == {"a": 3}
    assert index.map_entries == 3


def test_a_life_forgotten_during_a_sweep_is_swept_by_the_next() -> None:
    index = KvIndex()
    index.store("a", chain(0, 5000))
    index.store("b", chain(1, 5000))
    index.forget("a")
    assert index.sweep(budget=1000)
    index.forget("b")
    while index.sweep(budget=1000):
        pass
    assert index.map_entries == 0


def test_no_more_blocks_than_the_cap() -> None:
    index = KvIndex(max_blocks_per_worker=8)
    hashes = chain(0, 10)
    assert index.store("a", hashes) == 2
    assert index.full("a")
    assert index.match(hashes) == {"a": 8}
    assert index.store("a", hashes[:8]) == 0, "blocks that are known take no room"
    index.remove("a", hashes[7:8])
    assert index.store("a", hashes[7:]) == 2
    assert index.store("b", hashes) == 2, "each worker has a cap of its own"


def test_many_lives_reuse_their_bits() -> None:
    """Bits that were never given back would make every entry of the map larger and larger."""
    index = KvIndex()
    hashes = chain(0, 4)
    for _ in range(1000):
        index.store("a", hashes)
        index.forget("a")
        while index.sweep():
            pass
    index.store("a", hashes)
    assert max(max(shard.values()) for shard in index._shards if shard) == 1


@pytest.mark.parametrize("block", [0, 2**63, 2**64 - 1])
def test_every_hash_of_64_bits_has_a_shard(block: int) -> None:
    index = KvIndex()
    index.store("a", [block])
    assert index.match([block]) == {"a": 1}
