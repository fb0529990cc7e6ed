"""Where the logs screen gets its lines from: the log files of a box, or a recording (`dynamo_box.tui.replay`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dynamo_box.control.logs import Entry, Follower, processes_with_logs, tail

HZ = 4.0
TAIL_LINES = 5000


@dataclass(frozen=True)
class LogBatch:
    """Lines in the order of their time. `anew`: what came before belongs to another place or moment; start over."""

    entries: tuple[Entry, ...]
    anew: bool = False


DeliverLog = Callable[[LogBatch], None]
"""Called from the feed's thread, at most HZ times a second, and never after its `close_log` has returned."""


class LogFeed(Protocol):
    def start_log(self, deliver: DeliverLog) -> None:
        """Begin to deliver, first what there is, then what comes; once."""
        ...

    def close_log(self) -> None:
        """Stop delivering, and wait until no delivery is under way."""
        ...


class LiveLog:
    """The log files of a box: the last TAIL_LINES lines of all its processes, then what they write.

    Files are looked at HZ times a second, which is how often lines are wanted at most; a look at a file that hasn't
    grown is one system call. `look_in` may be called at any time with the directory that the latest snapshot names: a
    box that comes back with another home logs elsewhere.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def look_in(self, directory: Path) -> None:
        with self._changed:
            if directory != self._directory:
                self._directory = directory
                self._changed.notify()

    def start_log(self, deliver: DeliverLog) -> None:
        self._thread = threading.Thread(target=self._run, args=(deliver,), name="log-feed", daemon=True)
        self._thread.start()

    def close_log(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self, deliver: DeliverLog) -> None:
        current: Path | None = None
        follower: Follower | None = None
        said = ""
        while True:
            with self._changed:
                if self._directory == current and not self._closing:
                    self._changed.wait(None if current is None else 1 / HZ)
                if self._closing:
                    return
                directory = self._directory
            if directory is None:
                continue
            if directory != current:
                current, follower = directory, None
            try:
                if follower is None:
                    follower = Follower(directory, None)
                    deliver(LogBatch(_so_far(directory, follower), anew=True))
                elif entries := follower.read():
                    deliver(LogBatch(tuple(entries)))
                said = ""
            except OSError as error:
                if (why := f"can't read the logs in {directory}: {error.strerror}") != said:
                    said = why
                    deliver(LogBatch((Entry(time.time(), "dynbox top", "error", {"event": why}),)))


def _so_far(directory: Path, follower: Follower) -> tuple[Entry, ...]:
    """The tail, and what was written while it was read: `follower` knows where the files ended before."""
    entries = tail(directory, processes_with_logs(directory), TAIL_LINES, lambda _: True)
    known = {(entry.at, entry.process, str(entry.fields)) for entry in entries}
    late = (entry for entry in follower.read() if (entry.at, entry.process, str(entry.fields)) not in known)
    return (*entries, *late)
