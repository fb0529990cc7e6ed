"""The lines of the logs screen: a bounded store, and the selection of them that a filter lets through.

A line is known by its number, which only grows; the oldest lines are dropped in blocks, and counted. What is shown of a
line (and searched) lies ready as text; the whole entry is wanted now and then, and lies compressed with its block: a
hundred thousand lines take some 25 MB.

A new filter looks at the newest lines first, since those are on the screen, and at the others in slices, so that the
screen never waits for it. Lines that come later cost no more than themselves.
"""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from dynamo_box.control.logs import LEVELS, Entry, message

MAX_LINES = 100_000
MAX_BYTES = 32 * 1024 * 1024
MAX_TEXT = 4000
BLOCK_LINES = 500
BLOCK_BYTES = 256 * 1024
SLICE_LINES = 5000
_LINE_OVERHEAD = 90
"""Bytes that a line takes beside its text and entry: a string, two references, a float and a byte."""

_fields = msgspec.msgpack.Decoder(list[dict[str, object]])


class LogLine(NamedTuple):
    """`at` is Unix time, `level` one of LEVELS' numbers; `text` is safe for a terminal, and one line."""

    at: float
    level: int
    process: str
    text: str


@dataclass
class _Block:
    """At most BLOCK_LINES lines from the number `first` on. `packed` replaces `entries` when the block is full."""

    first: int
    at: array[float] = field(default_factory=lambda: array("d"))
    levels: bytearray = field(default_factory=bytearray)
    processes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    entries: list[msgspec.Raw] = field(default_factory=list)
    packed: bytes = b""
    weight: int = 0

    @property
    def full(self) -> bool:
        return len(self.texts) >= BLOCK_LINES or self.weight >= BLOCK_BYTES

    def fields(self, index: int) -> dict[str, object]:
        if self.packed:
            return _fields.decode(zlib.decompress(self.packed))[index]
        fields: dict[str, object] = msgspec.msgpack.decode(self.entries[index])
        return fields

    def pack(self) -> None:
        loose = sum(len(entry) for entry in self.entries)
        self.packed = zlib.compress(msgspec.msgpack.encode(self.entries), 1)
        self.entries.clear()
        self.weight += len(self.packed) - loose


class LogStore:
    """The newest lines, at most `max_lines` of them and about `max_bytes` bytes; `dropped` counts the others."""

    def __init__(self, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> None:
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._blocks: deque[_Block] = deque([_Block(0)])
        self._weight = 0
        self._names: dict[str, str] = {}
        self.end = 0
        self.dropped = 0

    @property
    def first(self) -> int:
        """Number of the oldest line that is there; `end` if none is."""
        return self._blocks[0].first

    @property
    def bytes_held(self) -> int:
        return self._weight

    @property
    def processes(self) -> tuple[str, ...]:
        """Names of the processes that wrote these lines, sorted."""
        return tuple(sorted({name for block in self._blocks for name in set(block.processes)}))

    def __len__(self) -> int:
        return self.end - self.first

    def append(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._append(entry)

    def clear(self) -> None:
        """Forget every line, as if none had come; numbers go on."""
        self._blocks = deque([_Block(self.end)])
        self._weight = self.dropped = 0

    def line(self, number: int) -> LogLine:
        """The line `number`, which must lie in `first … end - 1`."""
        block, index = self._find(number)
        return LogLine(block.at[index], block.levels[index], block.processes[index], block.texts[index])

    def fields(self, number: int) -> dict[str, object]:
        """The whole entry of the line `number`."""
        block, index = self._find(number)
        return block.fields(index)

    def search(self, start: int, end: int, wanted: Wanted) -> list[int]:
        """Numbers of the wanted lines in `start … end - 1`, ascending."""
        found: list[int] = []
        while start < end:
            block, low = self._find(start)
            high = min(low + end - start, len(block.texts))
            found.extend(
                block.first + index
                for index in range(low, high)
                if wanted.admits(block.levels[index], block.processes[index], block.texts[index])
            )
            start = block.first + high
        return found

    def _append(self, entry: Entry) -> None:
        block = self._blocks[-1]
        if block.full:
            loose = block.weight
            block.pack()
            self._weight += block.weight - loose
            block = _Block(self.end)
            self._blocks.append(block)
        text = message(entry).expandtabs(4)
        if len(text) > MAX_TEXT:
            text = text[: MAX_TEXT - 1] + "…"
        encoded = msgspec.msgpack.encode(entry.fields)
        block.at.append(entry.at)
        block.levels.append(LEVELS.get(entry.level, LEVELS["info"]))
        block.processes.append(self._name(entry.process))
        block.texts.append(text)
        block.entries.append(msgspec.Raw(encoded))
        weight = len(text) + len(encoded) + _LINE_OVERHEAD
        block.weight += weight
        self._weight += weight
        self.end += 1
        while len(self._blocks) > 1 and (len(self) > self._max_lines or self._weight > self._max_bytes):
            oldest = self._blocks.popleft()
            self._weight -= oldest.weight
            self.dropped += len(oldest.texts)

    def _name(self, process: str) -> str:
        """One string for all lines of a process."""
        if len(self._names) > BLOCK_LINES:
            self._names.clear()
        return self._names.setdefault(process, process)

    def _find(self, number: int) -> tuple[_Block, int]:
        block = self._blocks[bisect_right(self._blocks, number, key=_first) - 1]
        return block, number - block.first


def _first(block: _Block) -> int:
    return block.first


@dataclass(frozen=True)
class Wanted:
    """Which lines to show: those of at least `level`, of `process` (None: of any) and with a text that `matches`.

    `matches` gets `LEVEL PROCESS TEXT`, since people look for names as well; None matches everything.
    """

    level: int = 0
    process: str | None = None
    matches: Callable[[str], bool] | None = None

    @property
    def everything(self) -> bool:
        return self.level == 0 and self.process is None and self.matches is None

    def admits(self, level: int, process: str, text: str) -> bool:
        if level < self.level or (self.process is not None and process != self.process):
            return False
        return self.matches is None or self.matches(f"{_LEVEL_NAMES.get(level, '')} {process} {text}")


_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}


class Selection:
    """The numbers of the wanted lines of a store, ascending: `len`, `[position]`, `position_of`.

    `advance` takes in what has changed in the store, and looks at one more slice of the older lines. Positions shift
    when older lines are found or dropped, numbers never do.
    """

    def __init__(self, store: LogStore, wanted: Wanted) -> None:
        self.wanted = wanted
        self._store = store
        self._older = array("Q")  # descending: the selection grows and shrinks at its old end too
        self._newer = array("Q")
        self._gone = 0  # so many at the start of `_newer` have been dropped from the store
        self._low = self._high = store.end

    @property
    def complete(self) -> bool:
        """Whether every line in the store has been looked at."""
        return self.wanted.everything or (self._low <= self._store.first and self._high == self._store.end)

    def advance(self, lines: int = SLICE_LINES) -> None:
        """Look at all new lines and at `lines` older ones."""
        if self.wanted.everything:
            return
        first, end = self._store.first, self._store.end
        if self._high < end:
            self._newer.extend(self._store.search(max(self._high, first), end, self.wanted))
            self._high = end
        if self._low > first:
            start = max(self._low - lines, first)
            self._older.extend(reversed(self._store.search(start, self._low, self.wanted)))
            self._low = start
        self._forget(first)

    def __len__(self) -> int:
        if self.wanted.everything:
            return len(self._store)
        return len(self._older) + len(self._newer) - self._gone

    def __getitem__(self, position: int) -> int:
        if self.wanted.everything:
            return self._store.first + position
        older = len(self._older)
        return self._older[older - 1 - position] if position < older else self._newer[position - older + self._gone]

    def position_of(self, number: int) -> int:
        """Position of the first line from `number` on; the length if there is none."""
        return bisect_left(self, number)

    def _forget(self, first: int) -> None:
        """Let go of lines that the store has dropped."""
        while self._older and self._older[-1] < first:
            self._older.pop()
        if not self._older:
            self._gone = bisect_left(self._newer, first, self._gone)
            if self._gone > len(self._newer) // 2:
                del self._newer[: self._gone]
                self._gone = 0
