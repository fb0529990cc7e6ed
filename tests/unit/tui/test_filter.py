"""What `/` lets through."""

from __future__ import annotations

import signal

import pytest

from dynamo_box.tui.filter import EVERYTHING, Filter, FilterError, FilterTooSlow, patience

ENDLESS = Filter.parse(r"(\w+\s*)+$x")
"""It would take some 2 ** 60 steps on TEXT."""
TEXT = "a row of thirty words " * 10


def test_a_pattern_may_match_anywhere() -> None:
    assert Filter.parse("w[01]").matches("the worker w1 of two")
    assert not Filter.parse("w[01]").matches("w2")


def test_an_exclamation_mark_turns_it_round() -> None:
    assert Filter.parse("!ready").matches("starting")
    assert not Filter.parse("!ready").matches("ready")


def test_case_counts_only_where_the_pattern_has_a_capital() -> None:
    assert Filter.parse("error").matches("Error")
    assert not Filter.parse("Error").matches("error")


@pytest.mark.parametrize("text", ["", "!"])
def test_nothing_yet_lets_everything_through(text: str) -> None:
    assert Filter.parse(text).matches("anything")
    assert not Filter.parse(text).active
    assert EVERYTHING.matches("")


@pytest.mark.parametrize("text", ["(", "!*", "[z-a]", "a{99999999999}"])
def test_what_is_no_pattern_is_said(text: str) -> None:
    with pytest.raises(FilterError, match="is no regular expression"):
        Filter.parse(text)


def test_a_pattern_that_would_never_end_is_ended() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(FilterTooSlow), patience(0.02):
        ENDLESS.matches(TEXT)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with patience(0.02):
        assert Filter.parse("thirty").matches(TEXT)
