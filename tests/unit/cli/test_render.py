"""Figures, tables and names for people."""

from __future__ import annotations

import pytest

from dynamo_box import wording
from dynamo_box.cli import render, terminal
from dynamo_box.cli.names import did_you_mean


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (513 * 2**20, "513 MiB"),
        (1023 * 2**20, "1.0 GiB"), (80 * 2**30, "80.0 GiB"), (5 * 2**50, "5120 TiB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_binary_unit(value: int | None, text: str) -> None:
    assert wording.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.9, "0s"), (59.9, "59s"), (75, "1m15s"), (14520, "4h02m"), (183600, "2d03h")],
)
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


def test_amounts_say_only_what_is_known() -> None:
    assert wording.amount(None, 3, "layers") == ""
    assert wording.amount(2, 3, "layers") == "2 of 3 layers"
    assert wording.amount(2, None, "") == "2"
    assert wording.amount(2**20, 2**21, "bytes") == "1.0 MiB of 2.0 MiB"


def test_a_bar_is_as_wide_as_asked_whatever_it_is_told() -> None:
    assert render.bar(1, 2, 4) == "██░░"
    for done, total in ((-1, 2), (3, 2), (0, 0)):
        assert len(render.bar(done, total, 4)) == 4


def test_a_table_aligns_columns_and_escapes_cells() -> None:
    text = render.table(("NAME", "N"), [("a", "1"), ("b\x1b", "100")], right=(1,))
    assert text.splitlines() == ["NAME     N", "a        1", "b\\x1b  100"]
    assert render.fit(text, 5).splitlines() == ["NAME…", "a   …", "b\\x1…"]


def test_what_is_printed_has_no_power_over_the_terminal() -> None:
    assert wording.printable("plain, Grüße, 日本\n\ttab") == "plain, Grüße, 日本\n\ttab"
    assert wording.printable("\x1b]0;title\x07\r\x9b2J") == "\\x1b]0;title\\x07\\r\\x9b2J"
    assert wording.printable("a\u202eb\u2028") == "a\\u202eb\\u2028"
    assert wording.printable("👩\u200d💻") == "👩\u200d💻"


@pytest.mark.parametrize(("columns", "text"), [(0, ""), (1, "…"), (4, "abc…"), (5, "abcde"), (9, "abcde")])
def test_clipping_marks_what_it_takes(columns: int, text: str) -> None:
    assert terminal.clip("abcde", columns) == text


def test_near_names_come_first_then_all_then_none() -> None:
    known = ["router", "frontend", "smollm2.aggregated.0"]
    assert did_you_mean("ruter", known, kind="processes") == "did you mean router?"
    assert did_you_mean("smollm2", known, kind="processes") == "did you mean smollm2.aggregated.0?"
    assert did_you_mean("zzz", known, kind="processes") == "processes: frontend, router, smollm2.aggregated.0"
    assert did_you_mean("x", [], kind="processes") == "there are no processes yet"
