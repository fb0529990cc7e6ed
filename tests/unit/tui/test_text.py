"""Text in cells: cut, filled, wrapped and framed without a character cut in two."""

from __future__ import annotations

import pytest

from dynamo_box.tui.dialogs import boxed, wrap
from dynamo_box.tui.line_widget import changed_cells
from dynamo_box.tui.model import Span, Tone
from dynamo_box.tui.text import Line, Mark, clip, clip_spans, fill, rule, spans_width, width_of

FOREIGN = ["plain", "模型名字很长", "🚀🚀🚀🚀", "e\u0301e\u0301e\u0301", "👩‍💻 codes", "[red]no markup[/red]", ""]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 30])
def test_cut_and_filled_texts_have_the_cells_they_were_given(text: str, width: int) -> None:
    assert width_of(clip(text, width)) <= width
    assert width_of(fill(text, width)) == width
    assert width_of(fill(text, width, right=True)) == width
    spans = (Span(text), Span(text, Tone.BAD))
    assert spans_width(clip_spans(spans, width)) <= width
    assert spans_width(rule(spans, (Span("right"),), width)) <= max(width, 0)


def test_what_is_cut_ends_in_an_ellipsis() -> None:
    assert clip("abcdef", 4) == "abc…"
    assert [span.text for span in clip_spans((Span("abc"), Span("def")), 4)] == ["abc", "…"]
    assert [span.text for span in clip_spans((Span("abc"), Span("def")), 3)] == ["ab…"]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("width", [1, 2, 7])
def test_wrapping_loses_nothing_and_overflows_nothing(text: str, width: int) -> None:
    lines = wrap((Span(text), Span(text, Tone.DIM)), width)
    assert all(spans_width(line) <= width for line in lines)
    if width > 1:
        assert "".join(span.text for line in lines for span in line) == text + text


@pytest.mark.parametrize("width", [0, 3, 10, 40])
def test_a_frame_is_as_wide_as_it_was_asked_for(width: int) -> None:
    framed = boxed("title 模型", [(Span("模型" * 30),), Line((), Mark.CURSOR)], "foot", width)
    assert all(spans_width(line.spans) <= width for line in framed)


class TestChangedCells:
    def test_equal_ends_are_left_alone(self) -> None:
        before = Line((Span("name "), Span("12"), Span(" ready")))
        after = Line((Span("name "), Span("13"), Span(" ready")))
        assert changed_cells(before, after, 40) == (5, 7)

    def test_a_cursor_is_the_whole_line(self) -> None:
        assert changed_cells(Line((Span("a"),)), Line((Span("a"),), Mark.CURSOR), 40) == (0, 40)

    def test_other_widths_go_to_the_end(self) -> None:
        assert changed_cells(Line((Span("ab"), Span("c"))), Line((Span("ab"), Span("模型"))), 40) == (2, 40)

    def test_repeated_spans_do_not_count_twice(self) -> None:
        before = Line((Span("x"), Span("y"), Span("x")))
        after = Line((Span("x"), Span("x"), Span("x")))
        assert changed_cells(before, after, 10) == (1, 2)
