"""What the disk tier counts, and how its news goes out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

PIECE = 1024


@dataclass(frozen=True, slots=True)
class DiskEvents:
    """Blocks of one layout that came to the disk or left it; both never hold the same one."""

    layout: str
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class Stopwatch:
    """Seconds in which at least one of several things that overlap was going on."""

    def __init__(self) -> None:
        self._total = self._since = 0.0
        self._running = 0

    def begin(self) -> None:
        if not self._running:
            self._since = time.monotonic()
        self._running += 1

    def end(self) -> None:
        self._running -= 1
        if not self._running:
            self._total += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        return self._total + (time.monotonic() - self._since if self._running else 0.0)


@dataclass(slots=True)
class DiskCounts:
    in_blocks: int = 0
    in_bytes: int = 0
    out_blocks: int = 0
    out_bytes: int = 0
    evicted: int = 0
    failed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    writing: Stopwatch = field(default_factory=Stopwatch)
    reading: Stopwatch = field(default_factory=Stopwatch)


class Outbox:
    """Tells of changes of the layouts in `of`, in their order; of many at once in pieces, over turns of the loop."""

    def __init__(self, changed: Callable[[DiskEvents], None], of: Container[str]) -> None:
        self._changed = changed
        self._of = of
        self._waiting: deque[tuple[str, bool, Iterator[bytes]]] = deque()

    def stored(self, layout: str, digests: Iterable[bytes]) -> None:
        self._send(layout, True, digests)

    def removed(self, layout: str, digests: Iterable[bytes]) -> None:
        self._send(layout, False, digests)

    def _send(self, layout: str, stored: bool, digests: Iterable[bytes]) -> None:
        if layout not in self._of:
            return
        self._waiting.append((layout, stored, iter(digests)))
        if len(self._waiting) == 1:
            self._drain()

    def _drain(self) -> None:
        while self._waiting:
            layout, stored, digests = self._waiting[0]
            piece = tuple(islice(digests, PIECE))
            if piece:
                self._changed(DiskEvents(layout, piece) if stored else DiskEvents(layout, (), piece))
            if len(piece) == PIECE:
                asyncio.get_running_loop().call_soon(self._drain)
                return
            self._waiting.popleft()
