"""How tones look: on a dark and a light ground, and without any colour."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style

from dynamo_box.tui.model import Span, Tone
from dynamo_box.tui.text import Line, Mark, clip_spans, spans_width
from dynamo_box.tui.theme_names import DARK, LIGHT, NONE


@dataclass(frozen=True, eq=False)
class Theme:
    """`tones` and `marks` are rich style definitions; a mark's goes over `base`, a tone's over both. `textual` is the
    theme for what isn't made of lines: the filter's input and the command palette.
    """

    name: str
    textual: str
    base: str
    tones: Mapping[Tone, str]
    marks: Mapping[Mark, str]

    @functools.cache  # noqa: B019 - there are three themes, and they live as long as the program
    def style(self, tone: Tone, mark: Mark) -> Style:
        style = Style.parse(self.base) + Style.parse(self.marks.get(mark, ""))
        return style + Style.parse(self.tones.get(tone, ""))

    @property
    def ground(self) -> Style:
        """What plain text looks like; without colours, the terminal's own."""
        return self.style(Tone.PLAIN, Mark.NONE)

    def segments(self, line: Line, width: int, *, dimmed: bool = False) -> list[Segment]:
        """`line` in colours, exactly `width` cells long. Neighbours that look alike are one: each costs the terminal
        some 30 bytes of control codes.
        """
        segments: list[Segment] = []
        texts: list[str] = []
        style: Style | None = None
        blank = width - spans_width(line.spans)
        spans = clip_spans(line.spans, width) if blank < 0 else line.spans
        for text, tone in (*spans, Span(" " * blank)):
            now = self.style(Tone.DIM if dimmed and tone is not Tone.FREE else tone, line.mark)
            if now is not style and texts:
                segments.append(Segment("".join(texts), style))
                texts = []
            style = now
            texts.append(text)
        segments.append(Segment("".join(texts), style))
        return segments


THEMES = {
    DARK: Theme(
        DARK,
        "textual-dark",
        "#d4d7dd on #14161b",
        {
            Tone.DIM: "#7f8794",
            Tone.GOOD: "#7ec98f",
            Tone.WARN: "#e5b567",
            Tone.BAD: "bold #f0707a",
            Tone.LOUD: "bold #14161b on #e5b567",
            Tone.ACCENT: "#6cb6ff",
            Tone.TITLE: "bold #6cb6ff",
            Tone.WEIGHTS: "#8f7ee7",
            Tone.KV: "#4aa3df",
            Tone.CACHED: "#3fc1b0",
            Tone.HOST: "#9ccc65",
            Tone.DISK: "#d9c75b",
            Tone.OTHER: "#d8904f",
            Tone.UNKNOWN: "#c06ab8",
            Tone.FREE: "#4b525e",
            Tone.HEAT_0: "#3a4150",
            Tone.HEAT_1: "#35608a",
            Tone.HEAT_2: "#2f8f9d",
            Tone.HEAT_3: "#66b86a",
            Tone.HEAT_4: "#e3d26f",
        },
        {
            Mark.BAR: "on #20242c",
            Mark.HEAD: "bold",
            Mark.CURSOR: "on #2f4a6d",
            Mark.CURSOR_BEHIND: "on #23272f",
        },
    ),
    LIGHT: Theme(
        LIGHT,
        "textual-light",
        "#24292f on #ffffff",
        {
            Tone.DIM: "#687078",
            Tone.GOOD: "#1a7f37",
            Tone.WARN: "#8a5a00",
            Tone.BAD: "bold #c3202c",
            Tone.LOUD: "bold #ffffff on #8a5a00",
            Tone.ACCENT: "#0758b8",
            Tone.TITLE: "bold #0758b8",
            Tone.WEIGHTS: "#6639ba",
            Tone.KV: "#0969da",
            Tone.CACHED: "#0a7f73",
            Tone.HOST: "#4a7a12",
            Tone.DISK: "#7a6500",
            Tone.OTHER: "#b25600",
            Tone.UNKNOWN: "#a0308f",
            Tone.FREE: "#b6bdc5",
            Tone.HEAT_0: "#d0d7de",
            Tone.HEAT_1: "#8fb8de",
            Tone.HEAT_2: "#3f92a8",
            Tone.HEAT_3: "#2c7d3f",
            Tone.HEAT_4: "#8a6d00",
        },
        {
            Mark.BAR: "on #eaeef2",
            Mark.HEAD: "bold",
            Mark.CURSOR: "on #cfe4ff",
            Mark.CURSOR_BEHIND: "on #eaeef2",
        },
    ),
    NONE: Theme(
        NONE,
        "ansi-dark",
        "",
        {
            Tone.DIM: "dim",
            Tone.WARN: "bold",
            Tone.BAD: "bold underline",
            Tone.LOUD: "bold not reverse",
            Tone.ACCENT: "bold",
            Tone.TITLE: "bold",
            Tone.FREE: "dim",
        },
        {
            Mark.BAR: "reverse",
            Mark.HEAD: "bold",
            Mark.CURSOR: "reverse",
            Mark.CURSOR_BEHIND: "underline",
        },
    ),
}
