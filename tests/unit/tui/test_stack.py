"""Panels one below the other, in terminals of all sizes."""

from __future__ import annotations

import pytest

from dynamo_box.tui.filter import EVERYTHING
from dynamo_box.tui.model import Cell, Column, Lines, Row, Span, Table
from dynamo_box.tui.stack import Stack, share


def table(key: str, count: int) -> Table:
    rows = tuple(Row(f"{key}{number}", (Cell(f"{key}{number}"),)) for number in range(count))
    return Table(key, key.upper(), (Column("name", "NAME"),), rows)


LINES = Lines("l", "Lines", ((Span("one"),), (Span("two"),)))


def stack(*panels: Table | Lines) -> Stack:
    made = Stack()
    made.show(panels, EVERYTHING)
    return made


def texts(made: Stack, width: int, height: int) -> list[str]:
    return ["".join(span.text for span in line.spans).rstrip() for line in made.lines(width, height)]


class TestShare:
    def test_with_room_everyone_gets_what_it_fills(self) -> None:
        assert share([(5, True), (3, False)], 40) == [5, 3]

    def test_lines_keep_their_height_and_tables_share_the_rest(self) -> None:
        assert share([(100, True), (3, False), (100, True)], 23) == [10, 3, 10]

    def test_a_short_table_leaves_its_part_to_the_others(self) -> None:
        assert share([(5, True), (100, True)], 30) == [5, 25]

    def test_lines_give_way_before_a_table_is_too_small_to_read(self) -> None:
        assert share([(20, False), (10, True)], 10) == [6, 4]

    def test_the_lowest_goes_when_there_is_no_room(self) -> None:
        assert share([(9, True), (9, True), (9, True)], 6) == [4, 2, 0]

    @pytest.mark.parametrize("height", range(30))
    def test_there_is_never_more_than_the_screen(self, height: int) -> None:
        assert sum(share([(7, True), (3, False), (50, True), (1, False)], height)) <= height


def test_tab_goes_round_the_tables_that_are_seen() -> None:
    made = stack(table("a", 3), LINES, table("b", 3))
    made.lines(40, 30)
    seen = []
    for _ in range(3):
        assert made.focused is not None
        seen.append(made.focused.key)
        made.focus_next()
    assert seen == ["a", "b", "a"]


def test_a_click_chooses_table_and_row() -> None:
    made = stack(table("a", 3), table("b", 3))
    lines = texts(made, 40, 30)
    assert made.click(0, lines.index("b1"))
    assert made.current is not None
    assert (made.current[0], made.current[1].key) == ("b", "b1")
    assert not made.click(0, 29)


def test_order_and_cursor_outlast_a_frame_without_the_table() -> None:
    made = stack(table("a", 3))
    assert made.focused is not None
    made.focused.sort_next()
    made.focused.move(2)
    made.show((LINES,), EVERYTHING)
    assert made.focused is None and made.current is None
    made.show((table("a", 4),), EVERYTHING)
    assert made.current is not None
    assert made.current[1].key == "a2"
    assert made.focused is not None and made.focused.sort is not None


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (20, 5), (80, 24), (300, 100)])
def test_it_fills_every_terminal_exactly(size: tuple[int, int]) -> None:
    width, height = size
    lines = texts(stack(LINES, table("a", 64), table("b", 2000)), width, height)
    assert len(lines) == height
    assert all(len(line) <= width for line in lines)
