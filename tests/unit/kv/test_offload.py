"""The priority filter: what a block's priority is, and which blocks of a request are offered to the tiers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.kv.offload import LengthMismatch, Verdict, block_priorities, judge
from dynamo_box.protocol.request import PriorityRange

SIZE = 4
PROMPT = 21

levels = st.integers(0, 100)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[PriorityRange, ...]:
    found = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, PROMPT - 1))
        found.append(PriorityRange(start, draw(st.integers(start + 1, PROMPT)), draw(levels)))
    return tuple(found)


def of(blocks: int, priority: int | None, *some: tuple[int, int, int], first: int = 0) -> list[int | None]:
    return block_priorities(
        first,
        blocks,
        block_size=SIZE,
        prompt_tokens=PROMPT,
        priority=priority,
        ranges=[PriorityRange(*one) for one in some],
    )


def test_without_ranges_every_block_has_the_requests_own() -> None:
    assert of(3, 40) == [40, 40, 40]
    assert of(3, None) == [None, None, None]
    assert of(0, 40) == []


def test_a_block_has_the_highest_priority_among_its_tokens() -> None:
    assert of(3, None, (0, 4, 10), (5, 6, 90)) == [10, 90, None]
    assert of(2, 50, (0, 8, 10)) == [10, 10], "where a range covers all of it, it goes before the request's own"
    assert of(2, 50, (0, 7, 10)) == [10, 50], "a token of the second block has the request's own"
    assert of(2, 5, (0, 7, 10)) == [10, 10]
    assert of(1, 50, (0, 2, 10), (2, 4, 20)) == [20], "two ranges cover it together"
    assert of(1, 50, (0, 2, 10), (3, 4, 20)) == [50], "they leave one out"


def test_generated_tokens_have_the_requests_own() -> None:
    assert of(2, 30, (16, 21, 80), first=4) == [80, 80], "block 5 is one token of the prompt and three generated ones"
    assert of(2, 30, (16, 21, 10), first=4) == [10, 30]
    assert of(1, 30, (0, 21, 80), first=6) == [30]
    assert of(1, None, (0, 21, 80), first=6) == [None]


@given(first=st.integers(0, 8), count=st.integers(0, 8), priority=st.none() | levels, ranges=ranges())
def test_token_by_token_it_is_the_same(
    first: int, count: int, priority: int | None, ranges: tuple[PriorityRange, ...]
) -> None:
    def of_token(token: int) -> int | None:
        inside = [one.priority for one in ranges if one.start <= token < one.end]
        return max(inside) if inside else priority

    expected = [
        max(
            (level for token in range(block * SIZE, block * SIZE + SIZE) if (level := of_token(token)) is not None),
            default=None,
        )
        for block in range(first, first + count)
    ]
    found = block_priorities(first, count, block_size=SIZE, prompt_tokens=PROMPT, priority=priority, ranges=ranges)
    assert found == expected


@pytest.mark.parametrize("wrong", [(0, 22, 1), (21, 22, 1), (3, 3, 1), (5, 3, 1), (-1, 3, 1)])
def test_ranges_that_do_not_fit_the_prompt(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(LengthMismatch, match=f"tokens {wrong[0]} to {wrong[1]} don't fit a prompt of 21 tokens"):
        of(1, None, (0, 4, 10), wrong)


def test_blocks_are_taken_until_the_first_below_the_threshold() -> None:
    verdict = judge([50, 60, 49, 90], 4, min_priority=50, continue_after_filter=False)
    assert verdict == Verdict(taken=(0, 1), filtered=2, unset=0, stopped=True)
    after = judge([100, 100], 2, min_priority=50, continue_after_filter=False, stopped=verdict.stopped)
    assert after == Verdict(taken=(), filtered=2, unset=0, stopped=True)


def test_or_the_filter_goes_on_after_it() -> None:
    verdict = judge([50, 49, 90], 3, min_priority=50, continue_after_filter=True)
    assert verdict == Verdict(taken=(0, 2), filtered=1, unset=0, stopped=False)


def test_unset_is_allowed_and_counted_apart() -> None:
    assert judge([None, 10, None], 3, min_priority=50, continue_after_filter=False) == Verdict((0,), 2, 1, True)
    assert judge([None, None], 2, min_priority=100, continue_after_filter=False) == Verdict((0, 1), 0, 2, False)


def test_a_threshold_of_zero_filters_nothing() -> None:
    assert judge([0, 100, None], 3, min_priority=0, continue_after_filter=False) == Verdict((0, 1, 2), 0, 1, False)


@pytest.mark.parametrize("blocks", [1, 3])
def test_not_one_priority_a_block(blocks: int) -> None:
    with pytest.raises(LengthMismatch, match=f"2 priorities for {blocks} blocks"):
        judge([1, 2], blocks, min_priority=0, continue_after_filter=False)


@given(
    priorities=st.lists(st.none() | levels, max_size=30),
    threshold=levels,
    on=st.booleans(),
    cuts=st.lists(st.integers(0, 30), max_size=3),
)
def test_in_parts_or_at_once_the_verdict_is_the_same(
    priorities: list[int | None], threshold: int, on: bool, cuts: list[int]
) -> None:
    whole = judge(priorities, len(priorities), min_priority=threshold, continue_after_filter=on)
    assert len(whole.taken) + whole.filtered == len(priorities)
    if not on:
        assert whole.taken == tuple(range(len(whole.taken))), "what is kept is a prefix"
    edges = [0, *sorted(min(cut, len(priorities)) for cut in cuts), len(priorities)]
    taken: list[int] = []
    filtered = unset = 0
    stopped = False
    for start, end in itertools.pairwise(edges):
        part = judge(
            priorities[start:end], end - start, min_priority=threshold, continue_after_filter=on, stopped=stopped
        )
        taken += [start + place for place in part.taken]
        filtered, unset, stopped = filtered + part.filtered, unset + part.unset, part.stopped
    assert Verdict(tuple(taken), filtered, unset, stopped) == whole
