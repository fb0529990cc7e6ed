from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.router.predictions import Predictions

TRUNK = tuple(range(20))
BRANCHES = [TRUNK[:cut] + tuple(range(100 * cut, 100 * cut + 15)) for cut in (3, 8, 15, 20)]


def test_what_was_noted_counts_until_its_time_is_over() -> None:
    predictions = Predictions(ttl_s=5.0)
    predictions.note((1, 2, 3), now=10.0)
    assert predictions.match((1, 2, 3, 4), now=14.9) == 3
    assert predictions.match((1, 2, 9), now=14.9) == 2
    assert predictions.match((9, 8), now=14.9) == 0
    assert predictions.match((1, 2, 3, 4), now=15.0) == 0


def test_a_sibling_renews_the_common_prefix_only() -> None:
    predictions = Predictions(ttl_s=5.0)
    predictions.note((1, 2, 3), now=0.0)
    predictions.note((1, 2, 4), now=3.0)
    assert predictions.match((1, 2, 3), now=6.0) == 2
    assert predictions.match((1, 2, 4), now=6.0) == 3


def test_the_cap_keeps_the_front_of_a_prompt() -> None:
    predictions = Predictions(max_blocks=10)
    predictions.note(TRUNK, now=0.0)
    assert len(predictions) == 10
    assert predictions.match(TRUNK, now=1.0) == 10


def test_a_burst_of_distinct_prompts_stays_below_the_cap() -> None:
    predictions = Predictions(max_blocks=1000)
    rng = random.Random(0)
    for turn in range(200):
        predictions.note(tuple(rng.getrandbits(64) for _ in range(50)), now=turn * 0.001)
        assert len(predictions) <= 1000


def test_what_is_over_its_time_is_dropped_as_others_come() -> None:
    predictions = Predictions(ttl_s=5.0)
    predictions.note(tuple(range(1000)), now=0.0)
    for block in range(2000, 2400):
        predictions.note((block,), now=6.0)
    assert len(predictions) == 400


@given(
    st.lists(st.tuples(st.sampled_from(BRANCHES), st.integers(0, 35), st.floats(0.0, 4.0)), max_size=30),
    st.integers(5, 60),
)
def test_bisection_finds_what_a_walk_would(notes: list[tuple[tuple[int, ...], int, float]], cap: int) -> None:
    predictions = Predictions(ttl_s=5.0, max_blocks=cap)
    now = 0.0
    for branch, length, pause in notes:
        now += pause
        predictions.note(branch[:length], now)
        for prompt in BRANCHES:
            walked = next(
                (i for i, block in enumerate(prompt) if predictions._expiry.get(block, now) <= now),
                len(prompt),
            )
            assert predictions.match(prompt, now) == walked
