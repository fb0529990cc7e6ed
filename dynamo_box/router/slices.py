"""Long work on the event loop, a piece a turn, so that no placement waits for more than a piece of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

Piece = Callable[[], bool]
"""Does well under a millisecond of some work and says whether there is more."""


class Slices:
    """Runs the pieces of all work in turn, one each turn of the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Piece] = deque()
        self._scheduled = False

    def add(self, piece: Piece) -> None:
        """Run `piece` until it says that there is no more; no effect while it waits already."""
        if piece not in self._waiting:
            self._waiting.append(piece)
            self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run_one)

    def _run_one(self) -> None:
        self._scheduled = False
        piece = self._waiting.popleft()
        try:
            if piece():
                self.add(piece)
        finally:
            self._schedule()
