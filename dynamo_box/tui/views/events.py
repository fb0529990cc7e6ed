"""What happened to the box, newest first: starts, deaths, restarts, and whatever else its processes had to tell."""

from __future__ import annotations

from dynamo_box.snapshot import EventInfo
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Span, Tone, View
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells

EVENTS = "events"

_COLUMNS = (
    Column("time", "TIME", least=8),
    Column("level", "LEVEL", keep=1, least=5, widest=8),
    Column("process", "PROCESS", keep=2, least=10, widest=32, tail=True),
    Column("text", "EVENT", least=20, widest=400),
)
_LEVEL_ORDER = {"info": 0.0, "warning": 1.0, "error": 2.0}


class Events:
    """The cursor stays at the top as new events come in, unless it is on a row: then it stays on that."""

    name = "events"
    summary = "starts, deaths and restarts, newest first"
    acts: tuple[Act, ...] = ()

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        events = frame.snapshot.events
        rows = [_row(event, frame.now) for event in reversed(events)]
        return (cells.table(EVENTS, "Events", _COLUMNS, rows, empty="Nothing has happened yet.", note=_note(events)),)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        event = next((each for each in frame.snapshot.events if str(each.seq) == row), None)
        if event is None:
            return None
        facts = [
            ("time", cells.moment(event.at, "%Y-%m-%d %H:%M:%S %z")),
            ("ago", cells.seconds(frame.now - event.at)),
            ("level", _level(event.level)),
            ("process", cells.text(event.process)),
        ]
        body = [(Span(line),) for line in cells.wrapped(event.text)] if event.text else []
        return Lines(EVENTS, f"event {event.seq}", (*cells.facts(facts), (), *body))


VIEW: View = Events()


def _row(event: EventInfo, now: float) -> Row:
    tone = cells.LEVEL_TONES.get(event.level, Tone.PLAIN)
    return Row(
        str(event.seq),
        (cells.clock(event.at, now), _level(event.level), cells.name(event.process), cells.text(event.text, tone)),
    )


def _level(level: str) -> Cell:
    """Sorted by how bad it is."""
    return Cell(one_line(level), cells.LEVEL_TONES.get(level, Tone.DIM), _LEVEL_ORDER.get(level, 0.0))


def _note(events: tuple[EventInfo, ...]) -> str:
    """How many of the events listed are bad news."""
    counts = [(word, sum(event.level == word for event in events)) for word in ("error", "warning")]
    return ", ".join(f"{number} {word}{'s' if number > 1 else ''}" for word, number in counts if number)
