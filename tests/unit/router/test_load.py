"""However a request ends, nothing of it stays."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_box.router.load import LeaseKey, Leases, WorkerLoad

TTL_S = 300.0
_rng = random.Random(7)
CHAIN = tuple(_rng.getrandbits(64) for _ in range(40))
WORKERS = ("a", "b", "c")

keys = st.tuples(st.integers(0, 3), st.integers(0, 5))


class LeasesAgainstALedger(RuleBasedStateMachine):
    """`ledger` is what runs, by lease: (load, blocks of the chain, private blocks, prefill, expiry)."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases(TTL_S)
        self.loads = {name: WorkerLoad() for name in WORKERS}
        self.ledger: dict[LeaseKey, tuple[WorkerLoad, int, int, int, float]] = {}
        self.now = 0.0

    @rule(
        key=keys,
        worker=st.sampled_from(WORKERS),
        blocks=st.integers(0, 40),
        private=st.integers(0, 2),
        prefill=st.integers(0, 999),
    )
    def add(self, key: LeaseKey, worker: str, blocks: int, private: int, prefill: int) -> None:
        load = self.loads[worker]
        if key in self.ledger:
            with pytest.raises(ValueError, match="in use"):
                self._add(key, load, blocks, private, prefill)
            return
        before = load.blocks_with(CHAIN[:blocks], private)
        self._add(key, load, blocks, private, prefill)
        assert load.blocks == before
        self.ledger[key] = (load, blocks, private, prefill, self.now + TTL_S)

    def _add(self, key: LeaseKey, load: WorkerLoad, blocks: int, private: int, prefill: int) -> None:
        self.leases.add(key, load, CHAIN[:blocks], private_blocks=private, prefill_tokens=prefill, now=self.now)

    @rule(key=keys)
    def prefill_done(self, key: LeaseKey) -> None:
        self.leases.prefill_done(key)
        if key in self.ledger:
            load, blocks, private, _, expiry = self.ledger[key]
            self.ledger[key] = (load, blocks, private, 0, expiry)

    @rule(key=keys)
    def release(self, key: LeaseKey) -> None:
        self.leases.release(key)
        self.ledger.pop(key, None)

    @rule(connection=st.integers(0, 3))
    def connection_closes(self, connection: int) -> None:
        self.leases.abandon(connection)
        self.ledger = {key: entry for key, entry in self.ledger.items() if key[0] != connection}

    @rule(connection=st.integers(0, 3), ids=st.lists(st.integers(0, 5)))
    def renew(self, connection: int, ids: list[int]) -> None:
        self.leases.renew(connection, ids, self.now)
        for lease_id in ids:
            entry = self.ledger.get((connection, lease_id))
            if entry is not None:
                self.ledger[connection, lease_id] = (*entry[:4], self.now + TTL_S)

    @rule(seconds=st.sampled_from([1.0, 100.0, 299.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        expired = {key for key, entry in self.ledger.items() if entry[4] <= self.now}
        assert self.leases.expire(self.now) == len(expired)
        for key in expired:
            del self.ledger[key]

    @rule(worker=st.sampled_from(WORKERS))
    def worker_is_replaced(self, worker: str) -> None:
        """Its leases still end one day, and must not touch the load of the worker's next life."""
        self.loads[worker] = WorkerLoad()

    @invariant()
    def loads_are_what_runs(self) -> None:
        while self.leases.settle_one():
            pass
        assert len(self.leases) == len(self.ledger)
        for load in self.loads.values():
            running = [entry for entry in self.ledger.values() if entry[0] is load]
            longest = max((entry[1] for entry in running), default=0)
            assert load.blocks == longest + sum(entry[2] for entry in running)
            assert load.prefill_tokens == sum(entry[3] for entry in running)

    def teardown(self) -> None:
        for key in list(self.ledger):
            self.leases.release(key)
        assert len(self.leases) == 0
        for load in self.loads.values():
            assert (load.blocks, load.prefill_tokens, load.private_blocks) == (0, 0, 0)


TestLeasesAgainstALedger = LeasesAgainstALedger.TestCase
TestLeasesAgainstALedger.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_shared_blocks_count_once() -> None:
    load = WorkerLoad()
    load.add((1, 2, 3), 1)
    load.add((1, 2, 4), 1)
    assert load.blocks == 4 + 2
    assert load.blocks_with((1, 2, 3, 9), 0) == 6 + 1
    load.remove((1, 2, 3), 1)
    assert load.blocks == 3 + 1


def test_there_are_no_more_leases_than_the_cap() -> None:
    leases, load = Leases(TTL_S, max_leases=2), WorkerLoad()
    for lease_id in range(2):
        leases.add((0, lease_id), load, (1,), private_blocks=0, prefill_tokens=0, now=0.0)
    assert leases.full
    with pytest.raises(ValueError, match="2 already"):
        leases.add((0, 2), load, (1,), private_blocks=0, prefill_tokens=0, now=0.0)
    leases.abandon(0)
    assert leases.full, "what is not settled still holds memory"
    ended = Counter(leases.settle_one() for _ in range(2))
    assert ended == {True: 1, False: 1}
    assert not leases.full
