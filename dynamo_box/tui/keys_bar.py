"""The last line: what the keys do, and for a moment what has just happened."""

from __future__ import annotations

from textual.timer import Timer

from dynamo_box.tui import bars
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.model import Tone

NOTICE_S = 6.0


class KeysBar(LineWidget):
    """`say` something: it stands until `clear` (a key was pressed) or NOTICE_S have passed."""

    def __init__(self) -> None:
        super().__init__(id="keys")
        self._hints: list[tuple[str, str]] = []
        self._notice: tuple[str, Tone] | None = None
        self._timer: Timer | None = None

    def show_keys(self, hints: list[tuple[str, str]]) -> None:
        self._hints = hints
        self._draw()

    def say(self, text: str, tone: Tone) -> None:
        self._stop_timer()
        self._notice = (text, tone)
        self._timer = self.set_timer(NOTICE_S, self.clear)
        self._draw()

    def clear(self) -> None:
        self._stop_timer()
        if self._notice is not None:
            self._notice = None
            self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def _draw(self) -> None:
        width = self.size.width
        self.show([bars.keys(self._hints, width) if self._notice is None else bars.notice(*self._notice, width)])
