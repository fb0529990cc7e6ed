"""Text in terminal cells: a Chinese character or an emoji takes two, a combining mark none. Lines are cut by cells."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from dynamo_box.tui.model import Span, Tone
from dynamo_box.wording import duration, printable

ELLIPSIS = "…"
_YEAR_9999 = 253_370_764_800
_ENDS_AND_TABS = str.maketrans("\n\r\t", "   ")


class Mark(enum.StrEnum):
    """What a whole line is, on top of the tones of its parts."""

    NONE = "none"
    BAR = "bar"
    HEAD = "head"
    CURSOR = "cursor"
    CURSOR_BEHIND = "cursor-behind"


class Line(NamedTuple):
    """One line of the screen, before it has colours."""

    spans: tuple[Span, ...]
    mark: Mark = Mark.NONE


BLANK = Line(())


def one_line(text: str) -> str:
    """Foreign text on one line and without power over the terminal."""
    return text if text.isprintable() else printable(text.translate(_ENDS_AND_TABS))


def is_time(at: float) -> bool:
    """Whether this is a Unix time that a calendar can show; a recording may hold any number."""
    return 0 <= at < _YEAR_9999


def span_of_time(seconds: float) -> str:
    """What a step took: `0.4 ms`, `85 ms`, `1.24 s`, `3m12s`; `-` if it is no number."""
    if not math.isfinite(seconds) or seconds >= 60:
        return duration(seconds)
    if seconds >= 1:
        return f"{seconds:.2f} s"
    milliseconds = max(seconds * 1000, 0.0)
    return f"{milliseconds:.{1 if milliseconds < 9.95 else 0}f} ms"


def width_of(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def clip(text: str, width: int) -> str:
    """`text` in at most `width` cells; what is missing shows as an ellipsis."""
    if width_of(text) <= width:
        return text
    if width <= 1:
        return ELLIPSIS[:width]
    return set_cell_size(text, width - 1).rstrip() + ELLIPSIS


def clip_front(text: str, width: int) -> str:
    """The end of `text` in at most `width` cells, behind an ellipsis if something is missing."""
    if width_of(text) <= width:
        return text
    if width <= 1:
        return ELLIPSIS[:width]
    excess = width_of(text) - (width - 1)
    for start, character in enumerate(text):
        if excess <= 0:
            return ELLIPSIS + text[start:]
        excess -= width_of(character)
    return ELLIPSIS


def fill(text: str, width: int, *, right: bool = False, front: bool = False) -> str:
    """`text` in exactly `width` cells. With `front` it is the beginning that goes where there is no room."""
    clipped = clip_front(text, width) if front else clip(text, width)
    blanks = " " * (width - width_of(clipped))
    return blanks + clipped if right else clipped + blanks


def spans_width(spans: Iterable[Span]) -> int:
    return sum(width_of(span.text) for span in spans)


def clip_spans(spans: tuple[Span, ...], width: int) -> tuple[Span, ...]:
    """As many cells of `spans` as fit into `width`, ending in an ellipsis where something is missing."""
    if spans_width(spans) <= width:
        return spans
    kept: list[Span] = []
    left = width
    for span in spans:
        wide = width_of(span.text)
        if wide >= left:
            kept.append(Span(clip(span.text + " " * (left + 1 - wide), left), span.tone))
            break
        kept.append(span)
        left -= wide
    return tuple(kept)


def rule(left: tuple[Span, ...], right: tuple[Span, ...], width: int) -> tuple[Span, ...]:
    """`left ──────── right`: the title of a panel. The left part gives way."""
    room = max(width - spans_width(right) - 3, 0)
    left = clip_spans(left, room)
    dashes = max(width - spans_width(left) - spans_width(right) - 2, 0)
    line = (
        (*left, Span(f" {'─' * dashes} ", Tone.DIM), *right)
        if right
        else (*left, Span(f" {'─' * (dashes + 1)}", Tone.DIM))
    )
    return clip_spans(line, width)
