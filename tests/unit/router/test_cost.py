"""The decision, by the numbers of the formula."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.router.cost import MAX_KNOB, MODES, Choice, Knobs, Mode, Option, TierCosts, decide, parse_mode, weigh

BLOCK = 16


def option(worker: str, overlap: int = 0, *, prefill: int = 0, decode: int = 13, indexed: int = 0) -> Option:
    return Option(worker, overlap, prefill, decode, indexed)


def choose(
    *options: Option,
    mode: Mode = "kv",
    prompt_tokens: int = 200,
    weight: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
    last: str = "",
    pinned: bool = False,
) -> Choice:
    return decide(
        mode,
        options,
        prompt_tokens=prompt_tokens,
        block_size=BLOCK,
        knobs=Knobs(weight, temperature),
        rng=random.Random(seed),
        last=last,
        pinned=pinned,
    )


@pytest.mark.parametrize(
    ("overlap", "prefill", "decode", "weight", "cost"),
    [
        (0, 0, 13, 1.0, 200 / 16 + 13),
        (12, 0, 13, 1.0, 8 / 16 + 13),
        (12, 160, 13, 1.0, 8 / 16 + 10 + 13),
        (12, 160, 40, 2.0, 2 * (8 / 16 + 10) + 40),
        (12, 160, 40, 0.0, 40),
    ],
)
def test_the_formula(overlap: int, prefill: int, decode: int, weight: float, cost: float) -> None:
    weighed = weigh(option("a", overlap, prefill=prefill, decode=decode), 200, BLOCK, weight)
    assert weighed.cost == pytest.approx(cost)


def test_an_overlap_beyond_the_prompt_doesnt_pay_for_other_prefill() -> None:
    assert weigh(option("a", 20, prefill=160), 200, BLOCK, 1.0).prefill_blocks == 10.0


@pytest.mark.parametrize(
    ("own", "host", "disk", "cost"),
    [
        (0, 0, 0, 12.5 + 13),
        (12, 0, 0, 0.5 + 13),
        (0, 12, 0, 0.5 + 12 * 0.1 + 13),
        (0, 0, 12, 0.5 + 12 * 0.3 + 13),
        (4, 3, 2, 3.5 + 3 * 0.1 + 2 * 0.3 + 13),
        (0, 13, 0, 13 * 0.1 + 13),  # what is spared is never more than the prompt
    ],
)
def test_a_block_to_load_costs_a_part_of_one_to_compute(own: int, host: int, disk: int, cost: float) -> None:
    given = Option("a", own, 0, 13, 0, host, disk)
    weighed = weigh(given, 200, BLOCK, 1.0, TierCosts(0.1, 0.3))
    assert weighed.cost == pytest.approx(cost)
    assert (weighed.overlap_blocks, weighed.host_blocks, weighed.disk_blocks) == (own, host, disk)
    heavier = weigh(given, 200, BLOCK, 2.0, TierCosts(0.1, 0.3))
    assert heavier.cost - 13 == pytest.approx(2 * (cost - 13)), "the overlap weight is a weight on loading too"


def test_the_tiers_level_workers_so_that_load_decides_and_the_reason_says_what_is_loaded() -> None:
    has, loads = Option("a", 12, 480, 13, 0), Option("b", 2, 0, 13, 0, 7, 3)
    choice = choose(has, loads)
    assert choice.option.worker == "b"
    assert choice.reason == "b: 2 of 13 blocks cached, 7 in host memory and 3 on disk, cost 15.1 vs 43.5"
    assert choose(Option("a", 12, 0, 13, 0), loads).reason == "a: 12 of 13 blocks cached, cost 13.5 vs 15.1"
    assert choose(Option("a", 0, 0, 13, 0, 0, 5)).reason == "a: 0 of 13 blocks cached, 5 on disk, the only worker"
    for mode in ("round-robin", "random"):
        assert ", 5 on disk, " in choose(Option("a", 0, 0, 13, 0, 0, 5), mode=mode).reason  # type: ignore[arg-type]


def test_tier_costs_that_make_no_sense() -> None:
    assert "host_block_cost must be a number from 0" in TierCosts(host=-0.1).problem()
    assert "disk_block_cost must be a number from 0" in TierCosts(disk=math.nan).problem()
    assert TierCosts(0.0, 0.0).problem() == ""


def test_the_cached_prefix_wins_and_the_reason_says_so() -> None:
    choice = choose(
        option("smollm2.aggregated.0"),
        option("smollm2.aggregated.1", 12),
    )
    assert choice.option.worker == "smollm2.aggregated.1"
    assert choice.reason == "smollm2.aggregated.1: 12 of 13 blocks cached, cost 13.5 vs 25.5"
    assert [candidate.worker for candidate in choice.candidates] == [
        "smollm2.aggregated.0",
        "smollm2.aggregated.1",
    ]


def test_a_cached_prefix_doesnt_win_over_any_load() -> None:
    assert choose(option("cold"), option("warm", 12, prefill=1600)).option.worker == "cold"


def test_ties_go_to_the_smallest_index() -> None:
    choice = choose(option("a", indexed=9), option("b", indexed=3), option("c", indexed=5))
    assert choice.option.worker == "b"
    assert "smallest index" in choice.reason


def test_ties_of_the_index_too_are_drawn() -> None:
    drawn = Counter(
        choose(option("a"), option("b"), option("c", 0, decode=99), seed=s).option.worker for s in range(200)
    )
    assert set(drawn) == {"a", "b"}
    assert min(drawn.values()) > 60


def test_temperature_draws_by_softmax_of_the_normalised_cost() -> None:
    options = [option("a", decode=10), option("b", decode=20), option("c", decode=30)]
    drawn = Counter(choose(*options, temperature=0.5, seed=s).option.worker for s in range(4000))
    weights = {"a": 1.0, "b": math.exp(-0.5 / 0.5), "c": math.exp(-1.0 / 0.5)}
    for worker, weight in weights.items():
        assert drawn[worker] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_a_tiny_temperature_is_the_lowest_cost() -> None:
    options = [option("a", decode=10), option("b", decode=20)]
    assert {choose(*options, temperature=5e-324, seed=s).option.worker for s in range(50)} == {"a"}


def test_round_robin_goes_on_after_the_last_one_whoever_came_or_went() -> None:
    options = [option("b"), option("c"), option("a")]
    order, last = [], ""
    for _ in range(5):
        last = choose(*options, mode="round-robin", last=last).option.worker
        order.append(last)
    assert order == ["a", "b", "c", "a", "b"]
    assert choose(option("a"), option("d"), mode="round-robin", last="b").option.worker == "d"


def test_random_asks_nobody() -> None:
    drawn = Counter(choose(option("a", 12), option("b"), mode="random", seed=s).option.worker for s in range(200))
    assert min(drawn.values()) > 60


def test_a_pinned_worker_is_taken_in_any_mode() -> None:
    for mode in MODES:
        choice = choose(option("a"), mode=mode, last="a", pinned=True)
        assert choice.option.worker == "a"
        assert "named by the request" in choice.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 2 * MAX_KNOB])
def test_knobs_that_make_no_sense(bad: float) -> None:
    assert "overlap_weight" in Knobs(overlap_weight=bad).problem()
    assert "temperature" in Knobs(temperature=bad).problem()
    assert Knobs().problem() == ""


def test_modes_by_name() -> None:
    assert [parse_mode(mode) for mode in ("kv", "round-robin", "random")] == list(MODES)
    with pytest.raises(ValueError, match="no routing mode 'fastest'; there are kv, round-robin, random"):
        parse_mode("fastest")


@given(
    st.lists(
        st.builds(
            Option,
            worker=st.text(max_size=3),
            overlap_blocks=st.integers(0, 2**16),
            prefill_tokens=st.integers(0, 2**40),
            decode_blocks=st.integers(0, 2**40),
            indexed_blocks=st.integers(0, 2**20),
            host_blocks=st.integers(0, 2**16),
            disk_blocks=st.integers(0, 2**16),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda option: option.worker,
    ),
    st.sampled_from(MODES),
    st.integers(1, 2**20),
    st.floats(0.0, MAX_KNOB),
    st.floats(0.0, MAX_KNOB),
    st.integers(),
)
def test_there_is_always_a_decision_among_the_options(
    options: list[Option], mode: Mode, prompt_tokens: int, weight: float, temperature: float, seed: int
) -> None:
    choice = choose(*options, mode=mode, prompt_tokens=prompt_tokens, weight=weight, temperature=temperature, seed=seed)
    assert choice.option in options
    assert len(choice.candidates) == len(options)
    assert all(math.isfinite(candidate.cost) for candidate in choice.candidates)
    if mode == "kv" and temperature == 0.0:
        lowest = min(choice.candidates, key=lambda candidate: candidate.cost)
        winner = next(c for c in choice.candidates if c.worker == choice.option.worker)
        assert winner.cost == lowest.cost
