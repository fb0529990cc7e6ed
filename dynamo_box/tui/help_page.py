"""What `?` shows: the keys of the screen that is open, and what its columns mean. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_box.tui.keys import SCREEN_KEYS, Key
from dynamo_box.tui.model import Act, Lines, Span, Table, Tone
from dynamo_box.tui.text import width_of

_KEY_WIDTH = 12


def page(screen: str, keys: Iterable[Key], acts: Iterable[Act], tables: Iterable[Table]) -> Lines:
    lines: list[tuple[Span, ...]] = []
    if acts := tuple(acts):
        lines += [_head("what you can do here"), *(_entry(act.key, act.title) for act in acts), ()]
    lines += [_head("keys"), *(_entry(key.shown, key.help) for key in keys), ()]
    lines += [_head("screens"), *(_entry(key.shown, key.help) for key in SCREEN_KEYS)]
    for table in tables:
        if explained := [column for column in table.columns if column.help]:
            lines += [(), _head(f"columns of {table.title}")]
            lines += [_entry(column.title, column.help) for column in explained]
    return Lines("help", f"help: {screen}", tuple(lines))


def _head(text: str) -> tuple[Span, ...]:
    return (Span(text, Tone.TITLE),)


def _entry(name: str, text: str) -> tuple[Span, ...]:
    return Span(name + " " * max(_KEY_WIDTH - width_of(name), 1), Tone.ACCENT), Span(text)
