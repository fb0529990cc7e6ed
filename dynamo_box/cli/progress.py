"""What is on its way, a line each: redrawn in place on a terminal, a line a change elsewhere, JSON lines on request.

`Row` and the functions that make and tell rows are pure; the three displays differ only in how they show them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from dynamo_box import wording
from dynamo_box.cli import output, render, stderr, terminal
from dynamo_box.snapshot import BoxSnapshot, EventInfo

_STEPS = 10
"""Off a terminal, a phase with an extent is told again at each tenth."""
_BAR_COLUMNS = 20
_DONE = frozenset({"ready", "asleep", "stopped"})
"""States in which a start has got where it was to go: models that don't fit together sleep or are stopped again."""
_STATE_STYLES = {"ready": "green", "asleep": "blue", "fatal": "red", "backoff": "yellow"}


class Row(NamedTuple):
    name: str
    state: str
    phase: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    cause: str = ""

    @property
    def step(self) -> tuple[str, str, int]:
        """Changes when the row is worth a line of its own."""
        tenth = self.done * _STEPS // self.total if self.done is not None and self.total else 0
        return (self.state, self.phase, tenth)


def rows_of(snapshot: BoxSnapshot) -> list[Row]:
    """One row a process, in start order; a process that is ready or asleep shows no phase any more."""
    rows = []
    for process in snapshot.processes:
        extent = process.progress
        if process.state in _DONE or extent is None:
            phase = "" if process.state in _DONE else process.phase
            rows.append(Row(process.name, process.state, phase, cause=process.cause))
        else:
            rows.append(
                Row(
                    process.name,
                    process.state,
                    process.phase,
                    extent.done,
                    extent.total,
                    extent.unit,
                    process.cause,
                )
            )
    return rows


def line(row: Row, name_width: int, *, with_bar: bool) -> str:
    """`worker.0   starting  weights ███░░ 120 MiB of 513 MiB`."""
    parts = [row.name.ljust(name_width), f"{row.state:<8}", row.phase]
    if with_bar and row.done is not None and row.total:
        parts.append(render.bar(row.done, row.total, _BAR_COLUMNS))
    parts.append(wording.amount(row.done, row.total, row.unit))
    if row.state in ("backoff", "fatal") and row.cause:
        parts.append(f"({row.cause})")
    return wording.printable("  ".join(part for part in parts if part)).rstrip()


class Display(Protocol):
    """`update` may be called as often as news come; `close` leaves the terminal as text goes on below."""

    def update(self, rows: Sequence[Row]) -> None: ...

    def tell(self, event: EventInfo) -> None: ...

    def close(self) -> None: ...


class LiveDisplay:
    """Redraws its lines in place, none wider than the terminal, so that none wraps."""

    def __init__(self) -> None:
        self._drawn = 0

    def update(self, rows: Sequence[Row]) -> None:
        columns = terminal.width()
        name_width = max((len(row.name) for row in rows), default=0)
        lines = [terminal.clip(line(row, name_width, with_bar=columns >= 80), columns - 1) for row in rows]
        styled = [
            terminal.style(text, _STATE_STYLES[row.state], sys.stderr) if row.state in _STATE_STYLES else text
            for row, text in zip(rows, lines, strict=True)
        ]
        sys.stderr.write(self._up() + "".join(f"{text}\x1b[K\n" for text in styled) + "\x1b[J")
        sys.stderr.flush()
        self._drawn = len(lines)

    def tell(self, event: EventInfo) -> None:
        sys.stderr.write(f"{self._up()}\x1b[J")
        stderr.say(event_line(event))
        self._drawn = 0

    def close(self) -> None:
        self._drawn = 0

    def _up(self) -> str:
        return f"\x1b[{self._drawn}A\r" if self._drawn else "\r"


class PlainDisplay:
    """A line for each row that changed."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, str, int]] = {}

    def update(self, rows: Sequence[Row]) -> None:
        name_width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            if row.state != "planned" and self._told.get(row.name) != row.step:
                self._told[row.name] = row.step
                stderr.say(line(row, name_width, with_bar=False))

    def tell(self, event: EventInfo) -> None:
        stderr.say(event_line(event))

    def close(self) -> None:
        pass


class JsonDisplay:
    """`{"event": "progress", "name", "state", "phase", "done", "total", "unit"}` for each row that changed."""

    def __init__(self) -> None:
        self._told: dict[str, Row] = {}

    def update(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._told.get(row.name) != row:
                self._told[row.name] = row
                output.json_line({"event": "progress", **row._asdict()})

    def tell(self, event: EventInfo) -> None:
        output.json_line({"event": event.level, "process": event.process, "text": event.text})

    def close(self) -> None:
        pass


def make_display(*, as_json: bool) -> Display:
    if as_json:
        return JsonDisplay()
    return LiveDisplay() if terminal.can_redraw(sys.stderr) else PlainDisplay()


def event_line(event: EventInfo) -> str:
    return wording.printable(f"{event.level}: {event.process + ': ' if event.process else ''}{event.text}")


class BoxProgress:
    """Shows snapshots on a display, and each warning or error among their events once."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._last_event = -1

    def show(self, snapshot: BoxSnapshot) -> None:
        for event in snapshot.events:
            if event.seq > self._last_event and event.level != "info":
                self._display.tell(event)
        self._last_event = max((event.seq for event in snapshot.events), default=self._last_event)
        self._display.update(rows_of(snapshot))


def pull_progress(display: Display, model: str) -> Callable[[str, int, int | None, str], None]:
    """The `progress` callback of a pull, as one row."""

    def show(phase: str, done: int, total: int | None, unit: str) -> None:
        display.update([Row(model, "pulling", phase, done, total, unit)])

    return show
