"""What happened to the box, for people: the last events go into the snapshot, all of them into the
supervisor's log.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dynamo_box.snapshot import EventInfo

KEPT_EVENTS = 200
LEVELS = ("info", "warning", "error")


class EventList:
    """`log_to` connects a logger: importing one costs more than spawning every child, so that comes first and
    what happened until then is written afterwards.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._recent: deque[EventInfo] = deque(maxlen=KEPT_EVENTS)
        self._seq = 0
        self._changed = changed
        self._logger: Any = None

    def add(self, level: str, process: str | None, text: str) -> None:
        """`level` is info, warning or error; anything else counts as info."""
        self._seq += 1
        event = EventInfo(self._seq, time.time(), level if level in LEVELS else "info", process, text)
        self._recent.append(event)
        if self._logger is not None:
            self._write(event)
        self._changed()

    def log_to(self, logger: Any) -> None:
        """`logger` is a structlog logger."""
        self._logger = logger
        for event in self._recent:
            self._write(event)

    def _write(self, event: EventInfo) -> None:
        about = {"about": event.process} if event.process else {}
        getattr(self._logger, event.level)(event.text, **about)

    @property
    def recent(self) -> tuple[EventInfo, ...]:
        return tuple(self._recent)
