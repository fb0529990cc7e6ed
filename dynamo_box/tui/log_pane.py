"""The logs screen as it stands in the terminal: what is let through, where a person has scrolled to. No Textual.

The place on the screen is kept as numbers of lines, which never shift, while positions do: older lines are found as a
filter works its way back, or dropped as newer ones come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from dynamo_box.control.logs import LEVELS
from dynamo_box.tui.filter import EVERYTHING, Filter, FilterTooSlow, patience
from dynamo_box.tui.log_feed import LogBatch
from dynamo_box.tui.log_lines import SLICE_LINES, LogLine, LogStore, Selection, Wanted
from dynamo_box.tui.model import Lines, Span, Tone
from dynamo_box.tui.text import BLANK, Line, Mark, clip_spans, fill, is_time, one_line, rule, width_of
from dynamo_box.wording import printable

HEAD_LINES = 1
LEVEL_CHOICES = ("debug", "info", "warning", "error")
WIDEST_PROCESS = 28
MAX_DETAIL_LINES = 2000
PATIENCE_S = 0.5
"""Processor time for filtering SLICE_LINES lines; a tenth of that as a rule."""
_NARROW = 100
_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}
_LEVEL_TONES = {"debug": Tone.DIM, "warning": Tone.WARN, "error": Tone.BAD, "critical": Tone.BAD}


class LogPane:
    """`take` what the feed brings, `advance` until it is `complete`, ask for `lines`."""

    def __init__(self, store: LogStore | None = None) -> None:
        self.store = LogStore() if store is None else store
        self.following = True
        self._filter = EVERYTHING
        self._selection = Selection(self.store, Wanted())
        self._cursor = self._top = 0  # numbers of lines; of no meaning while following
        self._rows = 1
        self._process_width = 0
        self._too_slow = False
        self._has_read = False

    @property
    def wanted(self) -> Wanted:
        return self._selection.wanted

    @property
    def level(self) -> str:
        """The least level that is shown."""
        return _LEVEL_NAMES.get(self.wanted.level, LEVEL_CHOICES[0])

    @property
    def page(self) -> int:
        """How many lines are seen at once."""
        return self._rows

    @property
    def current(self) -> int | None:
        """Number of the line under the cursor."""
        _, cursor = self._window()
        return self._selection[cursor] if cursor >= 0 else None

    def take(self, batch: LogBatch) -> None:
        if batch.anew:
            self.store.clear()
            self.following = True
            self._want(self.wanted)
        self._has_read = True
        self.store.append(batch.entries)
        self._advance(0)

    @property
    def complete(self) -> bool:
        """Whether every line has been looked at since the filter changed, or will not be."""
        return self._too_slow or self._selection.complete

    def advance(self) -> None:
        """Look through some more of the older lines for a new filter."""
        self._advance(SLICE_LINES)

    def set_filter(self, wanted: Filter) -> None:
        if wanted != self._filter:
            self._filter = wanted
            self._want(replace(self.wanted, matches=wanted.matches if wanted.active else None))

    def set_level(self, level: str) -> None:
        """Show `level` and above."""
        self._want(replace(self.wanted, level=0 if level == LEVEL_CHOICES[0] else LEVELS[level]))

    def next_level(self) -> None:
        self.set_level(LEVEL_CHOICES[(LEVEL_CHOICES.index(self.level) + 1) % len(LEVEL_CHOICES)])

    def set_process(self, process: str | None) -> None:
        """Show the lines of one process, or (None) of all."""
        self._want(replace(self.wanted, process=process))

    def next_process(self, by: int = 1) -> None:
        """All processes, then each alone, then all again."""
        choices = [None, *self.store.processes]
        at = choices.index(self.wanted.process) if self.wanted.process in choices else 0
        self.set_process(choices[(at + by) % len(choices)])

    def only_this_process(self) -> None:
        """Show only the process that wrote the line under the cursor; when it is so already, all again."""
        number = self.current
        if self.wanted.process is not None:
            self.set_process(None)
        elif number is not None:
            self.set_process(self.store.line(number).process)

    def follow(self) -> None:
        """Go to the newest line, and stay there as more come."""
        self.following = True

    def hold(self) -> None:
        """Stay where it is, whatever comes."""
        if self.following and len(self._selection):
            top, cursor = self._window()
            self._place(top, cursor)

    def move(self, by: int) -> None:
        """Move the cursor; down from the last line, it follows."""
        last = len(self._selection) - 1
        if last < 0:
            return
        top, cursor = self._window()
        if cursor + by > last:
            self.follow()
        else:
            self._place(top, max(cursor + by, 0))

    def scroll(self, by: int) -> None:
        """Move what is seen; the cursor comes along. Down from the end, it follows."""
        count = len(self._selection)
        if not count:
            return
        top, cursor = self._window()
        lowest = max(count - self._rows, 0)
        if by > 0 and top + by > lowest:
            self.follow()
            return
        top = max(top + by, 0)
        self._place(top, min(max(cursor, top), top + self._rows - 1, count - 1))

    def click(self, y: int) -> bool:
        """A click on line `y`; whether it hit an entry."""
        top, _ = self._window()
        position = top + y - HEAD_LINES
        if y < HEAD_LINES or position >= len(self._selection):
            return False
        self._place(top, position)
        return True

    def lines(self, width: int, height: int) -> list[Line]:
        """Exactly `height` lines of at most `width` cells."""
        self._rows = max(height - HEAD_LINES, 1)
        count = len(self._selection)
        top, cursor = self._window()
        visible = [(at, self.store.line(self._selection[at])) for at in range(top, min(top + self._rows, count))]
        if not self.following and visible and self._selection.complete:
            self._top = self._selection[top]
        for _, line in visible:
            self._process_width = max(self._process_width, min(width_of(line.process), WIDEST_PROCESS))
        lines = [Line(self._title(width, count))]
        for at, line in visible:
            mark = Mark.CURSOR if at == cursor and not self.following else Mark.NONE
            lines.append(Line(clip_spans(self._spans(line, width), width), mark))
        if not visible:
            lines.append(Line(clip_spans((Span(self._empty(), Tone.DIM),), width)))
        lines += [BLANK] * (height - len(lines))
        return lines[:height]

    def detail(self, width: int) -> Lines | None:
        """All of the entry under the cursor, wrapped to `width`; None if there is none."""
        number = self.current
        return None if number is None else detail(self.store.line(number), self.store.fields(number), width)

    def _want(self, wanted: Wanted) -> None:
        self._selection = Selection(self.store, wanted)
        self._too_slow = False
        self._advance(SLICE_LINES)

    def _advance(self, lines: int) -> None:
        """Look at all new lines and at `lines` older ones. A filter that takes too long isn't tried again."""
        if self._too_slow:
            return
        try:
            with patience(PATIENCE_S):
                self._selection.advance(lines)
        except FilterTooSlow:
            self._too_slow = True

    def _place(self, top: int, cursor: int) -> None:
        """Stop following, with these positions."""
        self.following = False
        self._top, self._cursor = self._selection[top], self._selection[cursor]

    def _window(self) -> tuple[int, int]:
        """Positions of the first line seen and of the cursor; the cursor's is -1 when there is no line."""
        count = len(self._selection)
        lowest = max(count - self._rows, 0)
        if self.following or not count:
            return lowest, count - 1
        cursor = min(self._selection.position_of(self._cursor), count - 1)
        top = min(self._selection.position_of(self._top), lowest, cursor)
        return max(top, cursor - self._rows + 1), cursor

    def _title(self, width: int, count: int) -> tuple[Span, ...]:
        left = [Span("logs", Tone.TITLE)]
        if self.wanted.process is not None:
            left.append(Span(f"  {printable(self.wanted.process)}", Tone.ACCENT))
        if self.wanted.level:
            left.append(Span(f"  {self.level} and above", Tone.ACCENT))
        left.append(Span("  following" if self.following else "  held (G follows)", Tone.DIM))
        right = [Span(f"/{self._filter.text}  ", Tone.ACCENT)] if self._filter.active else []
        looking = "" if self._selection.complete else "…"
        total = f"{len(self.store):,} lines"
        right.append(Span(total if self.wanted.everything else f"{count:,}{looking} of {total}", Tone.DIM))
        if self.store.dropped:
            right.append(Span(f", {self.store.dropped:,} older dropped", Tone.DIM))
        return rule(tuple(left), tuple(right), width)

    def _spans(self, line: LogLine, width: int) -> tuple[Span, ...]:
        level = _LEVEL_NAMES.get(line.level, "info")
        tone = _LEVEL_TONES.get(level, Tone.PLAIN)
        return (
            Span(clock(line.at)[: 8 if width < _NARROW else 12] + " ", Tone.DIM),
            Span(f"{level[:7]:<7} " if width >= _NARROW else f"{level[:4]:<4} ", tone),
            Span(fill(one_line(line.process), self._process_width, front=True) + "  ", Tone.ACCENT),
            Span(line.text, tone),
        )

    def _empty(self) -> str:
        if self._too_slow:
            return f"{self._filter.text} takes too long to match"
        if not self._has_read or not self._selection.complete:
            return "looking…"
        if len(self.store):
            return "no line passes the filter (l: level, p: process, /: text)"
        return "nothing has been logged yet"


def clock(at: float) -> str:
    """Local time of day, to the millisecond; dashes for what is no time."""
    if not is_time(at):
        return "--:--:--.---"
    moment = datetime.fromtimestamp(at)
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"


def detail(line: LogLine, fields: Mapping[str, object], width: int) -> Lines:
    """Every field of an entry, one below the other, the traceback last; at most MAX_DETAIL_LINES lines."""
    shown = [key for key in fields if key != "exception"]
    head = max((min(width_of(one_line(key)), 24) for key in shown), default=0) + 2
    lines: list[tuple[Span, ...]] = []
    for key in shown:
        label = fill(one_line(key), head)
        for piece in wrap(printable(str(fields[key])), max(width - head, 1)):
            lines.append(clip_spans((Span(label, Tone.DIM), Span(piece)), width))
            label = " " * head
    if trace := fields.get("exception"):
        lines.append(())
        lines.extend((Span(piece, Tone.BAD),) for piece in wrap(printable(str(trace)), width))
    if len(lines) > MAX_DETAIL_LINES:
        missing = len(lines) - MAX_DETAIL_LINES
        lines[MAX_DETAIL_LINES:] = [(Span(f"… {missing:,} more lines: `dynbox logs` shows them", Tone.DIM),)]
    title = f"{one_line(line.process)}  {_LEVEL_NAMES.get(line.level, 'info')}"
    return Lines("log", title, tuple(lines))


def wrap(text: str, width: int) -> list[str]:
    """`text` cut into pieces of at most `width` cells, at line ends and wherever it must; indentation stays."""
    pieces: list[str] = []
    for line in text.split("\n"):
        rest = line.expandtabs(4)
        start = 0
        while start == 0 or start < len(rest):
            piece = rest[start : start + width]
            while len(piece) > 1 and width_of(piece) > width:
                piece = piece[:-1]
            pieces.append(piece)
            start += max(len(piece), 1)
    return pieces
