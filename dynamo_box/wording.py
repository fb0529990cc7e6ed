"""Figures and foreign text as people read them, on the command line and in the terminal UI. Pure."""

from __future__ import annotations

import math

_KEPT = frozenset("\n\t\u200c\u200d")
"""Not printable by Unicode's book, but needed: the joiners are part of Persian, Indic scripts and emoji."""


def printable(text: str) -> str:
    """`text` without power over a terminal: control characters but newline and tab appear as `\\x1b` and the like.

    Models, clients and libraries write what comes back here; none of it may move the cursor or retitle a window.
    Bidirectional overrides, which make a line read as another, go the same way.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in _KEPT else character.encode("unicode_escape").decode()
        for character in text
    )


_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def size(value: int | None) -> str:
    """Bytes with a binary unit and three digits, `-` for what can't be read."""
    if value is None:
        return "-"
    scaled, unit = float(value), 0
    while scaled >= 1000 and unit < len(_BINARY) - 1:
        scaled, unit = scaled / 1024, unit + 1
    if unit == 0:
        return f"{value} B"
    return f"{scaled:.{0 if scaled >= 100 else 1}f} {_BINARY[unit]}"


def duration(seconds: float | None) -> str:
    """`8s`, `3m12s`, `4h02m`, `2d03h`; `-` for what can't be read or is no number."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def amount(done: int | None, total: int | None, unit: str) -> str:
    """How far a phase is: `120 MiB of 513 MiB`, `3 of 8 layers`, `7 tokens`; empty if it doesn't say."""
    if done is None:
        return ""

    def one(value: int) -> str:
        return size(value) if unit == "bytes" else str(value)

    text = one(done) if total is None else f"{one(done)} of {one(total)}"
    return text if unit in ("", "bytes") else f"{text} {unit}"
