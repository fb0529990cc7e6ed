"""Tiers and scheduler together; computing and copying are pretended. A block is used only with what it should hold."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_box import BLOCK, LAYOUT, Box, Sizes, sizes

from dynamo_box.kv.client.jobs import Fetch, Offer, Seek
from dynamo_box.kv.onboard import PROBE_AFTER
from dynamo_box.protocol.request import PriorityRange
from engines.native.onboarding import PrefillRate
from engines.native.sequence import Sequence
from engines.shell_canary import _request as canary_request


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    family: int
    prompt: int
    output: int
    priority: int
    kv_priority: int | None
    cancel_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        family=st.integers(0, 2),
        prompt=st.integers(1, 20),
        output=st.integers(1, 12),
        priority=st.integers(0, 2),
        kv_priority=st.none() | st.integers(0, 100),
        cancel_after=st.none() | st.integers(0, 10),
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=300, deadline=None)
@given(arrivals=arrivals, sizes=sizes, seed=st.integers(0, 1000))
def test_whatever_the_tiers_do_each_block_has_its_content_and_everything_ends(
    arrivals: list[Arrival], sizes: Sizes, seed: int
) -> None:
    """Answers come when they like, copies fail, the store comes and goes."""
    rng = random.Random(seed)
    box = sizes.box()
    coming, cancels, step = list(arrivals), dict[int, list[Sequence]](), 0
    while coming or box.living:
        for arrival in [one for one in coming if one.step <= step]:
            coming.remove(arrival)
            prompt = [10 + arrival.family] * arrival.prompt
            sequence = box.add(prompt, arrival.output, priority=arrival.priority, kv_priority=arrival.kv_priority)
            if arrival.cancel_after is not None:
                cancels.setdefault(step + arrival.cancel_after, []).append(sequence)
        for sequence in cancels.pop(step, []):
            sequence.cancelled = True
        box.store.status = "gone" if rng.random() < 0.05 else ""
        box.step()
        for job in list(box.store.jobs):
            if rng.random() < 0.4:
                box.tiering.take(box.store.answer(job, lambda p: rng.random() < p), box.scheduler)
        step += 1
        assert step < 3000, "no end in sight"
    box.run()
    assert box.pool.held == box.pool.pinned == 0
    box.pool.check_idle()
    assert not box.store.leases, "a lease was forgotten"


def test_a_prompt_that_the_tiers_have_is_loaded_but_for_its_last_token() -> None:
    box = Box()
    box.add([1] * 12)
    box.run()
    assert [len(offer.blocks) for offer in box.store.offers] == [3]
    box.forget()
    sequence = box.add([1] * 12)
    assert not box.step(), "it waits for the lookup"
    (seek,) = box.store.jobs
    assert isinstance(seek, Seek)
    assert len(seek.digests) == 2, "the last block holds the token that samples"
    box.answer()
    assert not box.step(), "it waits for its blocks"
    (fetch,) = box.store.jobs
    assert isinstance(fetch, Fetch)
    assert fetch.pool_blocks == tuple(sequence.blocks[:2])
    box.answer()
    assert sequence.cached_tokens == sequence.computed == 8
    assert len(box.pool.match(sequence.digests)) == 2
    assert box.step()


def test_others_compute_while_one_loads() -> None:
    box = Box()
    box.add([1] * 12)
    box.run()
    box.forget()
    loading = box.add([1] * 12)
    box.step()
    box.answer(Seek)
    other = box.add([2] * 9, output=6)
    box.step()
    box.answer(Seek)
    for _ in range(6):
        assert box.step()
        assert loading.loading
    assert other not in box.living


@pytest.mark.parametrize("fails", [False, True])
def test_what_comes_together_with_the_same_prefix_is_loaded_once(fails: bool) -> None:
    box = Box()
    box.add([1] * 17)
    box.run()
    box.forget()
    alike = [box.add([1] * length) for length in (9, 17, 17)]
    other = box.add([2] * 9, output=3)
    box.step()
    box.answer(Seek)
    box.compute()
    assert sum(isinstance(job, Fetch) for job in box.store.jobs) == 1
    assert [one.loading for one in alike] == [True, False, False]
    assert other.computed == 9, "it passes by"
    box.answer(Fetch, lambda _: fails)
    box.step()
    later = [job for job in box.store.jobs if isinstance(job, Fetch)]
    assert [(job.skip, len(job.pool_blocks)) for job in later] == [(0, 4) if fails else (2, 2)]
    box.run()
    assert [one.cached_tokens for one in alike] == [0 if fails else 8, 16, 16]


def test_what_the_pool_got_meanwhile_is_skipped() -> None:
    box = Box(batch=2)
    box.add([1] * 17)
    box.run()
    box.forget()
    first, second = box.add([1] * 9), box.add([1] * 17)
    box.step()
    box.answer(Seek)
    box.scheduler.waiting.remove(second)
    box.step()
    box.answer()
    assert first.computed == 8
    box.scheduler.add(second)
    box.step()
    (fetch,) = [job for job in box.store.jobs if isinstance(job, Fetch)]
    assert (fetch.skip, len(fetch.pool_blocks)) == (2, 2)
    box.run()
    assert second.cached_tokens == 16


def test_what_the_pool_lost_meanwhile_is_looked_up_again() -> None:
    box = Box(blocks=8, batch=2)
    box.add([1] * 17)
    box.run()
    busy = box.add([3] * 8, output=20)
    box.compute()
    sequence = box.add([1] * 30)
    box.step()
    assert len([job for job in box.store.jobs if isinstance(job, Seek)]) == 1
    box.answer(Seek)
    assert sequence.sought is not None
    assert sequence.sought.first == 4
    while busy in box.living:
        box.step()
        box.answer(Offer)
    assert len(box.pool.match(sequence.digests)) < 4
    box.run()
    assert sequence.cached_tokens == 16
    assert box.store.loaded > 0


def test_a_lease_that_is_of_no_use_is_given_back() -> None:
    box = Box(batch=1)
    box.add([1] * 17)
    box.run()
    box.forget()
    busy = box.add([2] * 5, output=40)
    box.compute()
    waits, overtaken = box.add([1] * 17), box.add([1] * 16)
    box.step()
    box.answer()
    assert len(box.store.leases) == 1, "only the next few are looked up"
    waits.cancelled = True
    box.step()
    assert not box.store.leases
    box.answer()
    urgent = box.add([1] * 15, priority=5)
    box.step()
    box.answer()
    box.step()
    assert box.store.leases
    assert overtaken.sought is None
    assert urgent.sought is not None
    busy.cancelled = True
    box.run()
    assert not box.store.leases


@pytest.mark.parametrize("answered", [False, True])
def test_a_sequence_that_is_cancelled_while_it_is_looked_up_leaves_no_lease(answered: bool) -> None:
    box = Box()
    box.add([1] * 12)
    box.run()
    box.forget()
    sequence = box.add([1] * 12)
    box.step()
    if answered:
        sequence.cancelled = True
        box.answer()
        box.step()
    else:
        sequence.cancelled = True
        box.step()
        box.answer()
    assert not box.living
    assert not box.store.leases


def test_a_sequence_that_is_cancelled_while_it_loads_ends_after_the_copy() -> None:
    box = Box()
    box.add([1] * 12)
    box.run()
    box.forget()
    sequence = box.add([1] * 12)
    box.step()
    box.answer()
    box.step()
    sequence.cancelled = True
    box.step()
    assert sequence in box.living
    assert box.contents.written == set(sequence.blocks[:2])
    box.answer()
    box.step()
    assert not box.living
    assert len(box.pool.match(sequence.digests)) == 2, "what was loaded is of use to others"


def test_blocks_that_are_pinned_are_waited_for() -> None:
    """A sequence that needs the whole pool doesn't take what is being copied, and gets it at last."""
    box = Box(blocks=8)
    box.add([1] * 5)
    box.compute()
    assert box.pool.pinned == 1
    sequence = box.add([2] * 30)
    for _ in range(3):
        assert not box.step()
        box.answer(Seek)
    assert not sequence.blocks
    box.answer(Offer)
    assert box.step()
    assert sequence not in box.living


def test_a_sequence_that_grows_waits_for_what_copies_hold() -> None:
    """Nobody gives his blocks back for it: what loads can't, and for what is pinned it isn't worth it."""
    box = Box(blocks=8)
    box.add([1] * 12)
    box.run()
    box.forget()
    loads = box.add([1] * 9)
    box.step()
    box.answer(Seek)
    box.step()
    assert loads.loading
    grows = box.add([2] * 12, output=9, priority=1)
    box.compute()
    taken = box.pool.allocate(box.pool.available)
    assert not box.step()
    assert box.scheduler.running == [loads, grows]
    assert box.scheduler.preemptions == 0
    box.pool.release(taken)
    assert box.step()
    box.run()


def test_what_a_preempted_sequence_lost_is_loaded() -> None:
    box = Box(blocks=8, batch=2)
    young, old = box.add([2] * 8, output=20), box.add([1] * 8, output=20, priority=1)
    box.run()
    assert box.scheduler.preemptions > 0
    assert box.store.loaded > 0
    assert young.generated == old.generated == 20


def test_what_is_evicted_before_its_turn_is_not_offered() -> None:
    box = Box(blocks=8, pinned_blocks=1)
    box.add([1] * 16)
    while box.living:
        box.step()
        box.answer(Seek)
    assert box.tiering.figures.queued == 3
    box.add([2] * 27)
    box.step()
    box.answer(Seek)
    box.step()
    box.answer(Offer)
    box.run()
    assert box.tiering.figures.dropped["evicted"] > 0


def test_the_queue_has_an_end() -> None:
    box = Box(queue_blocks=2)
    box.add([1] * 40)
    box.step()
    box.answer(Seek)
    box.step()
    assert box.tiering.figures.dropped == {"queue_full": 8}
    box.run()
    assert len(box.store.stored) == 2
    box.add([1] * 40)
    box.run()
    assert len(box.store.stored) == 4, "what was dropped is offered when it is used again"


def test_what_is_computed_faster_than_loaded_is_computed_but_now_and_then_it_is_tried() -> None:
    box = Box()
    box.add([1] * 12)
    box.run()
    box.tiering.measured(prompt_tokens=1000, other_tokens=0, seconds=1.0)
    box.store.speed = LAYOUT.block_bytes / 0.1
    for tries in range(1, PROBE_AFTER):
        box.forget()
        sequence = box.add([1] * 12)
        box.run()
        assert sequence.cached_tokens == 0
        assert (box.tiering.figures.recomputes, box.tiering.figures.loads) == (tries, 0)
        assert not box.store.leases
    box.forget()
    sequence = box.add([1] * 12)
    box.run()
    assert (sequence.cached_tokens, box.tiering.figures.loads) == (8, 1)
    box.store.speed = LAYOUT.block_bytes / 0.001
    box.forget()
    box.add([1] * 12)
    box.run()
    assert box.tiering.figures.loads == 2


def test_the_prefill_rate_is_that_of_steps_with_prompts() -> None:
    rate = PrefillRate()
    rate.add(prompt_tokens=0, other_tokens=8, seconds=1.0)
    rate.add(prompt_tokens=40, other_tokens=60, seconds=1.0)
    assert rate.value is None
    rate.add(prompt_tokens=90, other_tokens=10, seconds=1.0)
    assert rate.value == 100.0
    rate.add(prompt_tokens=300, other_tokens=0, seconds=1.0)
    assert 200.0 < rate.value < 300.0


def offered(box: Box) -> list[int | None]:
    """Priorities of all blocks that were offered, in order."""
    box.run()
    return [block.priority for offer in box.store.offers for block in offer.blocks]


def test_priorities_travel_with_the_blocks_and_back() -> None:
    box = Box()
    ranges = (PriorityRange(0, 4, 80), PriorityRange(4, 8, 20), PriorityRange(8, 10, 30))
    box.add([1] * 17, kv_priority=50, kv_priorities=ranges)
    assert offered(box) == [80, 20, 50, 50]
    box.forget()
    box.add([1] * 17, kv_priority=10)
    assert offered(box)[4:] == [], "they came from there"
    box.tiering.queue_everything()
    assert offered(box)[4:] == [80, 20, 50, 50]


def test_the_filter_stops_at_the_first_lower_block() -> None:
    box = Box(min_priority=50)
    ranges = (PriorityRange(8, 12, 10),)
    box.add([1] * 16, output=5, kv_priority=60, kv_priorities=ranges)
    assert offered(box) == [60, 60]
    figures = box.tiering.figures
    assert (figures.filtered, figures.unset, figures.terminated) == (3, 0, {"priority": 1})


def test_the_filter_goes_on_if_it_is_told_to() -> None:
    box = Box(min_priority=50, continue_after_filter=True)
    ranges = (PriorityRange(8, 12, 10),)
    box.add([1] * 16, kv_priority=60, kv_priorities=ranges)
    assert offered(box) == [60, 60, 60]
    assert [len(offer.blocks) for offer in box.store.offers] == [2, 1]
    figures = box.tiering.figures
    assert (figures.filtered, figures.terminated) == (1, {})


def test_an_unset_priority_is_allowed_and_counted() -> None:
    box = Box(min_priority=50)
    box.add([1] * 9)
    assert offered(box) == [None, None]
    assert (box.tiering.figures.unset, box.tiering.figures.filtered) == (2, 0)


def test_a_later_request_is_judged_anew() -> None:
    box = Box(min_priority=50)
    box.add([1] * 9, kv_priority=49)
    assert offered(box) == []
    box.add([1] * 9, kv_priority=50)
    assert offered(box) == [50, 50]
    box.add([1] * 9, kv_priority=40)
    box.add([1] * 9, kv_priority=50)
    assert offered(box) == [50, 50], "the tiers have it"
    box.add([1] * 9, kv_priority=90)
    assert offered(box) == [50, 50, 90, 90], "and learn that it is worth more"
    assert box.tiering.figures.terminated == {"priority": 2}


def test_priorities_that_make_no_sense_end_that_requests_offload_only() -> None:
    box = Box()
    box.add([1] * 9, kv_priorities=(PriorityRange(0, 10, 50),))
    box.add([2] * 9)
    assert offered(box) == [None, None]
    assert box.tiering.figures.terminated == {"length_mismatch": 1}


def test_without_a_store_nothing_waits() -> None:
    box = Box()
    box.store.status = "no store"
    box.add([1] * 12)
    assert box.step()
    assert not any(isinstance(job, Seek) for job in box.store.jobs)


def test_before_a_sleep_everything_is_offered_heads_first() -> None:
    box = Box(blocks=256, budget=128, queue_blocks=1)
    for token in (1, 2):
        box.add([token] * 81)
        box.run()
    assert len(box.store.stored) == 2
    box.store.offers.clear()
    box.tiering.queue_everything()
    box.run()
    assert len(box.store.stored) == 40
    offers = [[offer.blocks[0].parent, len(offer.blocks)] for offer in box.store.offers]
    assert [count for _, count in offers] == [16, 16, 4, 4]
    assert [parent == b"" for parent, _ in offers] == [True, True, False, False]


def test_a_load_that_fails_leaves_no_garbage_behind() -> None:
    box = Box()
    box.add([1] * 13)
    box.run()
    box.forget()
    sequence = box.add([1] * 13)
    box.step()
    box.answer(Seek)
    box.step()
    (fetch,) = [job for job in box.store.jobs if isinstance(job, Fetch)]
    box.tiering.take(box.store.answer(fetch, lambda p: p == 0.2), box.scheduler)
    good = sequence.computed // BLOCK
    assert good < 3
    assert all(box.contents.of[block] == () for block in sequence.blocks[good:3])
    box.run()


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 16, 64])
def test_the_canary_is_computed_whatever_the_tiers_have(block_size: int) -> None:
    """None of its blocks but that of its last token is full, and that one is always computed."""
    tokens = canary_request(-1, block_size).tokens
    assert (len(tokens) - 1) // block_size == 0
