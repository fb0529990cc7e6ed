"""Terminals: which colours they show, and how wide they are."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def style(text: str, name: str, stream: TextIO) -> str:
    """`text` in a style, where `stream` shows styles."""
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if has_colour(stream) else text


def can_redraw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def width(fallback: int = 80) -> int:
    return shutil.get_terminal_size((fallback, 24)).columns


def clip(text: str, columns: int) -> str:
    """At most `columns` columns of `text`, with an ellipsis where something is missing.

    Every character counts as one column: what is shown this way are names, numbers and English.
    """
    if len(text) <= columns:
        return text
    return text[: max(columns - 1, 0)] + "…" if columns > 0 else ""
