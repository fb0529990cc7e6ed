"""When a process is tried again, after how long, and when it is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.plan.types import RestartPolicy
from dynamo_box.supervisor.states import (
    TRANSITIONS,
    TRIES_WITHIN_START,
    GiveUp,
    IllegalTransition,
    Retry,
    State,
    after_failure,
    check,
)

POLICY = RestartPolicy(first_s=0.5, factor=2.0, longest_s=3.0, stable_s=60.0, give_up_after=6)


def fail(
    failures: int, *, ready_for_s: float | None = 1.0, ever_ready: bool = True, permanent: bool = False
) -> Retry | GiveUp:
    return after_failure(POLICY, failures=failures, ready_for_s=ready_for_s, ever_ready=ever_ready, permanent=permanent)


def test_the_back_off_is_geometric_and_capped_and_then_it_is_given_up() -> None:
    verdicts = [fail(failures) for failures in range(6)]
    assert verdicts == [
        Retry(0.5, 1),
        Retry(1.0, 2),
        Retry(2.0, 3),
        Retry(3.0, 4),
        Retry(3.0, 5),
        GiveUp("failed 6 times in a row"),
    ]


def test_stable_uptime_starts_over() -> None:
    assert fail(5, ready_for_s=60.0) == Retry(0.5, 1)
    assert isinstance(fail(5, ready_for_s=59.0), GiveUp)


def test_time_without_being_ready_is_no_uptime() -> None:
    assert isinstance(fail(5, ready_for_s=None), GiveUp)


def test_a_permanent_failure_is_not_tried_again() -> None:
    assert fail(0, ready_for_s=3600.0, permanent=True) == GiveUp("a restart would fail in the same way")


def test_before_the_first_ready_there_are_few_tries() -> None:
    verdicts = [fail(failures, ready_for_s=None, ever_ready=False) for failures in range(TRIES_WITHIN_START)]
    assert [type(verdict) for verdict in verdicts] == [Retry] * (TRIES_WITHIN_START - 1) + [GiveUp]


@given(
    first=st.floats(0.001, 10),
    factor=st.floats(1, 10),
    longest=st.floats(0.001, 100),
    failures=st.integers(0, 10_000),
)
def test_no_delay_exceeds_the_longest(first: float, factor: float, longest: float, failures: int) -> None:
    policy = RestartPolicy(first, factor, longest, 60.0, give_up_after=100_000)
    verdict = after_failure(policy, failures=failures, ready_for_s=None, ever_ready=True, permanent=False)
    assert isinstance(verdict, Retry)
    assert 0 < verdict.delay_s <= longest


def test_every_state_can_be_stopped_and_started_again() -> None:
    assert set(TRANSITIONS) == set(State)
    for state in State:
        reachable, waiting = {state}, [state]
        while waiting:
            new = TRANSITIONS[waiting.pop()] - reachable
            reachable |= new
            waiting += new
        assert {State.STOPPED, State.READY} <= reachable


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (State.PLANNED, State.READY),
        (State.FATAL, State.READY),
        (State.STOPPED, State.BACKOFF),
        (State.DRAINING, State.WAKING),
        (State.ASLEEP, State.READY),
    ],
)
def test_there_is_no_other_way(old: State, new: State) -> None:
    with pytest.raises(IllegalTransition, match=f"{old} -> {new}"):
        check(old, new)
