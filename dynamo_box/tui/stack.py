"""Panels one below the other: who gets how many lines, and what stands in them. No Textual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_box.tui.filter import EVERYTHING, Filter
from dynamo_box.tui.model import Lines, Panel, Row, Span, Table, Tone
from dynamo_box.tui.table import HEAD_LINES, TablePane
from dynamo_box.tui.text import BLANK, Line, clip_spans, rule

LEAST_TABLE = HEAD_LINES + 2


def share(naturals: Sequence[tuple[int, bool]], height: int) -> list[int]:
    """The heights of panels from top to bottom; `naturals` are what each would fill, and whether it is a table.

    Lines keep their height as long as each table keeps LEAST_TABLE lines; tables share the rest, none more than it
    fills. Where even that is too much, the lowest panels go.
    """
    heights = [0] * len(naturals)
    reserved = sum(min(natural, LEAST_TABLE) for natural, is_table in naturals if is_table)
    left = height
    for at, (natural, is_table) in enumerate(naturals):
        if is_table:
            heights[at] = min(natural, LEAST_TABLE, left)
            reserved -= min(natural, LEAST_TABLE)
        else:
            heights[at] = max(min(natural, left - reserved), 0)
        left -= heights[at]
    growing = [at for at, (natural, is_table) in enumerate(naturals) if is_table and heights[at] < natural]
    while left > 0 and growing:
        part = max(left // len(growing), 1)
        for at in list(growing):
            more = min(part, naturals[at][0] - heights[at], left)
            heights[at] += more
            left -= more
            if heights[at] >= naturals[at][0]:
                growing.remove(at)
    return heights


@dataclass(frozen=True)
class Spot:
    """Where a panel stands: its first line, and how many it has."""

    key: str
    top: int
    height: int


class Stack:
    """The panels of one screen, and what a person did to them. `show` a frame's panels, then ask for `lines`."""

    def __init__(self) -> None:
        self._panels: tuple[Panel, ...] = ()
        self._panes: dict[str, TablePane] = {}
        self._filter = EVERYTHING
        self._focus: str | None = None
        self._spots: tuple[Spot, ...] = ()

    def show(self, panels: tuple[Panel, ...], wanted: Filter) -> None:
        self._panels, self._filter = panels, wanted
        for panel in panels:
            if not isinstance(panel, Table):
                continue
            if panel.key in self._panes:
                self._panes[panel.key].show(panel, wanted)
            else:
                self._panes[panel.key] = TablePane(panel, wanted)

    @property
    def tables(self) -> list[TablePane]:
        """Those of the present frame, from top to bottom."""
        return [self._panes[panel.key] for panel in self._panels if isinstance(panel, Table)]

    @property
    def focused(self) -> TablePane | None:
        """The table that keys work on: the one chosen, else the first."""
        tables = self.tables
        return next((each for each in tables if each.key == self._focus), tables[0] if tables else None)

    @property
    def current(self) -> tuple[str, Row] | None:
        """Key of the focused table, and the row under its cursor."""
        pane = self.focused
        return (pane.key, pane.current) if pane is not None and pane.current is not None else None

    @property
    def page(self) -> int:
        """How many rows of the focused table are seen."""
        pane = self.focused
        height = next((spot.height for spot in self._spots if pane is not None and spot.key == pane.key), 0)
        return max(height - HEAD_LINES, 1)

    def focus_next(self, by: int = 1) -> None:
        """Move on to the next table that has room on the screen."""
        seen = {spot.key for spot in self._spots if spot.height}
        tables = [each.key for each in self.tables if each.key in seen]
        pane = self.focused
        if tables and pane is not None:
            at = tables.index(pane.key) if pane.key in tables else 0
            self._focus = tables[(at + by) % len(tables)]

    def focus_at(self, y: int) -> TablePane | None:
        """The table that covers line `y`; it becomes the focused one."""
        for spot in self._spots:
            if spot.top <= y < spot.top + spot.height and spot.key in self._panes:
                self._focus = spot.key
                return self._panes[spot.key]
        return None

    def click(self, x: int, y: int) -> bool:
        """A click; whether it hit a row."""
        pane = self.focus_at(y)
        if pane is None:
            return False
        top = next(spot.top for spot in self._spots if spot.key == pane.key)
        return pane.click(x, y - top)

    @property
    def natural_height(self) -> int:
        """How many lines would show everything."""
        return sum(natural for natural, _ in self._naturals()) + max(len(self._panels) - 1, 0)

    def lines(self, width: int, height: int) -> list[Line]:
        """Exactly `height` lines. Panels stand a line apart where there is room to spare."""
        naturals = self._naturals()
        between = int(sum(natural for natural, _ in naturals) + len(naturals) - 1 <= height)
        heights = share(naturals, height - between * max(len(naturals) - 1, 0))
        lines: list[Line] = []
        spots: list[Spot] = []
        for panel, tall in zip(self._panels, heights, strict=True):
            if lines and tall:
                lines += [BLANK] * between
            spots.append(Spot(panel.key, len(lines), tall))
            lines += self._panel_lines(panel, width, tall)
        self._spots = tuple(spots)
        lines += [BLANK] * (height - len(lines))
        return lines[:height]

    def _naturals(self) -> list[tuple[int, bool]]:
        return [
            (self._panes[panel.key].natural_height, True)
            if isinstance(panel, Table)
            else (len(panel.lines) + bool(panel.title), False)
            for panel in self._panels
        ]

    def _panel_lines(self, panel: Panel, width: int, height: int) -> list[Line]:
        if isinstance(panel, Table):
            pane = self._panes[panel.key]
            return pane.lines(width, height, focused=pane is self.focused)
        return lines_panel(panel, width)[:height]


def lines_panel(panel: Lines, width: int) -> list[Line]:
    title = [Line(rule((Span(panel.title, Tone.TITLE),), (), width))] if panel.title else []
    return title + [Line(clip_spans(line, width)) for line in panel.lines]
