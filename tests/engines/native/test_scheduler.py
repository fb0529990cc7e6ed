"""The scheduler with pretended computing: every sequence gets all its tokens, every block comes back."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_box.protocol.request import Sampling
from engines.contract import SequenceRequest
from engines.native.blocks import BlockPool
from engines.native.scheduler import Scheduler
from engines.native.sequence import Sequence

BLOCK = 4


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request that comes before `step` and is cancelled `cancel_after` steps later, if it lives."""

    step: int
    prompt: int
    output: int
    priority: int
    cancel_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        prompt=st.integers(1, 20),
        output=st.integers(1, 12),
        priority=st.integers(0, 2),
        cancel_after=st.none() | st.integers(0, 10),
    ),
    min_size=1,
    max_size=12,
)


def make_sequence(number: int, arrival: Arrival) -> Sequence:
    """Prompts of one token throughout, so that they share their prefixes."""
    sampling = Sampling(max_tokens=arrival.output, ignore_eos=True)
    request = SequenceRequest(number, f"r{number}", [1] * arrival.prompt, sampling, b"k", priority=arrival.priority)
    return Sequence.of(request, number, frozenset())


@settings(max_examples=200, deadline=None)
@given(arrivals=arrivals, blocks=st.integers(8, 20), batch=st.integers(1, 5), extra=st.integers(0, 20))
def test_everything_ends_within_bounds(arrivals: list[Arrival], blocks: int, batch: int, extra: int) -> None:
    """32 tokens fit the smallest pool, and no sequence grows beyond them."""
    pool = BlockPool(blocks)
    budget = batch + extra
    scheduler = Scheduler(pool, block_size=BLOCK, max_batch=batch, max_batch_tokens=budget)
    living: dict[int, tuple[Sequence, Arrival]] = {}
    coming = dict(enumerate(arrivals))
    step = 0
    while coming or living:
        for number in [n for n, arrival in coming.items() if arrival.step <= step]:
            arrival = coming.pop(number)
            living[number] = (make_sequence(number, arrival), arrival)
            scheduler.add(living[number][0])
        for number, (sequence, arrival) in list(living.items()):
            if arrival.cancel_after is not None and arrival.step + arrival.cancel_after <= step:
                scheduler.remove(sequence)
                del living[number]

        works = scheduler.schedule()
        assert bool(works) == bool(living), "a step without work though someone waits"
        assert sum(work.count for work in works) <= budget
        assert len(scheduler.running) <= batch
        sampling = [work.sequence for work in works if work.samples]
        for work in works:
            assert 0 < work.count <= work.sequence.remaining
            assert len(work.sequence.blocks) * BLOCK >= work.sequence.computed + work.count
            scheduler.computed(work)
        for sequence in sampling:
            assert sequence.remaining == 0
            sequence.tokens.append(2)
            if sequence.finish_after(2, context_length=BLOCK * blocks):
                assert sequence.generated == sequence.request.sampling.max_tokens
                scheduler.remove(sequence)
                del living[sequence.request.key]
        pool.check_integrity()
        step += 1
        assert step < 2000, "no end in sight"
    assert pool.held == 0
    pool.check_idle()


def test_the_last_token_of_a_cached_prompt_is_still_computed() -> None:
    pool = BlockPool(8)
    scheduler = Scheduler(pool, block_size=BLOCK, max_batch=2, max_batch_tokens=64)
    for number, cached in ((0, 0), (1, BLOCK)):
        sequence = make_sequence(number, Arrival(0, 2 * BLOCK, 1, 0, None))
        scheduler.add(sequence)
        (work,) = scheduler.schedule()
        assert (sequence.cached_tokens, work.count) == (cached, 2 * BLOCK - cached)
        scheduler.computed(work)
        scheduler.remove(sequence)


def test_the_youngest_gives_way_and_keeps_its_place_in_the_queue() -> None:
    pool = BlockPool(5)
    scheduler = Scheduler(pool, block_size=BLOCK, max_batch=4, max_batch_tokens=64)
    old, young, late = (make_sequence(n, Arrival(0, p, 9, 0, None)) for n, p in ((0, 8), (1, 6), (2, 1)))
    for sequence in (old, young):
        sequence.tokens[0] = 10 + sequence.arrival
        scheduler.add(sequence)
    steps = 0
    while young in scheduler.running or not steps:
        for work in scheduler.schedule():
            scheduler.computed(work)
            work.sequence.tokens.append(2)
        steps += 1
    scheduler.add(late)
    assert scheduler.running == [old]
    assert scheduler.waiting == [young, late]
    assert scheduler.preemptions == 1
