"""`dynbox top` as a Textual app: events of a source in, lines out.

source ─(its thread)─► Inbox ─► Session ─► View.panels ─► Body; the bars above and below say how the box is

Only the screen that is open is computed, as often as snapshots come. While it is paused, or out of date because the box
is gone, it stays as it was; order, filter and cursor go on working on what is there.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.filter import LineFilter, NoColor
from textual.geometry import Size
from textual.message import Message

from dynamo_box.paths import RunDir
from dynamo_box.tui import bars, help_page
from dynamo_box.tui.body import Body
from dynamo_box.tui.dialogs import TextDialog, text_width
from dynamo_box.tui.driver import TerminalDriver
from dynamo_box.tui.filter import EVERYTHING, Filter, FilterError
from dynamo_box.tui.inbox import Inbox
from dynamo_box.tui.keys import KEYS, SCREEN_KEYS, SEEK_KEYS, Key
from dynamo_box.tui.keys_bar import KeysBar
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.log_feed import LiveLog, LogBatch, LogFeed
from dynamo_box.tui.model import Act, Lines, Span, Tone
from dynamo_box.tui.palette import BoxCommands, Command
from dynamo_box.tui.screens import LOGS, SCREENS
from dynamo_box.tui.session import Options, Session
from dynamo_box.tui.source import NewSnapshot, Source, SourceEvent
from dynamo_box.tui.steering import Answered, Steering
from dynamo_box.tui.text import Line, clip_spans
from dynamo_box.tui.theme_names import NONE
from dynamo_box.tui.themes import THEMES

if TYPE_CHECKING:
    from textual.widgets import Input

    from dynamo_box.tui.filter_line import FilterLine
    from dynamo_box.tui.views.logs import LogsWidget

LEAST_WIDTH, LEAST_HEIGHT = 40, 10
TICK_S = 1.0


class Arrived(Message):
    """There is something in the inbox."""


def _bindings(keys: Iterable[Key]) -> list[BindingType]:
    return [
        Binding(key.key, key.action, key.hint, show=bool(key.hint), tooltip=key.help, id=key.id, priority=key.first)
        for key in keys
    ]


class TopApp(App[None]):
    """`source` and `log` are started and closed by the app; acts go to the box in `run_dir`."""

    CSS = """
    Screen { layout: vertical; overflow: hidden; background: transparent; }
    #status, #tabs, #keys { height: 1; }
    #body, #logs { height: 1fr; }
    #too-small { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = _bindings((*KEYS, *SCREEN_KEYS, *SEEK_KEYS))
    COMMANDS = {BoxCommands}  # noqa: RUF012 - declared by Textual as it is
    TITLE = "dynbox top"

    def __init__(self, source: Source, log: LogFeed, run_dir: RunDir, options: Options | None = None) -> None:
        super().__init__(TerminalDriver)
        options = options or Options()
        self.animation_level = "none"
        self.session = Session(source, options)
        self._source, self._log_feed, self._looks_in = source, log, str(run_dir.root)
        self._inbox: Inbox[SourceEvent | LogBatch] = Inbox(
            lambda: self.post_message(Arrived()), lambda event: isinstance(event, NewSnapshot)
        )
        self._look = THEMES[options.theme]
        self._detail_of: tuple[str, str] | None = None
        self._logs: LogsWidget | None = None
        self._filter_line: FilterLine | None = None
        self._status, self._tabs, self._keys = LineWidget(id="status"), LineWidget(id="tabs"), KeysBar()
        self._too_small = LineWidget(id="too-small")
        self._body = Body()
        self._body.open(options.screen)
        self._steering = Steering(self, run_dir, self._keys.say)
        self.failure: Exception | None = None
        """A defect that ended the app; whoever ran it reports it."""

    def compose(self) -> ComposeResult:
        yield from (self._status, self._tabs, self._body, self._keys, self._too_small)

    async def on_mount(self) -> None:
        self._put_on(self._look.name)
        if not self.is_headless:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self.app_resume_signal.subscribe(self, lambda _: self.screen.refresh(layout=True))
        self._source.start(self._inbox.put)
        self.set_interval(TICK_S, self._draw_bars)
        await self._open(self.session.screen)

    def _handle_exception(self, error: Exception) -> None:
        """Textual would print a traceback over the terminal; `dynbox` has a place for them."""
        if self.is_headless:
            super()._handle_exception(error)
        else:
            self.failure = error
            self.exit(return_code=1)

    def on_unmount(self) -> None:
        self._source.close()
        if self._logs is not None:
            self._log_feed.close_log()

    def get_line_filters(self) -> list[LineFilter]:
        """Our lines have the colours that they shall have, and need none of Textual's filters. Without colour, what
        Textual draws itself (input, palette) has none either.
        """
        return [NoColor()] if self._look.name == NONE else []

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key means what its binding says now; otherwise it goes to the widget that is being typed into."""
        if action == "filter":
            return self._filter_line is None and len(self.screen_stack) == 1
        return self.session.replay is not None if action in ("seek", "speed") else True

    def on_arrived(self) -> None:
        now = time.time()
        moved = False
        for event in self._inbox.take():
            if isinstance(event, LogBatch):
                if self._logs is not None:
                    self._logs.take(event)
                continue
            self.session.take(event, now)
            moved = True
        if moved and self.session.advance(now):
            self._draw_panels()
            self._follow_logs()
        if moved:
            self._draw_bars()

    def on_resize(self, event: events.Resize) -> None:
        said = f"terminal too small: {LEAST_WIDTH}×{LEAST_HEIGHT} at least"
        self._too_small.show([Line(clip_spans((Span(said, Tone.WARN),), event.size.width))])
        self._choose_widgets(event.size)

    def on_body_resized(self) -> None:
        self._draw()

    def on_key(self, event: events.Key) -> None:
        """Keys that no widget wanted, before the bindings have their turn: those of the screen's acts."""
        self._keys.clear()
        act = next((each for each in self.session.acts if each.key == event.character), None)
        if act is not None and len(self.screen_stack) == 1:
            event.prevent_default()
            self.do(act)

    def on_click(self, event: events.Click) -> None:
        if event.widget is self._tabs:
            name = bars.tab_at(event.x, self.session.screen, self._tabs.size.width)
            if name is not None:
                self.call_later(self._open, name)

    def on_body_opened(self) -> None:
        self.action_detail()

    def on_logs_widget_opened(self) -> None:
        self.action_detail()

    # What keys do

    async def action_screen(self, name: str) -> None:
        await self._open(name)

    def action_move(self, by: int) -> None:
        if self._on_logs is not None:
            self._on_logs.move(by)
        elif (pane := self._body.stack.focused) is not None:
            pane.move(by)
            self._body.redraw()

    def action_page(self, by: int) -> None:
        if self._on_logs is not None:
            self._on_logs.page(by)
        else:
            self.action_move(by * self._body.stack.page)

    def action_focus_next(self) -> None:
        """In Textual's words, since its screens bind tab to them; our tables are no widgets."""
        self._body.stack.focus_next()
        self._body.redraw()

    def action_focus_previous(self) -> None:
        self._body.stack.focus_next(-1)
        self._body.redraw()

    def action_sort(self) -> None:
        if (pane := self._body.stack.focused) is not None:
            pane.sort_next()
            self._body.redraw()

    def action_sort_reverse(self) -> None:
        if (pane := self._body.stack.focused) is not None:
            pane.sort_reverse()
            self._body.redraw()

    def action_pause(self) -> None:
        self.session.pause(time.time())
        if self._logs is not None:
            self._logs.set_paused(self.session.paused)
        if self.session.advance(time.time()):
            self._draw_panels()
        self._draw_bars()

    def action_seek(self, by_s: float) -> None:
        if (replay := self.session.replay) is not None:
            replay.seek(replay.position_s + by_s)

    def action_speed(self, factor: float) -> None:
        if (replay := self.session.replay) is not None:
            replay.set_speed(replay.speed * factor)
            self._draw_bars()

    def action_theme(self) -> None:
        names = list(THEMES)
        self._put_on(names[(names.index(self._look.name) + 1) % len(names)])

    def action_help(self) -> None:
        tables = [] if self._on_logs is not None else [pane.table for pane in self._body.stack.tables]
        keys = [key for key in self.session.keys if key.shown]
        self.push_screen(TextDialog(help_page.page(self.session.screen, keys, self.session.acts, tables), self._look))

    def action_detail(self) -> None:
        """All about the row under the cursor, kept up to date while it is open."""
        if self._on_logs is not None:
            if (page := self._on_logs.detail(text_width(self.size.width))) is not None:
                self._show_page(page)
        elif (current := self._body.stack.current) is not None:
            panel, row = current
            if (page := self.session.detail(panel, row.key)) is not None:
                self._detail_of = (panel, row.key)
                self._show_page(page)

    async def action_filter(self) -> None:
        """Open the line for the filter. It has the focus before the next key is looked at, and so gets all of them."""
        from dynamo_box.tui.filter_line import FilterLine

        if self.session.frame is not None or self._on_logs is not None:
            self._filter_line = FilterLine(self.session.wanted.text)
            await self.mount(self._filter_line, before=self._keys)
            self.set_focus(self._filter_line)

    async def action_clear(self) -> None:
        if self._filter_line is None:
            self._set_filter(EVERYTHING)

    def on_input_changed(self, event: Input.Changed) -> None:
        try:
            self._set_filter(Filter.parse(event.value))
        except FilterError as error:
            self._keys.say(f"{error}", Tone.BAD)
        else:
            self._keys.clear()

    async def on_filter_line_left(self, event: FilterLine.Left) -> None:
        if event.clear:
            self._set_filter(EVERYTHING)
        self._keys.clear()
        await self._close_filter_line()

    async def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """A click on the logs takes the keys away from the filter's line: the person has done with it."""
        if event.widget is self._logs:
            await self._close_filter_line()

    def do(self, act: Act) -> None:
        """An act of this screen, to the row under the cursor."""
        frame, current = self.session.frame, self._body.stack.current
        if frame is not None and act in self.session.acts:
            self._steering.do(act, current[1].key if current else None, frame.snapshot, self._look)

    def on_answered(self, message: Answered) -> None:
        self._steering.answered(message)

    def commands(self) -> Iterator[Command]:
        """What the palette finds."""
        for each in SCREENS:
            yield Command(f"screen: {each.name}", each.summary, partial(self._open, each.name))
        for act in self.session.acts:
            yield Command(
                f"act: {act.title}", "the row under the cursor" if act.needs_row else "the box", partial(self.do, act)
            )
        for name in THEMES:
            yield Command(f"theme: {name}", "", partial(self._put_on, name))
        for key in self.session.keys:
            if key.hint:
                yield Command(key.hint, key.help, partial(self.run_action, key.action))

    # What is drawn

    async def _open(self, name: str) -> None:
        """Show a screen, from its import on."""
        await self._close_filter_line()
        self.session.screen = name
        self._body.open(name)
        if name == LOGS and self._logs is None:
            from dynamo_box.tui.views.logs import LogsWidget

            self._logs = LogsWidget(id="logs")
            self._logs.set_theme(self._look)
            self._logs.set_filter(self.session.wanted)
            self._logs.set_paused(self.session.paused)
            await self.mount(self._logs, after=self._body)
            self._log_feed.start_log(self._inbox.put)
        self._choose_widgets(self.size)
        if name != LOGS:
            self.set_focus(None)
        self._draw()

    def _choose_widgets(self, size: Size) -> None:
        """One of body and logs between the bars, or only the word that there is no room."""
        small = size.width < LEAST_WIDTH or size.height < LEAST_HEIGHT
        self._too_small.display = small
        for bar in (self._status, self._tabs, self._keys):
            bar.display = not small
        self._body.display = not small and self._on_logs is None
        if self._logs is not None:
            self._logs.display = not small and self._on_logs is not None

    @property
    def _on_logs(self) -> LogsWidget | None:
        """The logs' widget, while it is the one that is open."""
        return self._logs if self.session.screen == LOGS else None

    def _draw(self) -> None:
        self._draw_panels()
        self._draw_bars()

    def _draw_panels(self) -> None:
        if self._on_logs is not None or not self._body.size.height:
            return
        if self.session.frame is None:
            self._body.show(bars.nothing_yet(self.session.feed, self._looks_in, *self._body.size))
            return
        self._body.show_panels(
            self.session.panels(self._body.size.width), self.session.wanted, stale=self.session.stale
        )
        if self._detail_of is not None and isinstance(dialog := self.screen, TextDialog):
            dialog.update(self.session.detail(*self._detail_of))

    def _follow_logs(self) -> None:
        frame = self.session.frame
        if frame is not None and frame.snapshot.box.logs_dir and isinstance(self._log_feed, LiveLog):
            self._log_feed.look_in(Path(frame.snapshot.box.logs_dir))

    def _draw_bars(self) -> None:
        width = self.size.width
        self._status.show([self.session.status(time.time(), width)])
        self._tabs.show([bars.tabs(self.session.screen, width)])
        hints = [(act.key, act.title) for act in self.session.acts]
        self._keys.show_keys(hints + [(key.shown, key.hint) for key in self.session.keys if key.hint])

    def _show_page(self, page: Lines) -> None:
        self.push_screen(TextDialog(page, self._look), self._page_closed)

    def _page_closed(self, _: None) -> None:
        self._detail_of = None

    def _set_filter(self, wanted: Filter) -> None:
        self.session.wanted = wanted
        if self._on_logs is not None:
            self._on_logs.set_filter(wanted)
        self._draw()

    async def _close_filter_line(self) -> None:
        line, self._filter_line = self._filter_line, None
        if line is not None:
            await line.remove()
            if self._on_logs is not None:
                self._on_logs.focus()

    def _put_on(self, name: str) -> None:
        self._look = THEMES[name]
        self.theme = self._look.textual
        for screen in self.screen_stack:
            for widget in screen.query(LineWidget):
                widget.set_theme(self._look)
