"""The block pool, and the scheduler on top of it, against what they promise."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.kv.hashing import chain_digests
from dynamo_box.protocol.request import Sampling, Transfer, pack_tokens
from engines.contract import Output, RemovedBlocks, SequenceRequest, StoredBlocks
from engines.mock.cache import BlockPool
from engines.mock.scheduler import Scheduler
from engines.mock.sequence import MockSequence

KEY = b"k" * 32
SIZE = 4


def chain(*tokens: int) -> list[bytes]:
    return chain_digests(pack_tokens(tokens), SIZE, KEY)


def store(pool: BlockPool, digests: list[bytes]) -> list[bytes]:
    """Fill blocks as one sequence would, and leave them for reuse."""
    found = digests[: pool.match(digests)]
    pool.hold(found)
    evicted = pool.open(len(digests) - len(found))
    for digest in digests[len(found) :]:
        assert pool.seal(digest)
    pool.release(digests, 0)
    return evicted


def test_a_prefix_is_found_as_far_as_it_is_cached() -> None:
    pool = BlockPool(10)
    store(pool, chain(*range(12)))
    assert pool.match(chain(*range(12))) == 3
    assert pool.match(chain(*range(8), 99, 99, 99, 99)) == 2
    assert pool.match(chain(99, *range(11))) == 0
    assert (pool.used, pool.idle, pool.available) == (0, 3, 10)


def test_what_was_used_least_recently_goes_first_and_children_before_parents() -> None:
    pool = BlockPool(4)
    old, new = chain(*range(8)), chain(*range(100, 108))
    store(pool, old)
    store(pool, new)
    assert pool.open(1) == [old[1]]
    assert pool.open(2) == [old[0], new[1]]
    pool.release([], 3)


def test_blocks_in_use_are_never_evicted() -> None:
    pool = BlockPool(3)
    digests = chain(*range(8))
    store(pool, digests)
    pool.hold(digests)
    assert pool.open(1) == []
    with pytest.raises(ValueError, match="1 blocks wanted, 0 available"):
        pool.open(1)


def test_two_sequences_that_computed_the_same_block_share_it() -> None:
    pool = BlockPool(4)
    (digest,) = chain(1, 2, 3, 4)
    pool.open(2)
    assert pool.seal(digest)
    assert not pool.seal(digest)
    assert pool.used == 1
    pool.release([digest], 0)
    assert (pool.used, pool.idle) == (1, 0)
    pool.release([digest], 0)
    assert (pool.used, pool.idle) == (0, 1)
    pool.check_integrity()


def scheduler(blocks: int = 20, **changes: int) -> Scheduler:
    options = {"context_length": 200, "max_batch": 4, "chunk_tokens": 16, **changes}
    return Scheduler(BlockPool(blocks), block_size=SIZE, ordinary=range(1000), **options)


def request(key: int, tokens: list[int], max_tokens: int, **sampling: int) -> SequenceRequest:
    return SequenceRequest(key, f"r{key}", tokens, Sampling(max_tokens, temperature=0.0, **sampling), KEY)


class Told:
    """What the sink was told, with the index that the events add up to."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}
        self.index: set[bytes] = set()
        self.cached: dict[int, int] = {}

    def add(self, outputs: list[Output], events: list[StoredBlocks] | list[RemovedBlocks]) -> None:
        for event in events:
            if isinstance(event, StoredBlocks):
                assert not event.parent or event.parent in self.index
                assert self.index.isdisjoint(event.digests)
                self.index.update(event.digests)
            else:
                assert self.index.issuperset(event.digests)
                self.index.difference_update(event.digests)
        for output in outputs:
            assert output.key not in self.finish, "a sequence that has ended says no more"
            self.outputs.setdefault(output.key, []).extend(output.tokens)
            self.cached[output.key] = self.cached.get(output.key, 0) + output.cached_tokens
            if output.finish is not None:
                self.finish[output.key] = output.finish


def step(engine: Scheduler, told: Told) -> bool:
    work = engine.plan()
    told.add(work.ended, work.removed)
    assert set(engine.pool.cached()) == told.index
    told.add(*engine.commit(work))
    assert set(engine.pool.cached()) == told.index
    engine.pool.check_integrity()
    return bool(work.shares or work.ended)


def run_out(engine: Scheduler, told: Told) -> None:
    for _ in range(100_000):
        if not step(engine, told):
            return
    raise AssertionError("it never comes to an end")


def alone(tokens: list[int], max_tokens: int) -> list[int]:
    engine, told = scheduler(blocks=100), Told()
    engine.add(request(1, tokens, max_tokens))
    run_out(engine, told)
    return told.outputs[1]


def test_a_prompt_is_computed_in_chunks_and_reuse_leaves_one_token_at_least() -> None:
    engine, told = scheduler(), Told()
    prompt = list(range(40))
    for key, steps in ((1, 3), (2, 1)):
        engine.add(request(key, prompt, max_tokens=1))
        for _ in range(steps):
            assert key not in told.outputs
            step(engine, told)
        assert len(told.outputs[key]) == 1
    assert told.cached == {1: 0, 2: 36}


def test_who_finds_no_place_waits_and_is_served_later() -> None:
    engine, told = scheduler(blocks=100, max_batch=2), Told()
    for key in range(5):
        engine.add(request(key, [key] * 5, max_tokens=6))
    step(engine, told)
    assert (engine.running, engine.waiting) == (2, 3)
    run_out(engine, told)
    assert set(told.finish.values()) == {"length"}
    assert all(len(tokens) == 6 for tokens in told.outputs.values())


def test_when_blocks_run_out_the_last_one_gives_way_and_loses_nothing() -> None:
    engine, told = scheduler(blocks=8), Told()
    first, second = [1] * 8, [2] * 8
    engine.add(request(1, first, max_tokens=20))
    engine.add(request(2, second, max_tokens=20))
    run_out(engine, told)
    assert told.outputs == {1: alone(first, 20), 2: alone(second, 20)}
    assert engine.pool.used == 0


def test_a_sequence_ends_where_context_or_pool_end() -> None:
    engine, told = scheduler(blocks=5), Told()
    engine.add(request(1, [1] * 10, max_tokens=1000))
    run_out(engine, told)
    assert (len(told.outputs[1]), told.finish[1]) == (10, "length")


def test_stop_tokens_end_a_sequence_as_the_contract_says() -> None:
    tokens = alone([1, 2, 3], 10)
    stop = {"stop_token_ids": (tokens[4],)}
    first = tokens.index(tokens[4]) + 1
    for key, sampling, length, finish in (
        (1, stop, first, "stop"),
        (2, {**stop, "ignore_eos": True}, 10, "length"),
        (3, {**stop, "min_tokens": 8}, 10, "length"),
    ):
        engine, told = scheduler(), Told()
        engine.add(request(key, [1, 2, 3], 10, **sampling))
        run_out(engine, told)
        assert (len(told.outputs[key]), told.finish[key]) == (length, finish)


def test_a_request_that_goes_on_elsewhere_gets_the_same_rest() -> None:
    prompt = list(range(10))
    whole = alone(prompt, 30)
    assert whole[12:] == alone(prompt + whole[:12], 18)


@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(4, 40), max_batch=st.integers(1, 6))
def test_any_mix_ends_with_each_its_own_output_and_an_index_that_adds_up(
    seed: int, blocks: int, max_batch: int
) -> None:
    chance = random.Random(seed)
    engine, told = scheduler(blocks, max_batch=max_batch, chunk_tokens=chance.choice([1, 5, 16, 64])), Told()
    requests = {}
    for key in range(chance.randrange(1, 15)):
        prompt = [chance.randrange(2)] * chance.randrange(1, engine.longest)
        requests[key] = request(key, prompt, chance.randrange(1, 40))
        engine.add(requests[key])
        if chance.random() < 0.2:
            engine.cancel(chance.randrange(key + 1))
        for _ in range(chance.randrange(4)):
            step(engine, told)
    run_out(engine, told)
    assert told.finish.keys() == requests.keys()
    assert (engine.running, engine.waiting, engine.pool.used) == (0, 0, 0)
    for key, each in requests.items():
        undisturbed = alone(each.tokens, each.sampling.max_tokens)
        tokens = told.outputs[key]
        assert tokens == undisturbed[: len(tokens)]
        if told.finish[key] == "length":
            assert len(tokens) == min(each.sampling.max_tokens, engine.longest - len(each.tokens))


class LegsAtRandom:
    """One scheduler whose legs' KV takes any number of steps to leave or to arrive, and sometimes never does."""

    def __init__(self, engine: Scheduler, chance: random.Random, *, failing: bool) -> None:
        self.engine, self.chance, self.failing, self.told = engine, chance, failing, Told()
        self.copying: list[tuple[MockSequence, bool]] = []
        self.computed = 0

    def step(self) -> bool:
        work = self.engine.plan()
        self.told.add(work.ended, work.removed)
        self.copying += [(sequence, False) for sequence in work.arriving]
        copied = self.chance.random() < 0.5 and self._copied()  # while the step computes
        self.computed += work.prompt_tokens
        self.told.add(*self.engine.commit(work))
        self.copying += [(sequence, True) for sequence in work.prefilled]
        assert set(self.engine.pool.cached()) == self.told.index
        self.engine.pool.check_integrity()
        copied = copied or (not work.shares and self._copied())
        return bool(work.shares or work.ended or copied)

    def _copied(self) -> bool:
        if not self.copying:
            return False
        sequence, leaving = self.copying.pop(self.chance.randrange(len(self.copying)))
        if leaving:
            self.told.add(self.engine.handed_over(sequence, Transfer(b"k" * 16, 1)), [])
        elif self.failing and self.chance.random() < 0.3:
            self.engine.compute_instead(sequence)
        else:
            self.told.add([], self.engine.arrived(sequence, sequence.arriving))
        return True

    def run_out(self) -> None:
        for _ in range(100_000):
            if not self.step():
                assert (self.engine.running, self.engine.waiting, self.engine.pool.used) == (0, 0, 0)
                return
        raise AssertionError("it never comes to an end")


@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.sampled_from([10, 12, 20, 500]),
    max_batch=st.integers(1, 5),
    failing=st.booleans(),
)
def test_any_mix_of_legs_ends_with_what_one_leg_would_have_said_and_leaks_nothing(
    seed: int, blocks: int, max_batch: int, failing: bool
) -> None:
    chance = random.Random(seed)
    prefill = LegsAtRandom(scheduler(blocks, max_batch=max_batch), chance, failing=failing)
    decode = LegsAtRandom(scheduler(blocks, max_batch=max_batch), chance, failing=failing)
    prompts = {key: [chance.randrange(2)] * chance.randrange(1, 20) for key in range(chance.randrange(1, 10))}
    cancelled: set[int] = set()
    for key, prompt in prompts.items():
        prefill.engine.add(msgspec.structs.replace(request(key, prompt, 12), leg="prefill"))
        if chance.random() < 0.15:
            cancelled.add(key)
            prefill.engine.cancel(key)
        prefill.step()
    prefill.run_out()
    for key, prompt in prompts.items():
        assert prefill.told.finish[key] == ("cancelled" if key in cancelled else "prefilled")
        first = prefill.told.outputs[key]
        if key in cancelled:
            continue
        assert len(first) == 1
        leg = msgspec.structs.replace(
            request(key, prompt + first, 11), leg="decode", transfer=Transfer(b"k" * 16, len(prompt))
        )
        decode.engine.add(leg)
        if chance.random() < 0.15:
            cancelled.add(key)
            decode.engine.cancel(key)
        decode.step()
    decode.run_out()
    for key, prompt in prompts.items():
        whole, tokens = alone(prompt, 12), prefill.told.outputs[key] + decode.told.outputs.get(key, [])
        assert tokens == (whole[: len(tokens)] if key in cancelled else whole)
    if blocks == 500 and not failing:
        assert decode.computed == 0, "there was room for all, so nobody computed what had arrived"
