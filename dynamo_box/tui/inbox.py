"""The way from the threads of sources to the app: bounded, and at most one wake-up under way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST = 64


class Inbox(Generic[T]):
    """`wake` is called from the thread that puts, when there was nothing before. A reader that is LONGEST events
    behind loses the oldest that `may_skip` lets go.
    """

    def __init__(self, wake: Callable[[], object], may_skip: Callable[[T], bool]) -> None:
        self._wake = wake
        self._may_skip = may_skip
        self._lock = threading.Lock()
        self._events: deque[T] = deque()

    def put(self, event: T) -> None:
        with self._lock:
            self._events.append(event)
            first = len(self._events) == 1
            if len(self._events) > LONGEST:
                skipped = next((each for each in self._events if self._may_skip(each)), None)
                if skipped is not None:
                    self._events.remove(skipped)
        if first:
            self._wake()

    def take(self) -> list[T]:
        """Everything since the last time, oldest first."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events
