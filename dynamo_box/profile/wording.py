"""How problems echo what a profile says: at one glance, and never as something that a terminal obeys."""

from __future__ import annotations

from collections.abc import Iterable


def escaped(text: str) -> str:
    """`text` on one line: newlines, escape sequences and what else doesn't print become `\\n`, `\\x1b`, …"""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def shown(value: object) -> str:
    """A value of a profile, long ones cut."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}…"'
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, tuple) else str(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean …?`, or what there is to choose from."""
    import difflib  # for errors only

    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known)}"
