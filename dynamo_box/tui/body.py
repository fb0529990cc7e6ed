"""The middle of the screen: the panels of the view that is open, and the mouse over them."""

from __future__ import annotations

from textual import events
from textual.message import Message

from dynamo_box.tui.filter import Filter
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.model import Panel
from dynamo_box.tui.stack import Stack

WHEEL_ROWS = 3


class Body(LineWidget):
    """One stack of panels a screen, so that cursor, order and place are there again when a person comes back."""

    class Opened(Message):
        """A row was double-clicked."""

    class Resized(Message):
        """There is another width and height to fill."""

    def __init__(self) -> None:
        super().__init__(id="body")
        self._stacks: dict[str, Stack] = {}
        self._stale = False
        self.stack = Stack()

    def open(self, screen: str) -> None:
        self.stack = self._stacks.setdefault(screen, Stack())

    def show_panels(self, panels: tuple[Panel, ...], wanted: Filter, *, stale: bool = False) -> None:
        self._stale = stale
        self.stack.show(panels, wanted)
        self.redraw()

    def redraw(self) -> None:
        self.show(self.stack.lines(self.size.width, self.size.height), dimmed=self._stale)

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def on_click(self, event: events.Click) -> None:
        hit = self.stack.click(event.x, event.y)
        self.redraw()
        if hit and event.chain > 1:
            self.post_message(self.Opened())

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._wheel(event.y, -WHEEL_ROWS)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._wheel(event.y, WHEEL_ROWS)

    def _wheel(self, y: int, by: int) -> None:
        pane = self.stack.focus_at(y)
        if pane is not None:
            pane.move(by)
            self.redraw()
