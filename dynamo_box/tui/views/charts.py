"""What is drawn in characters: stacked bars, the rows of a heat map, and tables inside a detail. Pure.

Everything reads without colour: each kind of fill has a character of its own, and a drawing is as wide as was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_box.tui.model import Cell, Span, Tone
from dynamo_box.tui.text import clip_spans, fill, spans_width, width_of
from dynamo_box.tui.views.cells import ABSENT, Line

HEAT = (
    ("·", Tone.HEAT_0),
    ("░", Tone.HEAT_1),
    ("▒", Tone.HEAT_2),
    ("▓", Tone.HEAT_3),
    ("█", Tone.HEAT_4),
)
"""From none to all, a fifth each."""

_BLANK = (" ", Tone.PLAIN)
_WIDEST_COLUMN = 40


def stacked(parts: Sequence[tuple[int, str, Tone]], width: int) -> Line:
    """A bar of `width` columns, divided as the sizes of `parts` (size, character, tone) are."""
    columns = apportioned([size for size, _, _ in parts], width)
    return tuple(
        Span(character * count, tone) for count, (_, character, tone) in zip(columns, parts, strict=True) if count
    )


def apportioned(sizes: Sequence[int], columns: int) -> list[int]:
    """Whole columns for each size, `columns` in all (none if all sizes are 0): each is rounded down, and what is left
    goes to the largest remainders.
    """
    whole = sum(sizes)
    if whole <= 0:
        return [0] * len(sizes)
    given = [size * columns // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(sizes[index] * columns % whole))
    for index in by_remainder[: columns - sum(given)]:
        given[index] += 1
    return given


def heat(shares: Iterable[float | None]) -> Line:
    """A column for each share (0 to 1), blank for None; neighbours of one tone are one span."""
    spans: list[Span] = []
    run, tone = "", Tone.PLAIN
    for share in shares:
        character, its_tone = _BLANK if share is None else HEAT[min(max(int(share * len(HEAT)), 0), len(HEAT) - 1)]
        if run and its_tone != tone:
            spans.append(Span(run, tone))
            run = ""
        run, tone = run + character, its_tone
    if run:
        spans.append(Span(run, tone))
    return tuple(spans)


def clipped(lines: Iterable[Line], width: int) -> tuple[Line, ...]:
    """Lines of at most `width` columns."""
    return tuple(clip_spans(line, width) for line in lines)


def flowing(items: Iterable[Line], width: int, gap: str = "  ") -> list[Line]:
    """Items one after the other, in as many lines of `width` columns as it takes; none is broken, even if it alone is
    wider.
    """
    lines: list[Line] = []
    line: Line = ()
    for item in items:
        longer = (*line, Span(gap), *item) if line else item
        if line and spans_width(longer) > width:
            lines.append(line)
            longer = item
        line = longer
    if line:
        lines.append(line)
    return lines


def grid(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[Line]:
    """Rows in columns below their heads, the first to the left, all others to the right. Without the columns in which
    no row has anything; nothing at all without rows.
    """
    if not rows:
        return []
    kept = [
        index
        for index in range(len(heads))
        if index == 0 or any(row[index].text not in ("", ABSENT.text) for row in rows)
    ]
    table = [[Cell(heads[index], Tone.DIM) for index in kept], *([row[index] for index in kept] for row in rows)]
    widths = [min(max(width_of(row[column].text) for row in table), _WIDEST_COLUMN) for column in range(len(kept))]
    return [
        tuple(
            Span(("  " if column else "") + fill(cell.text, widths[column], right=column > 0), cell.tone)
            for column, cell in enumerate(row)
        )
        for row in table
    ]
