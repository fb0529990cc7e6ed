"""Pictures of the screen that tests compare with those in `pictures/`, which the README shows too.

`DYNBOX_DRAW_PICTURES=1` draws them anew instead of comparing; look at the difference before you commit it.
"""

from __future__ import annotations

import difflib
import html
import os
import re
from pathlib import Path

import pytest

PICTURES = Path(__file__).parent / "pictures"
DRAW_VARIABLE = "DYNBOX_DRAW_PICTURES"

_TEXT = re.compile(r'<text[^>]*\bx="([\d.]+)"[^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>')


def assert_same_picture(svg: str, name: str) -> None:
    """Hold `svg` against `pictures/NAME.svg`; on a difference in text, say which lines differ."""
    path = PICTURES / f"{name}.svg"
    actual = _without_ids(svg)
    if os.environ.get(DRAW_VARIABLE):
        path.write_text(actual, "utf-8")
        return
    assert path.exists(), f"there is no picture {name}; draw it with {DRAW_VARIABLE}=1"
    expected = path.read_text("utf-8")
    if actual != expected:
        lines = list(difflib.unified_diff(_lines(expected), _lines(actual), "the picture", "now", lineterm="", n=0))
        pytest.fail(f"{name} looks different:\n" + ("\n".join(lines) or "the same text in other colours"))


def _without_ids(svg: str) -> str:
    """Rich names everything in a picture after a hash of it."""
    return re.sub(r"terminal-\d+", "terminal", svg)


def _lines(svg: str) -> list[str]:
    """The text of a picture, a string for each line of the screen."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in _TEXT.findall(svg):
        rows.setdefault(float(y), []).append((float(x), html.unescape(text).replace("\xa0", " ")))
    return ["".join(text for _, text in sorted(row)) for _, row in sorted(rows.items())]
