"""What a screen is made of: panels of text in tones, computed from one frame by pure functions. No Textual here.

snapshot ─► Frame ─► View.panels ─► Table | Lines ─► widgets (which repaint what changed), `--once`, `--svg`
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.history import History


class Tone(enum.StrEnum):
    """What a piece of text means. The theme decides how that looks, without colour too."""

    PLAIN = "plain"
    DIM = "dim"
    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    LOUD = "loud"
    ACCENT = "accent"
    TITLE = "title"
    WEIGHTS = "weights"
    KV = "kv"
    CACHED = "cached"
    HOST = "host"
    DISK = "disk"
    OTHER = "other"
    UNKNOWN = "unknown"
    FREE = "free"
    HEAT_0 = "heat-0"
    HEAT_1 = "heat-1"
    HEAT_2 = "heat-2"
    HEAT_3 = "heat-3"
    HEAT_4 = "heat-4"


class Span(NamedTuple):
    text: str
    tone: Tone = Tone.PLAIN


class Cell(NamedTuple):
    """`sort` is what the column is sorted by where the text won't do; cells without a value (None) sort last. `parts`
    are the text again, where its parts have tones of their own.
    """

    text: str
    tone: Tone = Tone.PLAIN
    sort: float | str | None = None
    parts: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Column:
    """`keep` says who stays when the terminal is narrow: the lowest goes first, 0 never. `least` is the width below
    which its text isn't clipped to make room for others; `widest` is where it is clipped in any case. `tail`: what is
    clipped is the beginning, since names of processes differ at their end.
    """

    key: str
    title: str
    right: bool = False
    keep: int = 0
    least: int = 4
    widest: int = 60
    help: str = ""
    tail: bool = False


class Row(NamedTuple):
    """`key` identifies it from frame to frame, so that cursor and selection stay on it."""

    key: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """`empty` is what stands there without rows: why there are none. `note` stands beside the title."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    empty: str = ""
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """Lines that are as wide as they were asked for, or narrower. They keep their height; tables share the rest."""

    key: str
    title: str
    lines: tuple[tuple[Span, ...], ...]


Panel = Table | Lines


@dataclass(frozen=True)
class Act:
    """Something a person can do to the row under the cursor, or (`needs_row` false) to the box.

    `key` is pressed for it. `kind` names what is done: restart, drain, cancel, mode, … `question` is asked first where
    it hurts; `{row}` in it is the row's key. `of` is what there is nothing to do it to without: a kind of process, or a
    trait of the box (see `dynamo_box.tui.legs`).
    """

    key: str
    kind: str
    title: str
    question: str = ""
    needs_row: bool = True
    of: str = ""


@dataclass(frozen=True)
class Frame:
    """All that a view may look at. `now` is Unix time: of the snapshot when a recording is played."""

    snapshot: BoxSnapshot
    history: History
    now: float


class View(Protocol):
    """One screen. Instances hold no state: the same frame gives the same panels."""

    name: str
    summary: str
    acts: tuple[Act, ...]

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        """From top to bottom, for a screen of `width` columns."""
        ...

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        """What Enter shows for the row `row` of the table `panel`; None when the row is gone or there is no more."""
        ...
