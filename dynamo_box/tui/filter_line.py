"""The line that `/` opens. A module of its own: most people who look at a box never type a filter."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class FilterLine(Input):
    """What is typed applies at once (`Input.Changed`); Enter leaves the line, Escape takes the filter back."""

    DEFAULT_CSS = """
    FilterLine { height: 1; border: none; padding: 0; background: transparent; }
    FilterLine:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave(True)", "clear", id="filter.clear", tooltip="no filter"),
        Binding("enter,up,down", "leave(False)", "done", id="filter.done", tooltip="keep the filter"),
    ]

    class Left(Message):
        """The person is done; `clear`: without a filter."""

        def __init__(self, clear: bool) -> None:
            super().__init__()
            self.clear = clear

    def __init__(self, text: str) -> None:
        super().__init__(text, placeholder="a regular expression; ! turns it round", select_on_focus=False, id="filter")
        self.cursor_blink = False

    def action_leave(self, clear: bool) -> None:
        self.post_message(self.Left(clear))
