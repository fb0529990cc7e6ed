"""The times, levels and lines of `dynbox logs`."""

from __future__ import annotations

import time

import pytest

from dynamo_box.cli.logs import at_least, key_value, parse_since
from dynamo_box.control.logs import Entry, in_order
from dynamo_box.errors import UsageError


@pytest.mark.parametrize(("text", "ago"), [("30s", 30), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("0.5h", 1800)])
def test_spans_count_back_from_now(text: str, ago: float) -> None:
    assert parse_since(text, 1_000_000.0) == 1_000_000.0 - ago


def test_iso_times_are_local_unless_they_say_otherwise() -> None:
    assert parse_since("2026-01-31T14:00:00Z", 0.0) == 1769868000.0
    assert parse_since("2026-01-31T14:00:00+01:00", 0.0) == 1769864400.0
    local = time.mktime((2026, 1, 31, 14, 0, 0, 0, 0, -1))
    assert parse_since("2026-01-31T14:00", 0.0) == local


@pytest.mark.parametrize("text", ["", "10", "m10", "10m ago", "10x", "tomorrow"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_since(text, 0.0)
    assert "10m" in (refusal.value.remedy or "")


def entry(at: float = 0.0, level: str = "info", **fields: object) -> Entry:
    return Entry(at, "router", level, {"event": "placed", **fields})


def test_an_unknown_level_counts_as_info() -> None:
    wanted = at_least("warning")
    assert not wanted(entry(level="notice"))
    assert wanted(entry(level="critical"))
    assert at_least(None)(entry(level="debug"))


def test_a_line_quotes_values_that_need_it_and_stays_one_line() -> None:
    text = key_value(entry(request_id="r1", reason="2 blocks", empty="", note="a\nb", n=3))
    assert text.endswith("router  placed  request_id=r1 reason='2 blocks' empty='' note=a\\nb n=3")
    assert "\n" not in text


def test_order_is_restored_within_the_window_and_memory_is_bounded() -> None:
    shuffled = [entry(at) for at in (2, 1, 4, 3, 6, 5)]
    assert [each.at for each in in_order(shuffled, window=2)] == [1, 2, 3, 4, 5, 6]
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield entry(float(taken))

    next(in_order(endless(), window=8))  # type: ignore[arg-type]
    assert taken == 9
