"""A table as it stands on the screen: filtered, sorted, scrolled, with a cursor that stays on its row. No Textual.

What the person did (sort, cursor, place) lives here and outlasts the frames; what a frame says is replaced whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_box.tui.columns import fit
from dynamo_box.tui.filter import EVERYTHING, Filter, FilterTooSlow, patience
from dynamo_box.tui.model import Cell, Column, Row, Span, Table, Tone
from dynamo_box.tui.text import BLANK, Line, Mark, clip_spans, fill, rule, width_of

HEAD_LINES = 2
"""Title and column heads."""
PATIENCE_S = 0.05
"""Processor time for filtering all rows, four times a second; a few milliseconds as a rule."""
WIDE = 100
"""From this many cells on columns stand two apart."""


@dataclass(frozen=True)
class Sort:
    column: str
    descending: bool = False


def arrange(table: Table, sort: Sort | None, wanted: Filter = EVERYTHING) -> Sequence[Row]:
    """The rows that `wanted` lets through, in order. Rows that compare equal keep the order they came in; those
    without a value stand last whichever way round.

    Raises:
        FilterTooSlow: `wanted` can't be matched in time.
    """
    rows: Sequence[Row] = table.rows
    if wanted.active:
        with patience(PATIENCE_S):
            rows = [row for row in rows if wanted.matches(" ".join(cell.text for cell in row.cells))]
    index = next((at for at, column in enumerate(table.columns) if sort and column.key == sort.column), None)
    if sort is None or index is None:
        return rows
    by_text = all(row.cells[index].sort is None for row in rows)
    keyed = [(_value(row.cells[index], by_text), row) for row in rows]
    valued = [(value, row) for value, row in keyed if value is not None]
    valued.sort(key=lambda pair: pair[0], reverse=sort.descending)
    return [row for _, row in valued] + [row for value, row in keyed if value is None]


def _value(cell: Cell, by_text: bool) -> tuple[bool, float, str] | None:
    """Numbers before words, so that a column that has both still has an order."""
    value = (cell.text.casefold() or None) if by_text else cell.sort
    if value is None or value != value:
        return None
    return (True, 0.0, value.casefold()) if isinstance(value, str) else (False, value, "")


class TablePane:
    """One table of a screen. `show` a frame's rows, then ask for `lines`."""

    def __init__(self, table: Table, wanted: Filter = EVERYTHING) -> None:
        self.table = table
        self.rows: Sequence[Row] = ()
        self.sort: Sort | None = None
        self._filter = EVERYTHING
        self._too_slow: Filter | None = None
        self._cursor = 0
        self._cursor_key: str | None = None
        self._top = 0
        self._natural: list[int] = []
        self._widths: tuple[int, ...] = ()
        self._width = 0
        self._gap = 1
        self.show(table, wanted)

    def show(self, table: Table, wanted: Filter) -> None:
        """Take a new frame; the cursor follows its row, or stays where it was when that is gone."""
        if table.columns != self.table.columns or wanted != self._filter:
            self._natural = []
        self.table, self._filter = table, wanted
        self._arrange()

    @property
    def key(self) -> str:
        return self.table.key

    @property
    def current(self) -> Row | None:
        """The row under the cursor."""
        return self.rows[self._cursor] if self.rows else None

    @property
    def natural_height(self) -> int:
        return HEAD_LINES + max(len(self.rows), 1)

    def move(self, by: int) -> None:
        """Move the cursor; at the very top it stays at the top instead of following a row."""
        self._cursor = max(0, min(self._cursor + by, len(self.rows) - 1))
        self._cursor_key = self.rows[self._cursor].key if self._cursor else None

    def move_to(self, index: int) -> None:
        self.move(index - self._cursor)

    def sort_next(self) -> None:
        """Sort by the next column; after the last, as the view gave it."""
        keys = [column.key for column in self.table.columns]
        at = keys.index(self.sort.column) + 1 if self.sort and self.sort.column in keys else 0
        self._set_sort(Sort(keys[at]) if at < len(keys) else None)

    def sort_reverse(self) -> None:
        if self.sort is None:
            self.sort_next()
        if self.sort is not None:
            self._set_sort(Sort(self.sort.column, not self.sort.descending))

    def sort_by(self, column: str) -> None:
        """A click on a column's head: sort by it, then turn round."""
        same = self.sort is not None and self.sort.column == column
        self._set_sort(Sort(column, same and self.sort is not None and not self.sort.descending))

    def click(self, x: int, y: int) -> bool:
        """A click at cell `x` of line `y`; whether it hit a row."""
        if y == 1 and (column := self._column_at(x)) is not None:
            self.sort_by(column.key)
        index = self._top + y - HEAD_LINES
        if y < HEAD_LINES or index >= len(self.rows):
            return False
        self.move_to(index)
        return True

    def lines(self, width: int, height: int, *, focused: bool) -> list[Line]:
        """Exactly `height` lines of at most `width` cells."""
        room = max(height - HEAD_LINES, 0)
        self._top = max(0, min(self._top, self._cursor, len(self.rows) - room))
        self._top = max(self._top, self._cursor - room + 1)
        visible = self.rows[self._top : self._top + room]
        self._measure(visible, width)
        lines = [Line(self._title(width, len(visible))), Line(self._heads(width), Mark.HEAD)]
        for index, row in enumerate(visible, self._top):
            on_cursor = Mark.CURSOR if focused else Mark.CURSOR_BEHIND
            lines.append(Line(self._row(row), on_cursor if index == self._cursor else Mark.NONE))
        if not self.rows:
            lines.append(Line(clip_spans((self._nothing(),), width)))
        lines += [BLANK] * (height - len(lines))
        return lines[:height]

    def _nothing(self) -> Span:
        """Why there is no row."""
        if self._filter == self._too_slow:
            return Span(f"{self._filter.text} takes too long to match", Tone.WARN)
        filtered = self._filter.active and self.table.rows
        return Span(f"nothing matches {self._filter.text}" if filtered else self.table.empty, Tone.DIM)

    def _set_sort(self, sort: Sort | None) -> None:
        self.sort = sort
        self._natural = []
        self._arrange()

    def _arrange(self) -> None:
        """Order the rows anew. A filter that takes too long lets none through, and isn't tried again."""
        self.rows = ()
        if self._filter != self._too_slow:
            try:
                self.rows = arrange(self.table, self.sort, self._filter)
                self._too_slow = None
            except FilterTooSlow:
                self._too_slow = self._filter
        self._follow()

    def _follow(self) -> None:
        same = [index for index, row in enumerate(self.rows) if row.key == self._cursor_key]
        if same:  # clients choose ids of requests, and may choose one twice
            self._cursor = min(same, key=lambda index: abs(index - self._cursor))
            return
        self._cursor = max(0, min(self._cursor, len(self.rows) - 1))
        self._cursor_key = self.rows[self._cursor].key if self._cursor else None

    def _measure(self, rows: Iterable[Row], width: int) -> None:
        """Widths only grow while the columns stay the same, or numbers that change would make all of them jump."""
        columns = self.table.columns
        if width != self._width or len(self._natural) != len(columns):
            self._natural = [
                width_of(column.title) + (self.sort is not None and self.sort.column == column.key)
                for column in columns
            ]
            self._width, self._widths = width, ()
        grown = False
        for row in rows:
            for index, cell in enumerate(row.cells):
                wide = width_of(cell.text)
                if wide > self._natural[index]:
                    self._natural[index], grown = wide, True
        if grown or not self._widths:
            self._gap = 2 if width >= WIDE else 1
            self._widths = fit(columns, self._natural, width, self._gap)

    def _title(self, width: int, visible: int) -> tuple[Span, ...]:
        left = [Span(self.table.title, Tone.TITLE)]
        if self.table.note:
            left.append(Span(f"  {self.table.note}", Tone.DIM))
        right = []
        if self._filter.active:
            right.append(Span(f"/{self._filter.text} ", Tone.ACCENT))
            right.append(Span(f"{len(self.rows)} of {len(self.table.rows)}", Tone.DIM))
        if visible < len(self.rows):
            shown = (
                f"{self._top + 1}–{self._top + visible} of {len(self.rows)}" if visible else f"{len(self.rows)} rows"
            )
            right.append(Span(f"  {shown}" if right else shown, Tone.DIM))
        return rule(tuple(left), tuple(right), width)

    def _heads(self, width: int) -> tuple[Span, ...]:
        texts = []
        for column, wide in self._shown():
            title = column.title
            if self.sort is not None and self.sort.column == column.key:
                title += "▼" if self.sort.descending else "▲"
            texts.append(fill(title, wide, right=column.right))
        return clip_spans((Span((" " * self._gap).join(texts), Tone.DIM),), width)

    def _row(self, row: Row) -> tuple[Span, ...]:
        spans: list[Span] = []
        between = ""
        for column, wide, cell in zip(self.table.columns, self._widths, row.cells, strict=True):
            if wide and cell.parts and width_of(cell.text) == wide:
                spans += (Span(between), *cell.parts) if between else cell.parts
                between = " " * self._gap
            elif wide:
                spans.append(Span(between + fill(cell.text, wide, right=column.right, front=column.tail), cell.tone))
                between = " " * self._gap
        return tuple(spans)

    def _shown(self) -> list[tuple[Column, int]]:
        return [(column, wide) for column, wide in zip(self.table.columns, self._widths, strict=True) if wide]

    def _column_at(self, x: int) -> Column | None:
        start = 0
        for column, wide in self._shown():
            if start <= x < start + wide + self._gap:
                return column
            start += wide + self._gap
        return None
