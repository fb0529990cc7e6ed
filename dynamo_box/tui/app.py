"""`dynbox top` as a Textual app: events of a source in, lines out.

source ─(its thread)─► Inbox ─► Session ─► View.panels ─► Body; the bars above and below say how the box is

Only the screen that is open is computed, as often as snapshots come. While it is paused, or out of date because the box
is gone, it stays as it was; order, filter and cursor go on working on what is there.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.filter import LineFilter, NoColor
from textual.geometry import Size
from textual.message import Message
from textual.timer import Timer

from dynamo_box.paths import RunDir
from dynamo_box.tui import acts, bars, help_page
from dynamo_box.tui.body import Body
from dynamo_box.tui.dialogs import Answer, QuestionDialog, TextDialog
from dynamo_box.tui.filter import EVERYTHING, Filter, FilterError
from dynamo_box.tui.inbox import Inbox
from dynamo_box.tui.keys import KEYS, SCREEN_KEYS, SEEK_KEYS, Key
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.log_feed import LiveLog, LogBatch, LogFeed
from dynamo_box.tui.model import Act, Lines, Span, Tone
from dynamo_box.tui.palette import BoxCommands, Command
from dynamo_box.tui.screens import LOGS, SCREENS
from dynamo_box.tui.session import Options, Session
from dynamo_box.tui.source import NewSnapshot, Source, SourceEvent
from dynamo_box.tui.text import BLANK, Line, clip_spans, spans_width
from dynamo_box.tui.theme_names import NONE
from dynamo_box.tui.themes import THEMES

if TYPE_CHECKING:
    from textual.widgets import Input

    from dynamo_box.tui.filter_line import FilterLine
    from dynamo_box.tui.views.logs import LogsWidget

LEAST_WIDTH, LEAST_HEIGHT = 40, 10
NOTICE_S = 6.0
TICK_S = 1.0


class Arrived(Message):
    """There is something in the inbox."""


class Answered(Message):
    """The box has said how an act went."""

    def __init__(self, outcome: acts.Outcome) -> None:
        super().__init__()
        self.outcome = outcome


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
        super().__init__()
        options = options or Options()
        self.animation_level = "none"
        self.session = Session(source, options)
        self._source, self._log_feed, self._run_dir = source, log, run_dir
        self._inbox: Inbox[SourceEvent | LogBatch] = Inbox(
            lambda: self.post_message(Arrived()), lambda event: isinstance(event, NewSnapshot)
        )
        self._steering = acts.Steering(run_dir, lambda outcome: self.post_message(Answered(outcome)))
        self._look = THEMES[options.theme]
        self._notice: tuple[str, Tone] | None = None
        self._notice_timer: Timer | None = None
        self._detail_of: tuple[str, str] | None = None
        self._logs: LogsWidget | None = None
        self._filter_line: FilterLine | None = None
        self._status, self._tabs, self._keys = LineWidget(id="status"), LineWidget(id="tabs"), LineWidget(id="keys")
        self._too_small = LineWidget(id="too-small")
        self._body = Body()
        self._body.open(options.screen)
        self.failure: Exception | None = None
        """A defect that ended the app; whoever ran it reports it."""

    def compose(self) -> ComposeResult:
        yield from (self._status, self._tabs, self._body, self._keys, self._too_small)

    async def on_mount(self) -> None:
        self._put_on(self._look.name)
        if not self.is_headless:
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self.set_interval(TICK_S, self._draw_bars)
        await self._open(self.session.screen)
        self._source.start(self._inbox.put)

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
        """Without colour, what Textual draws itself (input, palette) has none either."""
        return [*super().get_line_filters(), *([NoColor()] if self._look.name == NONE else [])]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
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
        self._clear_notice()
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
        keys = [key for key in self._keys_here() if key.shown]
        self.push_screen(TextDialog(help_page.page(self.session.screen, keys, self.session.acts, tables), self._look))

    def action_detail(self) -> None:
        """All about the row under the cursor, kept up to date while it is open."""
        if self._on_logs is not None:
            self._show_page(self._on_logs.detail(self.size.width))
        elif (current := self._body.stack.current) is not None:
            panel, row = current
            self._detail_of = (panel, row.key)
            self._show_page(self.session.detail(panel, row.key))

    async def action_filter(self) -> None:
        from dynamo_box.tui.filter_line import FilterLine

        if (self._filter_line is None and self.session.frame is not None) or self._on_logs is not None:
            self._filter_line = FilterLine(self.session.wanted.text)
            await self.mount(self._filter_line, before=self._keys)
            self._filter_line.focus()

    async def action_clear(self) -> None:
        if self._filter_line is None:
            self._set_filter(EVERYTHING)

    def on_input_changed(self, event: Input.Changed) -> None:
        try:
            self._set_filter(Filter.parse(event.value))
        except FilterError as error:
            self._say(f"{error}", Tone.BAD)
        else:
            self._clear_notice()

    async def on_filter_line_left(self, event: FilterLine.Left) -> None:
        if event.clear:
            self._set_filter(EVERYTHING)
        self._clear_notice()
        await self._close_filter_line()

    # Acts

    def do(self, act: Act) -> None:
        """Ask what has to be asked, then tell the box."""
        frame = self.session.frame
        if frame is None or act not in self.session.acts:
            return
        current = self._body.stack.current
        order = acts.order(act, current[1].key if current else None, frame.snapshot)
        if isinstance(order, acts.Refusal):
            self._say(order.reason, Tone.WARN)
        elif act.kind == "mode":
            modes = [Answer(str(at), mode, mode) for at, mode in enumerate(acts.ROUTER_MODES, 1)]
            asked = f"How shall requests be routed? Now: {acts.router_mode(frame.snapshot)}"
            self._ask("router", asked, modes, lambda mode: self._begin(acts.Order("mode", mode, order.process)))
        elif act.question:
            answers = [Answer("n", "", "no"), Answer("y", "yes", f"yes, {act.title}")]
            self._ask(act.title, acts.question(act, order.target), answers, lambda _: self._begin(order))
        else:
            self._begin(order)

    def on_answered(self, message: Answered) -> None:
        outcome = message.outcome
        self._say(f"{outcome.wanted}: {outcome.text}", Tone.GOOD if outcome.ok else Tone.BAD)

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
        for key in self._keys_here():
            if key.hint:
                yield Command(key.hint, key.help, partial(self.run_action, key.action))

    def _ask(self, title: str, question: str, answers: list[Answer], then: Callable[[str], object]) -> None:
        def answered(value: str | None) -> None:
            if value:
                then(value)

        self.push_screen(QuestionDialog(title, question, answers, self._look), answered)

    def _begin(self, order: acts.Order) -> None:
        begun = self._steering.start(order)
        self._say(f"{order}: under way" if begun else f"{order}: that is under way already", Tone.ACCENT)

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
            await self.mount(self._logs, after=self._body)
            self._log_feed.start_log(self._inbox.put)
        self._choose_widgets(self.size)
        if name != LOGS:
            self.set_focus(None)
        self._draw()

    def _choose_widgets(self, size: Size) -> None:
        """One of body and logs between the bars, or only the word that there is no room."""
        small = size.width < LEAST_WIDTH or size.height < LEAST_HEIGHT
        hidden = {self._body if self._on_logs is not None else self._logs, self._too_small}
        for widget in self.screen_stack[0].children:
            widget.display = widget is self._too_small if small else widget not in hidden

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
            self._body.show(self._centred(bars.nothing_yet(self.session.feed, str(self._run_dir.root))))
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
        if self._notice is not None:
            self._keys.show([bars.notice(*self._notice, width)])
        else:
            hints = [(act.key, act.title) for act in self.session.acts]
            hints += [(key.shown, key.hint) for key in self._keys_here() if key.hint]
            self._keys.show([bars.keys(hints, width)])

    def _centred(self, lines: list[tuple[Span, ...]]) -> list[Line]:
        width, height = self._body.size
        above = [BLANK] * max((height - len(lines)) // 2, 0)
        clipped = [clip_spans(line, width) for line in lines]
        return above + [Line((Span(" " * ((width - spans_width(line)) // 2)), *line)) for line in clipped]

    def _keys_here(self) -> tuple[Key, ...]:
        keys: tuple[Key, ...] = KEYS
        if self._on_logs is not None:
            from dynamo_box.tui.views.logs import KEYS as LOG_KEYS

            keys = LOG_KEYS + tuple(key for key in KEYS if key.id not in _OF_TABLES)
        return keys if self.session.replay is None else (*SEEK_KEYS, *keys)

    def _show_page(self, page: Lines | None) -> None:
        if page is not None:
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

    def _say(self, text: str, tone: Tone) -> None:
        """One line where the keys stand, until a key is pressed or NOTICE_S have passed."""
        self._clear_notice()
        self._notice = (text, tone)
        self._notice_timer = self.set_timer(NOTICE_S, self._clear_notice)
        self._draw_bars()

    def _clear_notice(self) -> None:
        if self._notice_timer is not None:
            self._notice_timer.stop()
        if self._notice is not None:
            self._notice = self._notice_timer = None
            self._draw_bars()


_OF_TABLES = frozenset({"sort", "sort.reverse", "table.next", "table.previous"})
