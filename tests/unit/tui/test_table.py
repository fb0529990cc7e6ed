"""A table on the screen: order, filter, cursor, place; and what names of other people's making do to it."""

from __future__ import annotations

import pytest

from dynamo_box.tui.filter import Filter
from dynamo_box.tui.model import Cell, Column, Row, Span, Table, Tone
from dynamo_box.tui.table import Sort, TablePane, arrange
from dynamo_box.tui.text import Line, Mark, width_of

COLUMNS = (Column("name", "NAME", least=6, widest=30), Column("rate", "RATE", right=True, keep=1))


def row(name: str, rate: float | None = None) -> Row:
    return Row(name, (Cell(name), Cell("-" if rate is None else f"{rate:,.0f}", sort=rate)))


def table(*rows: Row) -> Table:
    return Table("t", "Things", COLUMNS, rows, empty="none yet")


def names(pane: TablePane) -> list[str]:
    return [each.key for each in pane.rows]


def texts(lines: list[Line]) -> list[str]:
    return ["".join(span.text for span in line.spans).rstrip() for line in lines]


def current(pane: TablePane) -> str:
    assert pane.current is not None
    return pane.current.key


class TestOrder:
    ROWS = (row("b", 9), row("a", 100), row("c", None), row("d", 20))

    def test_without_a_wish_it_is_the_views(self) -> None:
        assert [each.key for each in arrange(table(*self.ROWS), None)] == ["b", "a", "c", "d"]

    def test_numbers_are_sorted_by_value_and_not_by_their_text(self) -> None:
        assert [each.key for each in arrange(table(*self.ROWS), Sort("rate"))] == ["b", "d", "a", "c"]

    def test_what_has_no_value_stands_last_both_ways(self) -> None:
        assert [each.key for each in arrange(table(*self.ROWS), Sort("rate", descending=True))] == ["a", "d", "b", "c"]

    def test_texts_are_sorted_without_regard_to_case(self) -> None:
        rows = (row("beta"), row("Alpha"), row("gamma"))
        assert [each.key for each in arrange(table(*rows), Sort("name"))] == ["Alpha", "beta", "gamma"]

    def test_a_column_of_words_and_numbers_still_has_an_order(self) -> None:
        column = (Column("mixed", "MIXED"),)
        rows = tuple(Row(str(each), (Cell(str(each), sort=each),)) for each in ("x", 2.0, float("nan"), 1.0, "a"))
        found = arrange(Table("t", "T", column, rows), Sort("mixed"))
        assert [each.key for each in found] == ["1.0", "2.0", "a", "x", "nan"]

    def test_a_key_goes_through_the_columns_and_back_to_none(self) -> None:
        pane = TablePane(table(*self.ROWS))
        seen = []
        for _ in range(3):
            pane.sort_next()
            seen.append(pane.sort)
        assert seen == [Sort("name"), Sort("rate"), None]

    def test_a_click_on_a_head_sorts_and_the_next_turns_round(self) -> None:
        pane = TablePane(table(*self.ROWS))
        pane.lines(60, 10, focused=True)
        pane.click(0, 1)
        assert names(pane) == ["a", "b", "c", "d"]
        pane.click(0, 1)
        assert names(pane) == ["d", "c", "b", "a"]
        assert "NAME▼" in texts(pane.lines(60, 10, focused=True))[1]


class TestCursor:
    def test_it_stays_on_its_row_when_rows_come_before_it(self) -> None:
        pane = TablePane(table(row("b"), row("c"), row("d")))
        pane.move(1)
        pane.show(table(row("a"), row("b"), row("c"), row("d")), Filter())
        assert current(pane) == "c"

    def test_at_the_top_it_stays_at_the_top(self) -> None:
        pane = TablePane(table(row("b"), row("c")))
        pane.show(table(row("a"), row("b"), row("c")), Filter())
        assert current(pane) == "a"

    def test_when_its_row_goes_the_next_takes_its_place(self) -> None:
        pane = TablePane(table(row("a"), row("b"), row("c")))
        pane.move(1)
        pane.show(table(row("a"), row("c")), Filter())
        assert current(pane) == "c"

    def test_when_all_rows_go_there_is_none(self) -> None:
        pane = TablePane(table(row("a")))
        pane.show(table(), Filter())
        assert pane.current is None
        assert texts(pane.lines(40, 5, focused=True))[2] == "none yet"
        pane.move(5)
        pane.show(table(row("a")), Filter())
        assert current(pane) == "a"

    def test_it_follows_its_row_into_another_order(self) -> None:
        pane = TablePane(table(row("b", 1), row("a", 2), row("c", 3)))
        pane.move(2)
        pane.sort_by("name")
        assert (names(pane), current(pane)) == (["a", "b", "c"], "c")

    @pytest.mark.parametrize("by", [5, 1999, 10**6])
    def test_the_screen_follows_it_through_two_thousand_rows(self, by: int) -> None:
        pane = TablePane(table(*(row(f"r{number:04}", number) for number in range(2000))))
        pane.move(by)
        lines = pane.lines(60, 12, focused=True)
        assert len(lines) == 12
        (marked,) = [text for text, line in zip(texts(lines), lines, strict=True) if line.mark is Mark.CURSOR]
        assert marked.startswith(current(pane))
        assert "of 2000" in texts(lines)[0]


class TestFilter:
    def test_only_what_matches_stands_there_and_the_title_says_so(self) -> None:
        pane = TablePane(table(row("w0"), row("w1"), row("router")), Filter.parse("!w"))
        assert names(pane) == ["router"]
        assert texts(pane.lines(60, 6, focused=True))[0].endswith("/!w 1 of 3")

    def test_when_nothing_matches_it_says_what_was_asked(self) -> None:
        pane = TablePane(table(row("w0")), Filter.parse("zzz"))
        assert "nothing matches zzz" in texts(pane.lines(60, 6, focused=True))


class TestLines:
    @pytest.mark.parametrize("width", [0, 1, 5, 20, 80, 200])
    @pytest.mark.parametrize("height", [0, 1, 2, 3, 30])
    def test_they_fit_whatever_the_names_are(self, width: int, height: int) -> None:
        foreign = (
            "[bold red]markup[/]",
            "模型模型模型模型模型模型模型",
            "👩‍💻🚀🚀🚀🚀🚀🚀🚀🚀🚀",
            "e\u0301" * 40,
            "\\x1b[2J",
        )
        pane = TablePane(table(*(row(name, 1) for name in foreign)))
        lines = pane.lines(width, height, focused=True)
        assert len(lines) == height
        assert all(width_of("".join(span.text for span in line.spans)) <= width for line in lines)

    def test_columns_that_have_grown_stay_as_wide(self) -> None:
        pane = TablePane(table(row("a", 1_000_000)))
        wide = texts(pane.lines(60, 4, focused=True))[1]
        pane.show(table(row("a", 1)), Filter())
        assert texts(pane.lines(60, 4, focused=True))[1] == wide


class TestFilterThatTakesTooLong:
    """Patterns may take longer than anyone lives; keys must not wait for them."""

    ENDLESS = Filter.parse(r"(\w+\s*)+$x")
    TABLE = table(row("a row of thirty words " * 10), row("b"))

    def test_it_lets_nothing_through_and_says_so(self) -> None:
        pane = TablePane(self.TABLE, self.ENDLESS)
        assert names(pane) == []
        assert "takes too long" in texts(pane.lines(80, 5, focused=True))[2]

    def test_it_is_not_tried_again_until_it_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pane = TablePane(self.TABLE, self.ENDLESS)
        with monkeypatch.context() as patch:
            patch.setattr(Filter, "matches", lambda *_: pytest.fail("it was tried again"))
            pane.show(self.TABLE, self.ENDLESS)
            pane.sort_next()
        pane.show(self.TABLE, Filter.parse("^b"))
        assert names(pane) == ["b"]


def test_the_cursor_gets_past_rows_with_the_same_key() -> None:
    """Clients choose the ids of their requests."""
    twice = table(row("a"), row("same"), row("same"), row("b"))
    pane = TablePane(twice)
    for _ in range(3):
        pane.move(1)
        pane.show(twice, Filter())
    assert current(pane) == "b"


class TestParts:
    """A cell whose parts have tones of their own."""

    BAR = Cell("██▓·", parts=(Span("██", Tone.CACHED), Span("▓", Tone.HOST), Span("·", Tone.FREE)))

    def spans(self, widest: int, *more: Cell) -> list[Span]:
        columns = (Column("name", "N"), Column("bar", "BAR", widest=widest), Column("end", "END"))
        rows = tuple(Row(str(at), (Cell("a"), bar, Cell("z"))) for at, bar in enumerate((self.BAR, *more)))
        pane = TablePane(Table("t", "T", columns, rows))
        return list(pane.lines(40, 6, focused=False)[2].spans)

    def test_each_part_keeps_its_tone_and_the_line_its_columns(self) -> None:
        assert self.spans(10) == [
            Span("a"), Span(" "), Span("██", Tone.CACHED), Span("▓", Tone.HOST), Span("·", Tone.FREE), Span(" z  "),
        ]  # fmt: skip

    def test_where_it_is_cut_or_filled_the_text_stands_for_it(self) -> None:
        assert [span.text for span in self.spans(3)] == ["a", " ██…", " z  "]
        assert [span.text for span in self.spans(10, Cell("longer"))] == ["a", " ██▓·  ", " z  "]
