"""Both legs of requests in one engine whose computing and copying are pretended. Any order of answers, any failure."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from fake_store import GARBAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_box import BLOCK, Box, Sizes, sizes

from dynamo_box.kv.client.jobs import Fetch, Keep, Kept, Offer, Offered, Seek
from dynamo_box.protocol.request import PriorityRange, Transfer
from engines.native.legs import BUSY_INTERVAL_S, BUSY_PATIENCE_S
from engines.native.sequence import Sequence

TOKEN = 2
"""What the box always samples."""
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 2]


def add_prefill(box: Box, prompt: list[int], **request: Any) -> Sequence:
    return box.add(prompt, output=20, leg="prefill", **request)


def add_decode(box: Box, prefill: Sequence, output: int = 5, **request: Any) -> Sequence:
    transfer = transfer_of(prefill)
    return box.add([*prefill.request.tokens, TOKEN], output, leg="decode", transfer=transfer, **request)


def transfer_of(prefill: Sequence) -> Transfer:
    assert prefill.outcome is not None
    assert prefill.outcome.transfer is not None, prefill.outcome.error
    return prefill.outcome.transfer


def jobs(box: Box, kind: type) -> list[Any]:
    return [job for job in box.store.jobs if isinstance(job, kind)]


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    family: int
    prompt: int
    legs: bool
    must: bool
    priority: int
    kv_priority: int | None
    cancel_after: int | None
    decode_after: int
    decode_cancel_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        family=st.integers(0, 2),
        prompt=st.integers(1, 20),
        legs=st.booleans(),
        must=st.booleans(),
        priority=st.integers(0, 2),
        kv_priority=st.none() | st.integers(0, 100),
        cancel_after=st.none() | st.integers(0, 10),
        decode_after=st.integers(0, 10),
        decode_cancel_after=st.none() | st.integers(0, 10),
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=300, deadline=None)
@given(arrivals=arrivals, sizes=sizes, seed=st.integers(0, 1000))
def test_whatever_happens_each_block_has_its_content_and_nothing_is_left_held(
    arrivals: list[Arrival], sizes: Sizes, seed: int
) -> None:
    """Answers come when they like, copies fail, the store forgets blocks, comes and goes."""
    rng = random.Random(seed)
    box = sizes.box()
    coming, going_on, cancels, step = list(arrivals), dict[int, list[Any]](), dict[int, list[Sequence]](), 0
    prefills: list[tuple[Arrival, Sequence]] = []
    decodes: list[Sequence] = []
    while coming or box.living or going_on or prefills:
        for arrival in [one for one in coming if one.step <= step]:
            coming.remove(arrival)
            prompt = [10 + arrival.family] * arrival.prompt
            leg = "prefill" if arrival.legs else "whole"
            sequence = box.add(prompt, 6, priority=arrival.priority, kv_priority=arrival.kv_priority, leg=leg)
            if arrival.legs:
                prefills.append((arrival, sequence))
            if arrival.cancel_after is not None:
                cancels.setdefault(step + arrival.cancel_after, []).append(sequence)
        for arrival, prefill in going_on.pop(step, []):
            decode = add_decode(box, prefill, priority=arrival.priority, must_transfer=arrival.must)
            decodes.append(decode)
            if arrival.decode_cancel_after is not None:
                cancels.setdefault(step + arrival.decode_cancel_after, []).append(decode)
        for sequence in cancels.pop(step, []):
            if sequence in box.living:
                box.cancel(sequence)
        box.store.status = "gone" if rng.random() < 0.05 else ""
        box.step()
        for job in box.store.due():
            if rng.random() < 0.4 and (not isinstance(job, Keep) or job in box.store.due()):
                box.tiering.take(box.store.answer(job, lambda p: rng.random() < p), box.scheduler)
        if rng.random() < 0.1 and box.store.stored:
            leased = {
                digest for digests in [*box.store.leases.values(), *box.store.holds.values()] for digest in digests
            }
            lost = rng.choice(list(box.store.stored))
            if lost not in leased:
                del box.store.stored[lost]
        for arrival, prefill in [one for one in prefills if one[1] not in box.living]:
            prefills.remove((arrival, prefill))
            if not prefill.cancelled and prefill.outcome is not None and prefill.outcome.transfer is not None:
                going_on.setdefault(step + 1 + arrival.decode_after, []).append((arrival, prefill))
        step += 1
        assert step < 3000, "no end in sight"
    box.run()
    for decode in decodes:
        failed = decode.outcome is not None and bool(decode.outcome.error)
        assert decode.cancelled or failed or decode.generated == 5
        assert not failed or decode.request.must_transfer
    figures = box.figures()
    assert figures.taken_over <= figures.handed_over
    assert box.pool.held == box.pool.pinned == 0
    box.pool.check_idle()
    assert not box.store.leases, "a lease was forgotten"
    assert not box.store.holds, "a hold was forgotten"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("forget", [True, False])
def test_a_decode_leg_computes_nothing_of_its_prompt(length: int, forget: bool) -> None:
    """Whether the pool has the full blocks already, or not; the partial one it must load."""
    box = Box()
    prefill = add_prefill(box, [1] * length)
    box.run()
    assert box.computed_prompt_tokens == length
    assert (prefill.generated, transfer_of(prefill).tokens) == (1, length)
    assert list(box.store.holds) == [transfer_of(prefill).key]
    full, rest = divmod(length, BLOCK)
    assert len(box.store.stored) == full + bool(rest)
    assert len(box.pool.match(prefill.digests)) == full, "the partial block has no name in the pool"
    if forget:
        box.forget()
    decode = add_decode(box, prefill)
    (seek,) = jobs(box, Seek)
    assert seek.claim == transfer_of(prefill).key
    box.run()
    assert decode.cached_tokens == length
    assert decode.generated == 5
    assert box.computed_prompt_tokens == length
    assert box.store.loaded == (full + bool(rest) if forget else bool(rest))
    assert not box.store.holds
    assert not box.store.leases
    figures = box.figures()
    assert (figures.handed_over, figures.taken_over, figures.transfers_failed) == (1, 1, 0)


def test_most_blocks_go_while_the_prompt_is_computed_and_none_twice() -> None:
    box = Box(blocks=128, budget=8)
    prefill = add_prefill(box, [1] * 42)
    box.compute()
    while not prefill.handing:
        box.answer()
        box.step()
    assert [len(offer.blocks) for offer in jobs(box, Offer) if offer.key < 0] == [1], "the partial one"
    assert len(box.store.stored) >= 8
    box.run()
    assert transfer_of(prefill).partial
    assert sorted(block.digest for offer in box.store.offers for block in offer.blocks) == sorted(box.store.stored)


def test_what_the_filter_keeps_out_is_handed_over_all_the_same() -> None:
    box = Box(min_priority=50)
    ranges = (PriorityRange(0, 4, 80),)
    prefill = add_prefill(box, [1] * 18, kv_priority=20, kv_priorities=ranges)
    box.run()
    assert transfer_of(prefill)
    assert [block.priority for offer in box.store.offers for block in offer.blocks] == [80, 20, 20, 20, 20]
    assert box.tiering.figures.filtered == 3


def test_while_it_is_handed_over_others_have_its_place() -> None:
    box = Box(batch=1)
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    assert prefill.handing
    other = box.add([2] * 9, output=3)
    box.compute()
    assert other.generated == 1
    assert prefill.handing
    assert prefill.blocks
    box.run()
    assert transfer_of(prefill)


def test_nobody_takes_the_blocks_of_one_that_is_handed_over() -> None:
    """One that decodes and has no room waits for them."""
    box = Box(blocks=8)
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    decodes = box.add([2] * 12, output=16, priority=1)
    box.compute()
    while box.step():
        pass
    assert prefill.handing
    assert box.scheduler.preemptions == 0
    assert decodes in box.living
    box.run()
    assert decodes.generated == 16
    assert transfer_of(prefill)


def test_what_was_believed_to_be_there_is_offered_again() -> None:
    box = Box()
    box.add([1] * 18)
    box.run()
    box.store.stored.clear()
    prefill = add_prefill(box, [1] * 18)
    box.run()
    assert transfer_of(prefill)
    assert len(box.store.stored) == 5


def test_a_hand_over_that_fails_says_why() -> None:
    box = Box()
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    while box.living:
        for job in list(box.store.jobs):
            if isinstance(job, Offer):
                box.store.jobs.remove(job)
                box.store.contents.read.subtract(job.pool_blocks)
                box.tiering.take(Offered(job.key, dropped={"store_full": len(job.blocks)}), box.scheduler)
        box.answer(Keep)
        box.step()
    assert prefill.outcome is not None
    assert prefill.outcome.finish == "prefilled"
    assert prefill.outcome.transfer is None
    assert prefill.outcome.error == (
        "the KV of the prompt could not be handed over: 0 of 3 blocks are there (3 store_full)"
    )
    assert box.figures().transfers_failed == 1
    box.run()


def test_without_a_store_it_is_not_tried_again() -> None:
    box = Box()
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    box.store.status = "gone"
    for job in list(box.store.jobs):
        box.store.jobs.remove(job)
        if isinstance(job, Offer):
            box.store.contents.read.subtract(job.pool_blocks)
            box.tiering.take(Offered(job.key, dropped={"store_gone": len(job.blocks)}), box.scheduler)
        else:
            assert isinstance(job, Keep)
            box.tiering.take(Kept(job.key, "gone"), box.scheduler)
    box.step()
    assert prefill.outcome is not None
    assert prefill.outcome.error.endswith("gone (3 store_gone)")
    assert not box.living


@pytest.mark.parametrize("when", ["offered", "kept", "over"])
def test_one_that_is_cancelled_leaves_no_hold(when: str) -> None:
    box = Box()
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    if when != "offered":
        box.answer(Offer)
    if when == "over":
        box.answer(Keep)
    box.cancel(prefill)
    box.step()
    assert (prefill in box.living) == (when != "over"), "its blocks are being copied, or a hold is about to be"
    box.run()
    assert not box.store.holds
    assert not box.store.leases
    assert box.figures().handed_over == (when == "over")


def test_a_decode_leg_claims_at_once_and_keeps_its_lease_while_it_waits() -> None:
    """However many wait before it, and however full the pool is."""
    box = Box(blocks=16, batch=1)
    prefill = add_prefill(box, [1] * 18)
    box.run()
    busy = box.add([2] * 8, output=30)
    box.compute()
    for token in (3, 4, 5):
        box.add([token] * 5)
    decode = add_decode(box, prefill, priority=-1)
    box.answer(Seek)
    assert decode.sought is not None
    assert decode.sought.lease
    for _ in range(5):
        box.step()
        box.answer(Seek)
    assert decode.sought.lease in box.store.leases
    assert not box.store.holds
    assert busy in box.living
    box.run()
    assert decode.cached_tokens == 18


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("lost", ["the partial block", "a block in the middle", "everything"])
def test_what_is_lost_is_computed_or_ends_it(lost: str, must: bool) -> None:
    box = Box()
    prefill = add_prefill(box, [1] * 18)
    box.run()
    box.forget()
    digests = [*prefill.digests[:4], transfer_of(prefill).partial]
    for digest in {"the partial block": digests[4:], "a block in the middle": digests[2:3]}.get(lost, digests):
        del box.store.stored[digest]
    decode = add_decode(box, prefill, must_transfer=must)
    box.run()
    there = {"the partial block": 16, "a block in the middle": 8}.get(lost, 0)
    figures = box.figures()
    assert (figures.taken_over, figures.transfers_failed) == (0, 1)
    if must:
        assert decode.outcome is not None
        assert decode.outcome.finish == "error"
        missing = f"{there} of 18 tokens are there (nothing is held for it any longer)"
        assert decode.outcome.error == f"the KV of the prompt could not be loaded: {missing}"
        assert not decode.blocks
    else:
        assert decode.generated == 5
        assert decode.cached_tokens == there
    assert not box.store.leases


@pytest.mark.parametrize("must", [True, False])
def test_a_copy_that_fails_half_way(must: bool) -> None:
    box = Box()
    prefill = add_prefill(box, [1] * 18)
    box.run()
    box.forget()
    decode = add_decode(box, prefill, must_transfer=must)
    box.answer(Seek)
    box.step()
    (fetch,) = jobs(box, Fetch)
    assert len(fetch.pool_blocks) == 5
    blocks = list(decode.blocks)
    box.tiering.take(box.store.answer(fetch, lambda probability: probability == 0.2), box.scheduler)
    assert GARBAGE not in [box.contents.of[block] for block in blocks]
    assert decode.cached_tokens < 18
    box.run()
    assert (decode.generated == 5) == (not must)
    assert box.figures().transfers_failed == 1


def test_one_that_must_have_its_transfer_fails_in_the_queue_if_nothing_is_there() -> None:
    """It does not wait for a place first."""
    box = Box(batch=1)
    prefill = add_prefill(box, [1] * 18)
    box.run()
    box.forget()
    box.store.stored.clear()
    busy = box.add([2] * 8, output=30)
    box.compute()
    decode = add_decode(box, prefill, must_transfer=True)
    box.answer(Seek)
    box.step()
    assert decode not in box.living
    assert decode.outcome is not None
    assert busy in box.living
    box.run()


def test_a_decode_leg_that_is_preempted_goes_on_as_any_other() -> None:
    box = Box(blocks=10, batch=2)
    prefill = add_prefill(box, [1] * 14)
    box.run()
    decode = add_decode(box, prefill, output=20)
    other = box.add([2] * 8, output=20, priority=1)
    box.run()
    assert box.scheduler.preemptions > 0
    assert decode.generated == other.generated == 20
    assert box.figures().taken_over == 1


def test_many_hand_overs_at_once_never_have_too_much_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.native.legs.MOST_OFFERED", 8)
    monkeypatch.setattr("engines.native.legs.OFFER_BLOCKS", 4)
    box = Box(blocks=128, batch=4, budget=200, queue_blocks=0)
    prefills = [add_prefill(box, [token] * 42) for token in (1, 2, 3, 4)]
    box.compute()
    assert all(prefill.handing for prefill in prefills)
    while jobs(box, Offer):
        handed = [offer for offer in jobs(box, Offer) if offer.key < 0]
        assert sum(len(offer.blocks) for offer in handed) <= 8 + 4
        assert max(len(offer.blocks) for offer in handed) <= 4
        box.answer(Offer)
    box.run()
    assert all(transfer_of(prefill) for prefill in prefills)


def answer_busy(box: Box) -> None:
    """To all offers of hand-overs; and to the holds behind them."""
    for job in jobs(box, Offer):
        box.store.jobs.remove(job)
        box.store.contents.read.subtract(job.pool_blocks)
        box.tiering.take(Offered(job.key, dropped={"store_busy": len(job.blocks)}), box.scheduler)
    box.answer(Keep)


def handing_over_what_others_store(monkeypatch: pytest.MonkeyPatch) -> tuple[Box, Sequence, list[float]]:
    """A box that has been told so, and its clock."""
    box, clock = Box(), [100.0]
    monkeypatch.setattr(box.tiering.handovers, "_clock", lambda: clock[0])
    prefill = add_prefill(box, [1] * 10)
    box.compute()
    answer_busy(box)
    box.step()
    assert prefill.handing
    assert not box.store.jobs
    assert box.tiering.handovers.next_s == pytest.approx(BUSY_INTERVAL_S)
    return box, prefill, clock


def test_what_others_are_storing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    box, prefill, clock = handing_over_what_others_store(monkeypatch)
    for _ in range(10):
        clock[0] += 2 * BUSY_INTERVAL_S
        box.step()
        answer_busy(box)
    clock[0] += 2 * BUSY_INTERVAL_S
    box.run()
    assert transfer_of(prefill)
    assert box.figures().handover_seconds == pytest.approx(22 * BUSY_INTERVAL_S)


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    box, prefill, clock = handing_over_what_others_store(monkeypatch)
    clock[0] += BUSY_PATIENCE_S + 1
    box.step()
    while box.living:
        answer_busy(box)
        box.step()
    assert prefill.outcome is not None
    assert prefill.outcome.error.endswith("0 of 3 blocks are there (3 store_busy)")


def test_one_that_is_cancelled_meanwhile_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    box, prefill, _ = handing_over_what_others_store(monkeypatch)
    box.cancel(prefill)
    box.step()
    assert not box.living
    assert box.tiering.handovers.next_s is None
    assert not box.store.jobs
