"""The logs screen's widget: a `LogPane` that is painted, and the keys that only it has.

It repaints when lines come (a few times a second at most) and only where the text changed. A new filter works its way
through the older lines between other messages, so that keys are never kept waiting.
"""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from dynamo_box.tui.filter import Filter
from dynamo_box.tui.keys import Key
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.log_feed import LogBatch
from dynamo_box.tui.log_pane import LogPane
from dynamo_box.tui.model import Lines

KEYS = (
    Key("l", "logs.level", "level", "l", "level", "least level: debug, info, warning, error"),
    Key("p", "logs.process", "process(1)", "p", "process", "the next process alone, after the last all"),
    Key("P", "logs.process.previous", "process(-1)", "P", "", "the process before"),
    Key("o", "logs.only", "only", "o", "only", "only the process of this line, or all again"),
    Key("f", "logs.follow", "follow", "f", "follow", "go to the newest line and stay there"),
)
WHEEL_LINES = 3


class LogsWidget(LineWidget, can_focus=True):
    """Give it batches (`take`, on the app's thread) whether it is on the screen or not; it paints only when it is."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key.key, key.action, key.hint, id=key.id, show=bool(key.hint), tooltip=key.help) for key in KEYS
    ]

    class Opened(Message):
        """An entry was clicked that the cursor was on already: it wants to be seen whole."""

    def __init__(self, pane: LogPane | None = None, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.pane = LogPane() if pane is None else pane
        self._followed_before_pause: bool | None = None
        self._looking = False

    def take(self, batch: LogBatch) -> None:
        self.pane.take(batch)
        self._look_on()

    def set_filter(self, wanted: Filter) -> None:
        self.pane.set_filter(wanted)
        self._look_on()

    def set_paused(self, paused: bool) -> None:
        """Hold the screen still, or go on as before; lines are taken in all the same."""
        if paused and self._followed_before_pause is None:
            self._followed_before_pause = self.pane.following
            self.pane.hold()
        elif not paused and self._followed_before_pause is not None:
            if self._followed_before_pause:
                self.pane.follow()
            self._followed_before_pause = None
        self.paint()

    def move(self, by: int) -> None:
        """Move the cursor by lines; far enough down, it follows."""
        self.pane.move(by)
        self.paint()

    def page(self, by: int) -> None:
        """Move by screens."""
        self.pane.scroll(by * max(self.pane.page - 1, 1))
        self.paint()

    def detail(self, width: int) -> Lines | None:
        """All of the entry under the cursor."""
        return self.pane.detail(width)

    def paint(self) -> None:
        if self.display and self.size.height:
            self.show(self.pane.lines(self.size.width, self.size.height))

    def action_level(self) -> None:
        self.pane.next_level()
        self._look_on()

    def action_process(self, by: int) -> None:
        self.pane.next_process(by)
        self._look_on()

    def action_only(self) -> None:
        self.pane.only_this_process()
        self._look_on()

    def action_follow(self) -> None:
        self.pane.follow()
        self.paint()

    def on_show(self) -> None:
        self.focus()
        self.paint()

    def on_resize(self) -> None:
        self.paint()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.pane.scroll(WHEEL_LINES)
        self.paint()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.pane.scroll(-WHEEL_LINES)
        self.paint()

    def on_click(self, event: events.Click) -> None:
        event.stop()
        before = None if self.pane.following else self.pane.current
        if self.pane.click(event.y):
            if self.pane.current == before:
                self.post_message(self.Opened())
            self.paint()

    def _look_on(self) -> None:
        """Paint, and look through some more of the older lines when there is nothing else to do."""
        self.paint()
        if not self._looking and not self.pane.complete:
            self._looking = True
            self.call_later(self._search)

    def _search(self) -> None:
        self._looking = False
        self.pane.advance()
        self._look_on()
