"""What a worker tells its supervisor, at a bounded rate: progress of the start, then figures."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.status import ParentMessage, Report, Starting

PROGRESS_INTERVAL_S = 0.05
MAX_PENDING_PHASES = 64
FIGURES_INTERVAL_S = 0.25
FIGURES_AT_LEAST_EVERY_S = 2.0

StatusChannel = Channel[ParentMessage]


class StartProgress:
    """A `ReportProgress` for the engine: any thread may call it as often as it likes.

    Twenty messages a second leave at most; in between the latest of each phase is kept, so that none is lost.
    """

    def __init__(self, channel: StatusChannel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pending: deque[Starting] = deque(maxlen=MAX_PENDING_PHASES)
        self._scheduled = False
        self._sent_at = 0.0

    def __call__(self, phase: str, done: int | None, total: int | None, unit: str) -> None:
        with self._lock:
            if self._pending and self._pending[-1].phase == phase:
                self._pending.pop()
            self._pending.append(Starting(phase, done, total, unit))
            if self._scheduled:
                return
            self._scheduled = True
        self._loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        wait = self._sent_at + PROGRESS_INTERVAL_S - self._loop.time()
        self._loop.call_later(max(0.0, wait), self.flush)

    def flush(self) -> None:
        """Send what waits, on the loop."""
        with self._lock:
            pending = list(self._pending)
            self._pending.clear()
            self._scheduled = False
        for message in pending:
            self._channel.send(message)
        self._sent_at = self._loop.time()


class FiguresReport:
    """Sends figures when they changed, four times a second at most, and every two seconds anyway."""

    def __init__(self, channel: StatusChannel, figures: Callable[[], WorkerFigures]) -> None:
        self._channel = channel
        self._figures = figures
        self._told: WorkerFigures | None = None
        self._told_at = 0.0

    def tick(self, now: float) -> None:
        """Called every FIGURES_INTERVAL_S."""
        figures = self._figures()
        if figures != self._told or now - self._told_at >= FIGURES_AT_LEAST_EVERY_S:
            self._told, self._told_at = figures, now
            self._channel.send(Report(figures))
