"""Lines in colours where there is no app: for a terminal's scrollback, and as a picture (SVG)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment, Segments
from rich.terminal_theme import TerminalTheme

from dynamo_box.tui.text import Line
from dynamo_box.tui.themes import Theme

_ANSI = [
    (0, 0, 0),
    (170, 0, 0),
    (0, 130, 0),
    (150, 110, 0),
    (0, 60, 170),
    (130, 0, 130),
    (0, 120, 130),
    (120, 120, 120),
]


def as_ansi(screen: Sequence[Line], width: int, theme: Theme, *, truecolor: bool) -> str:
    system = ColorSystem.TRUECOLOR if truecolor else ColorSystem.EIGHT_BIT
    return "\n".join(
        "".join(
            segment.style.render(segment.text, color_system=system) if segment.style else segment.text
            for segment in theme.segments(line, width)
        )
        for line in screen
    )


def as_svg(screen: Sequence[Line], width: int, theme: Theme, title: str) -> str:
    """A picture that depends on nothing but `screen`: no font is fetched by whoever opens it."""
    console = Console(
        record=True,
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    for line in screen:
        console.print(Segments([*theme.segments(line, width), Segment.line()]), end="", crop=True, highlight=False)
    svg = console.export_svg(title=title, theme=_ground(theme), unique_id="dynbox")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def _ground(theme: Theme) -> TerminalTheme:
    """What stands for the terminal's own colours in a picture."""
    style = theme.ground
    foreground = style.color.get_truecolor() if style.color else (36, 41, 47)
    background = style.bgcolor.get_truecolor(foreground=False) if style.bgcolor else (255, 255, 255)
    return TerminalTheme(tuple(background), tuple(foreground), _ANSI)  # type: ignore[arg-type]  # triples, named or not
