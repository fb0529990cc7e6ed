"""What is advised when, and when it is acted on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.advise.load import BOTH, DECODE, PREFILL, ModelLoad, WorkerLoad
from dynamo_box.advise.rules import Advice, advise
from dynamo_box.advise.steady import Steady
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import Targets

TARGETS = Targets(ttft_s=0.5, itl_s=0.05)


def worker(name: str, role: str, busy: float, output: float = 10.0) -> WorkerLoad:
    return WorkerLoad(name, role, busy, prompt_tokens_per_s=100.0, output_tokens_per_s=output, waiting=0, kv_used=0.1)


def load(
    *workers: WorkerLoad,
    ttft_s: float | None = None,
    itl_s: float | None = None,
    targets: Targets = TARGETS,
    disagg: Disagg | None = None,
    why_not: str = "",
    span_s: float = 10.0,
) -> ModelLoad:
    return ModelLoad("m", span_s, workers, targets, disagg or Disagg(), ttft_s, itl_s, why_not)


BUSY_PREFILL = (worker("p0", PREFILL, 0.98), worker("d0", DECODE, 0.3), worker("d1", DECODE, 0.2))
BUSY_DECODE = (worker("p0", PREFILL, 0.3), worker("p1", PREFILL, 0.1), worker("d0", DECODE, 0.97))
LONE_BUSY_PREFILL = (worker("p0", PREFILL, 0.98), worker("d0", DECODE, 0.2))
LONE_BUSY_DECODE = (worker("p0", PREFILL, 0.1), worker("d0", DECODE, 0.95))


def test_late_first_tokens_turn_the_idlest_decode_worker() -> None:
    advice = advise(load(*BUSY_PREFILL, ttft_s=0.9, itl_s=0.01))
    assert (advice.kind, advice.worker, advice.role, advice.needed) == ("flip", "d1", PREFILL, True)
    assert advice.command == "dynbox role d1 prefill"
    assert "900 ms for 99 of 100, the target is 500 ms" in advice.reasons[0]


def test_late_tokens_turn_the_idlest_prefill_worker() -> None:
    advice = advise(load(*BUSY_DECODE, ttft_s=0.1, itl_s=0.2))
    assert (advice.kind, advice.worker, advice.role) == ("flip", "p1", DECODE)


def test_the_last_worker_of_a_role_stays_and_a_threshold_moves() -> None:
    lone = LONE_BUSY_PREFILL
    advice = advise(load(*lone, ttft_s=0.9))
    assert (advice.kind, advice.setting) == ("threshold", "conditional:min_uncached_tokens=2048")
    at = Disagg(policy="conditional", min_uncached_tokens=2048)
    assert advise(load(*lone, ttft_s=0.9, disagg=at)).setting == "conditional:min_uncached_tokens=4096"
    assert advise(load(*LONE_BUSY_DECODE, itl_s=0.2, disagg=at)).setting == "conditional:min_uncached_tokens=1024"
    end = Disagg(policy="conditional", min_uncached_tokens=65_536)
    advice = advise(load(*lone, ttft_s=0.9, disagg=end))
    assert advice.kind == "none"
    assert advice.needed


@pytest.mark.parametrize(
    ("now", "higher", "lower"), [(0, 64, 0), (32, 64, 32), (64, 128, 64), (90_000, 90_000, 45_000)]
)
def test_a_threshold_outside_of_what_is_advised_never_moves_the_wrong_way(now: int, higher: int, lower: int) -> None:
    at = Disagg(policy="conditional", min_uncached_tokens=now)
    for advice, then in (
        (advise(load(*LONE_BUSY_PREFILL, ttft_s=0.9, disagg=at)), higher),
        (advise(load(*LONE_BUSY_DECODE, itl_s=0.2, disagg=at)), lower),
    ):
        assert advice.setting == (f"conditional:min_uncached_tokens={then}" if then != now else "")


def test_a_flip_that_would_only_move_the_queue_is_not_advised() -> None:
    workers = (worker("p0", PREFILL, 0.98), worker("d0", DECODE, 0.8), worker("d1", DECODE, 0.8))
    advice = advise(load(*workers, ttft_s=0.9))
    assert advice.kind == "none"
    assert advice.needed


@pytest.mark.parametrize(
    ("given_load", "says"),
    [
        (load(worker("p0", PREFILL, 0.99), worker("d0", DECODE, 0.99), ttft_s=2.0, itl_s=1.0), "both busy"),
        (load(worker("p0", PREFILL, 0.2), worker("d0", DECODE, 0.2), ttft_s=2.0), "roles are not what is missing"),
        (load(*BUSY_PREFILL, ttft_s=0.2, itl_s=0.01), "nothing is late"),
        (load(*BUSY_PREFILL, ttft_s=0.9, why_not="d0 is starting"), "d0 is starting"),
        (load(*BUSY_PREFILL, ttft_s=0.9, span_s=0.2), "0.2 s only"),
        (load(), "no worker is ready"),
        (load(worker("a0", BOTH, 0.9), ttft_s=0.9), "no two workers"),
    ],
)
def test_what_no_flip_helps(given_load: ModelLoad, says: str) -> None:
    advice = advise(given_load)
    assert advice.kind == "none"
    assert says in " ".join(advice.reasons)


def test_without_targets_only_a_clear_imbalance_counts() -> None:
    assert advise(load(*BUSY_PREFILL, targets=Targets())).kind == "flip"
    mild = (worker("p0", PREFILL, 0.9), worker("d0", DECODE, 0.6), worker("d1", DECODE, 0.6))
    assert advise(load(*mild, targets=Targets())).kind == "none"


def test_workers_for_both_are_split_when_prompts_hold_up_answers() -> None:
    workers = (worker("a0", BOTH, 0.9, output=20.0), worker("a1", BOTH, 0.9, output=5.0))
    advice = advise(load(*workers, itl_s=0.2))
    assert (advice.kind, advice.worker, advice.role) == ("flip", "a1", PREFILL)


shares = st.floats(0.0, 1.0)
seconds = st.one_of(st.none(), st.floats(0.0, 10.0))


@given(
    st.lists(st.tuples(st.sampled_from([PREFILL, DECODE, BOTH]), shares), max_size=8),
    seconds,
    seconds,
    st.sampled_from([TARGETS, Targets(), Targets(ttft_s=1.0)]),
    st.sampled_from(["strict", "fallback", "conditional"]),
)
def test_advice_is_whole_and_never_takes_the_last_of_a_role(
    roles: list[tuple[str, float]], ttft_s: float | None, itl_s: float | None, targets: Targets, policy: str
) -> None:
    workers = [worker(f"w{index}", role, busy) for index, (role, busy) in enumerate(roles)]
    disagg = Disagg(policy=policy)  # type: ignore[arg-type]
    advice = advise(load(*workers, ttft_s=ttft_s, itl_s=itl_s, targets=targets, disagg=disagg))
    assert advice.reasons
    assert all(advice.reasons)
    if advice.kind == "flip":
        named = next(each for each in workers if each.name == advice.worker)
        assert named.role != advice.role
        assert sum(each.role == named.role for each in workers) > 1
    assert bool(advice.command) == (advice.kind != "none")


FLIP = Advice("m", "flip", ("why",), worker="d1", role=PREFILL, relieves=PREFILL)
BACK = Advice("m", "flip", ("why",), worker="d1", role=DECODE, relieves=DECODE)
NOTHING = Advice("m", "none", ("nothing is late",))


def test_advice_must_last_and_nothing_may_be_changing() -> None:
    state, act, why = Steady().look(FLIP, 0.0)
    assert not act
    assert "acted on after 30 s" in why
    state, act, why = state.look(FLIP, 20.0, changing="d0 is draining")
    assert not act
    assert "one change at a time" in why
    state, act, _ = state.look(FLIP, 40.0)
    assert not act, "the clock starts again after a transition"
    state, act, _ = state.look(FLIP, 51.0)
    assert act
    assert state.done == FLIP


def test_advice_that_flickers_is_never_followed() -> None:
    state = Steady()
    for second in range(0, 400, 20):
        state, act, _ = state.look(FLIP if second % 40 else NOTHING, float(second))
        assert not act


def test_the_opposite_of_the_last_change_waits_longer() -> None:
    state = Steady(done=FLIP, done_at=0.0)
    state, act, _ = state.look(BACK, 60.0)
    assert not act
    state, act, why = state.look(BACK, 120.0)
    assert not act
    assert "after 300 s" in why
    _, act, _ = state.look(BACK, 301.0)
    assert act
    again = Steady(done=FLIP, done_at=0.0)
    more = Advice("m", "flip", ("why",), worker="d2", role=PREFILL, relieves=PREFILL)
    again, _, _ = again.look(more, 40.0)
    again, act, _ = again.look(more, 71.0)
    assert act


def test_one_threshold_further_the_same_way_is_no_reverse() -> None:
    """Doubled again, because the first time was not enough."""
    settings = [Disagg(policy="conditional", min_uncached_tokens=tokens) for tokens in (256, 512)]
    first, further = (advise(load(*LONE_BUSY_PREFILL, ttft_s=5.0, disagg=disagg)) for disagg in settings)
    assert (first.kind, further.kind) == ("threshold", "threshold")
    state, act, _ = Steady(done=first, done_at=0.0).look(further, 40.0)
    assert not act
    _, act, why = state.look(further, 71.0)
    assert act, why


def test_a_threshold_that_takes_back_what_a_flip_gave_waits_longer() -> None:
    lower = advise(load(*LONE_BUSY_DECODE, itl_s=0.5, disagg=Disagg(policy="conditional", min_uncached_tokens=512)))
    assert lower.kind == "threshold"
    state, _, _ = Steady(done=FLIP, done_at=0.0).look(lower, 40.0)
    _, act, why = state.look(lower, 120.0)
    assert not act
    assert "after 300 s" in why
