"""What a person looks at and did so far, as far as it isn't on a widget: screen, filters, pause, theme. No Textual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynamo_box.tui import legs
from dynamo_box.tui.bars import Playing, playing, status
from dynamo_box.tui.feed import Feed, Link
from dynamo_box.tui.filter import EVERYTHING, Filter
from dynamo_box.tui.keys import KEYS, OF_TABLES, SEEK_KEYS, Key
from dynamo_box.tui.model import Act, Frame, Lines, Panel, Span, Tone
from dynamo_box.tui.screens import LOGS, SCREENS, view
from dynamo_box.tui.source import Seekable, Source, SourceEvent
from dynamo_box.tui.text import Line
from dynamo_box.tui.theme_names import DARK
from dynamo_box.wording import duration


@dataclass(frozen=True)
class Options:
    """What a person asked for on the command line. `recording` says how a recording under way stands, `theme` is one
    of THEME_NAMES.
    """

    screen: str = SCREENS[0].name
    wanted: Filter = EVERYTHING
    theme: str = DARK
    readonly: bool = False
    recording: Callable[[], str] | None = None


class Session:
    """`frame` is what the screen shows: the feed's latest, or the one at which it was paused."""

    def __init__(self, source: Source, options: Options) -> None:
        self.replay = source if isinstance(source, Seekable) else None
        self.feed = Feed(live=source.acts)
        self.screen = options.screen
        self.frame: Frame | None = None
        self._steers = source.acts and not options.readonly
        self._options = options
        self._filters = {options.screen: options.wanted}
        self._paused_at: float | None = None

    def take(self, event: SourceEvent, now: float) -> None:
        """`now` is Unix time, here and below."""
        self.feed.take(event, now)

    def advance(self, now: float) -> bool:
        """Make the latest the one that is shown; False while the screen is paused."""
        if self._paused_at is not None and self.frame is not None:
            return False
        self.frame = self.feed.frame(now)
        return True

    @property
    def stale(self) -> bool:
        """What is shown is of a box that is gone."""
        return self.feed.link is Link.LOST

    @property
    def wanted(self) -> Filter:
        """The filter; each screen has its own."""
        return self._filters.get(self.screen, EVERYTHING)

    @wanted.setter
    def wanted(self, wanted: Filter) -> None:
        self._filters[self.screen] = wanted

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def pause(self, now: float) -> None:
        """Hold still, or go on. A recording is stopped itself."""
        if self.replay is not None:
            self.replay.set_paused(not self.replay.paused)
        else:
            self._paused_at = now if self._paused_at is None else None

    @property
    def acts(self) -> tuple[Act, ...]:
        """What can be done on this screen, in a box as this one is."""
        if not self._steers or self.screen == LOGS:
            return ()
        there: set[str] = set()
        if self.frame is not None:
            snapshot = self.frame.snapshot
            there = {process.kind for process in snapshot.processes} | legs.traits(snapshot)
        return tuple(act for act in view(self.screen).acts if not act.of or act.of in there)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What works on this screen, beside its acts and the keys of the screens."""
        keys = KEYS
        if self.screen == LOGS:
            from dynamo_box.tui.views.logs import KEYS as LOG_KEYS

            keys = LOG_KEYS + tuple(key for key in KEYS if key.id not in OF_TABLES)
        return keys if self.replay is None else (*SEEK_KEYS, *keys)

    def panels(self, width: int) -> tuple[Panel, ...]:
        """Of the screen that is open; none before the first snapshot, and none for the logs."""
        return () if self.frame is None or self.screen == LOGS else view(self.screen).panels(self.frame, width)

    def detail(self, panel: str, row: str) -> Lines | None:
        return None if self.frame is None or self.screen == LOGS else view(self.screen).detail(self.frame, panel, row)

    def status(self, now: float, width: int) -> Line:
        return status(self.feed, now, tuple(self._marks(now)), width)

    def _marks(self, now: float) -> Iterator[Span]:
        if self._paused_at is not None:
            yield Span(f"PAUSED {duration(max(now - self._paused_at, 0.0))} ago", Tone.WARN)
        if self.replay is not None and self.replay.note:
            yield Span(self.replay.note, Tone.WARN)
        if self.replay is not None:
            at = Playing(self.replay.position_s, self.replay.duration_s, self.replay.speed, self.replay.paused)
            yield playing(at, ended=self.feed.link is Link.ENDED)
        if self._options.recording is not None:
            yield Span(self._options.recording(), Tone.ACCENT)
        if self._options.readonly and self.replay is None:
            yield Span("READ ONLY", Tone.DIM)
