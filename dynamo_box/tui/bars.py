"""The lines that frame every screen: how the box is, the tabs, and the keys. No Textual."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.feed import Feed, Link
from dynamo_box.tui.model import Span, Tone
from dynamo_box.tui.screens import SCREENS
from dynamo_box.tui.source import Why
from dynamo_box.tui.text import BLANK, Line, Mark, clip_spans, one_line, spans_width
from dynamo_box.tui.tiers import trouble
from dynamo_box.wording import duration

_STATE_TONES = {
    "ready": Tone.GOOD,
    "starting": Tone.WARN,
    "degraded": Tone.WARN,
    "stopping": Tone.WARN,
    "stopped": Tone.DIM,
    "failed": Tone.BAD,
}


SILENT_S = 5.0
"""A box that lives says something about once a second."""


class Part(NamedTuple):
    """A piece of a bar; the least important goes first when there is no room."""

    importance: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Playing:
    """Where a recording is."""

    position_s: float
    duration_s: float
    speed: float
    paused: bool


def status(feed: Feed, now: float, marks: Sequence[Span], width: int) -> Line:
    """The first line: the box from left to right, `marks` (PAUSED, READ ONLY, …) at the right."""
    parts = list(_of_link(feed, now))
    if feed.snapshot is not None:
        if feed.snapshot.simulated:
            parts.insert(0, Part(99, (Span(" SIMULATED ", Tone.LOUD),)))
        parts += _of_box(feed.snapshot, feed.uptime_s(now), there=feed.link is not Link.LOST)
    right = [span for mark in marks for span in (Span("  "), mark)]
    left = join(parts, width - spans_width(right))
    gap = max(width - spans_width(left) - spans_width(right), 0)
    return Line(clip_spans((*left, Span(" " * gap), *right), width), Mark.BAR)


def playing(replay: Playing, *, ended: bool) -> Span:
    """The mark of a recording."""
    state = "paused " if replay.paused else "ended " if ended else ""
    speed = "" if replay.speed == 1 else f" {replay.speed:g}×"
    return Span(f"REPLAY {state}{duration(replay.position_s)} of {duration(replay.duration_s)}{speed}", Tone.ACCENT)


def tabs(current: str, width: int) -> Line:
    """The second line. Where all names are too long, the keys and the current name remain."""
    spans = [tab for each in SCREENS for tab in _tab(each.key, each.name, each.name == current)]
    if spans_width(spans) > width:
        spans = [
            tab
            for each in SCREENS
            for tab in _tab(each.key, each.name if each.name == current else "", each.name == current)
        ]
    return Line(clip_spans(tuple(spans), width))


def tab_at(x: int, current: str, width: int) -> str | None:
    """The screen whose tab covers cell `x`."""
    start = 0
    short = spans_width(tab for each in SCREENS for tab in _tab(each.key, each.name, each.name == current)) > width
    for each in SCREENS:
        name = each.name if not short or each.name == current else ""
        start += spans_width(_tab(each.key, name, each.name == current))
        if x < start:
            return each.name
    return None


def keys(hints: Iterable[tuple[str, str]], width: int) -> Line:
    """The last line: what the keys do here, most important first."""
    parts = [Part(-at, (Span(key, Tone.ACCENT), Span(f" {title}"))) for at, (key, title) in enumerate(hints)]
    return Line(join(parts, width), Mark.BAR)


def notice(text: str, tone: Tone, width: int) -> Line:
    """What takes the place of the keys for a moment."""
    return Line(clip_spans((Span(one_line(text), tone),), width), Mark.BAR)


def nothing_yet(feed: Feed, where: str, width: int, height: int) -> list[Line]:
    """What stands in the middle of the screen before the first snapshot; `where` is the run dir."""
    lines = [clip_spans(line, width) for line in _waiting(feed, where)]
    above = [BLANK] * max((height - len(lines)) // 2, 0)
    return above + [Line((Span(" " * ((width - spans_width(line)) // 2)), *line)) for line in lines]


def join(parts: Iterable[Part], width: int) -> tuple[Span, ...]:
    """Parts two cells apart, as many as fit, the most important first."""
    kept = list(parts)
    while len(kept) > 1 and sum(spans_width(part.spans) for part in kept) + 2 * (len(kept) - 1) > width:
        kept.remove(min(kept, key=lambda part: part.importance))
    spans: list[Span] = []
    for part in kept:
        spans += [Span("  "), *part.spans] if spans else part.spans
    return clip_spans(tuple(spans), max(width, 0))


def _waiting(feed: Feed, where: str) -> list[tuple[Span, ...]]:
    match feed.link, feed.lost:
        case Link.LOST, lost if lost is not None:
            return [
                (Span(one_line(lost.reason), Tone.WARN),),
                (Span(one_line(lost.remedy)),),
                (),
                (Span(f"looking in {one_line(where)}; this screen comes alive when a box does", Tone.DIM),),
            ]
        case Link.LIVE, _:
            return [(Span("connected; waiting for the first snapshot", Tone.DIM),)]
        case Link.ENDED, _:
            return [(Span("the recording holds nothing that can be shown", Tone.WARN),)]
        case _:
            return [(Span("looking for a box…", Tone.DIM),)]


def _of_link(feed: Feed, now: float) -> Iterable[Part]:
    if feed.link is Link.LOST and feed.lost is not None:
        broken = feed.lost.why is Why.BROKEN
        text = one_line(feed.lost.reason) + ("; reconnecting" if broken else "")
        yield Part(100, (Span(text, Tone.BAD if broken else Tone.WARN),))
    elif (silent_s := feed.silent_s(now)) >= SILENT_S:
        yield Part(100, (Span(f"no word from the box for {duration(silent_s)}", Tone.WARN),))
    elif feed.snapshot is None:
        yield Part(100, (Span("dynbox top", Tone.TITLE),))


def _of_box(snapshot: BoxSnapshot, uptime_s: float, *, there: bool) -> Iterable[Part]:
    """What a box that isn't `there` any more was doing last is no longer so."""
    box = snapshot.box
    if there:
        yield Part(90, (Span("● ", _STATE_TONES.get(box.state, Tone.PLAIN)), Span(one_line(box.state))))
    if there and (words := trouble(snapshot)):
        yield Part(85, (Span(words, Tone.WARN),))
    if box.profile:
        yield Part(60, (Span(one_line(box.profile), Tone.TITLE),))
    yield Part(30, (Span(one_line(box.endpoint)),))
    yield Part(40, (Span("up ", Tone.DIM), Span(duration(uptime_s))))
    frontends = [each.figures for each in snapshot.processes if isinstance(each.figures, FrontendFigures)]
    if frontends:
        yield Part(80, (Span(f"{sum(each.tokens_per_s for each in frontends):,.0f}"), Span(" tok/s", Tone.DIM)))
        yield Part(70, (Span(f"{sum(each.active for each in frontends)}"), Span(" active", Tone.DIM)))
        errors = sum(each.errors for each in frontends)
        yield Part(50, (Span(f"{errors}", Tone.BAD if errors else Tone.PLAIN), Span(" errors", Tone.DIM)))
    if box.cause and box.state not in ("ready", "starting"):
        yield Part(20, (Span(one_line(box.cause), Tone.BAD),))


def _tab(key: str, name: str, current: bool) -> tuple[Span, Span]:
    tone = Tone.TITLE if current else Tone.DIM
    return Span(f" {key}", Tone.ACCENT if not current else tone), Span(f" {name} " if name else " ", tone)
