"""A widget that is lines of text and repaints those that changed; everything on the screen is made of it.

Textual's own table costs some eight times as much for a table whose cells change four times a second.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from dynamo_box.tui.text import BLANK, Line, spans_width
from dynamo_box.tui.theme_names import DARK
from dynamo_box.tui.themes import THEMES, Theme


class LineWidget(Widget):
    """`show` lines; the theme is the app's, given by `set_theme`."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._lines: list[Line] = []
        self._strips: dict[int, Strip] = {}
        self._dimmed = False
        self._look = THEMES[DARK]

    @property
    def text(self) -> str:
        """What stands there, for tests and for the curious."""
        return "\n".join("".join(span.text for span in line.spans).rstrip() for line in self._lines)

    def set_theme(self, theme: Theme) -> None:
        self._look = theme
        self._repaint_all()

    def show(self, lines: Sequence[Line], *, dimmed: bool = False) -> None:
        """Replace the lines; what is beyond the widget's height isn't seen. `dimmed`: they are out of date."""
        old, self._lines = self._lines, list(lines)
        if dimmed != self._dimmed:
            self._dimmed = dimmed
            self._repaint_all()
            return
        width = self.size.width
        regions = []
        for at in range(max(len(old), len(lines))):
            before = old[at] if at < len(old) else BLANK
            after = lines[at] if at < len(lines) else BLANK
            if before != after:
                self._strips.pop(at, None)
                start, end = changed_cells(before, after, width)
                if end > start:
                    regions.append(Region(start, at, end - start, 1))
        if regions:
            self.refresh(*regions)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        strip = self._strips.get(y)
        if strip is None or strip.cell_length != width:
            line = self._lines[y] if y < len(self._lines) else BLANK
            strip = self._strips[y] = Strip(self._look.segments(line, width, dimmed=self._dimmed), width)
        return strip

    def _repaint_all(self) -> None:
        self._strips.clear()
        self.refresh()


def changed_cells(before: Line, after: Line, width: int) -> tuple[int, int]:
    """Where on a line of `width` cells something else stands; what is equal at its ends needn't cross the wire."""
    old, new = before.spans, after.spans
    if before.mark is not after.mark:
        return 0, width
    shortest = min(len(old), len(new))
    left = 0
    while left < shortest and old[left] == new[left]:
        left += 1
    right = 0
    while right < shortest - left and old[-1 - right] == new[-1 - right]:
        right += 1
    start = spans_width(new[:left])
    gone, come = spans_width(old[left : len(old) - right]), spans_width(new[left : len(new) - right])
    end = start + come if gone == come else width
    return min(start, width), min(end, width)
