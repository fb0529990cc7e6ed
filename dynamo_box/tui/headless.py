"""A screen without a terminal: as lines of text, which may become a picture; and a recording that nobody watches."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.tui import bars
from dynamo_box.tui.log_feed import LogBatch, LogFeed
from dynamo_box.tui.screens import LOGS
from dynamo_box.tui.session import Options, Session
from dynamo_box.tui.source import Jumped, Lost, NewSnapshot, Source, SourceEvent, Why
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.text import Line

if TYPE_CHECKING:
    from dynamo_box.tui.log_pane import LogPane
    from dynamo_box.tui.recorded import Recorded

FIRST_S = 5.0
"""How long the first snapshot may take: a supervisor that is there answers at once or is stuck."""
SECOND_S = 0.4
"""How long a second one is waited for: rates that come from differences need it, and are worth no more."""
MOST_LINES = 5000
LOG_LINES = 200


@dataclass(frozen=True)
class Look:
    """One look at a box. `log` holds the lines of the logs screen, if that is the one that was looked at."""

    session: Session
    log: LogPane | None = None

    def lines(self, width: int, height: int | None = None) -> list[Line]:
        """The screen as it would stand in a terminal of `width`; with every row, unless `height` bounds it."""
        head = [self.session.status(time.time(), width), bars.tabs(self.session.screen, width)]
        tall = None if height is None else max(height - len(head), 0)
        if self.log is not None:
            return head + self.log.lines(width, LOG_LINES if tall is None else tall)
        stack = Stack()
        stack.show(self.session.panels(width), self.session.wanted)
        return head + stack.lines(width, min(stack.natural_height, MOST_LINES) if tall is None else tall)


def look(source: Source, log: LogFeed, options: Options) -> Look:
    """Start `source`, take in what it has to say now, and close it. A recording is looked at where it stands.

    Raises:
        NotRunning: there is no box.
        TimedOut: the supervisor says nothing.
        BoxError: nothing that can be shown came.
    """
    arrived: queue.SimpleQueue[SourceEvent] = queue.SimpleQueue()
    session = Session(source, options)
    if session.replay is not None:
        session.replay.set_paused(True)
    source.start(arrived.put)
    try:
        _take(session, arrived)
        pane = _read(log, session) if options.screen == LOGS else None
    finally:
        source.close()
    session.advance(time.time())
    if session.frame is None:
        raise TimedOut("the supervisor doesn't answer", remedy="`dynbox logs supervisor` may say why")
    return Look(session, pane)


def as_text(screen: list[Line]) -> str:
    return "\n".join("".join(span.text for span in line.spans).rstrip() for line in screen)


def record(source: Recorded) -> str:
    """Run `source` without a screen until the box is gone or the recording ends by itself, and say which.

    Raises:
        NotRunning: there is no box.
        BoxError: the recording can't be written any more.
    """
    arrived: queue.SimpleQueue[SourceEvent] = queue.SimpleQueue()
    source.start(arrived.put)
    try:
        while not isinstance(event := arrived.get(), Lost):
            if source.failed:
                raise BoxError(source.state, remedy="what is recorded so far plays")
            if source.ended:
                return source.state
    finally:
        source.close()
    if event.why is Why.ABSENT:
        raise NotRunning(event.reason, remedy=event.remedy or None, details=event.details)
    return event.reason


def _take(session: Session, arrived: queue.SimpleQueue[SourceEvent]) -> None:
    seen = 0
    deadline = time.monotonic() + FIRST_S
    while seen < 2:
        try:
            event = arrived.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            return
        if isinstance(event, Lost) and not seen:
            error = NotRunning if event.why is Why.ABSENT else BoxError
            raise error(event.reason, remedy=event.remedy or None, details=event.details)
        session.take(event, time.time())
        if isinstance(event, Jumped):
            return
        if isinstance(event, NewSnapshot):
            seen += 1
            deadline = time.monotonic() + SECOND_S


def _read(log: LogFeed, session: Session) -> LogPane:
    """The newest lines that the session's filter lets through."""
    from dynamo_box.tui.log_pane import LogPane

    arrived: queue.SimpleQueue[LogBatch] = queue.SimpleQueue()
    pane = LogPane()
    pane.set_filter(session.wanted)
    log.start_log(arrived.put)
    try:
        pane.take(arrived.get(timeout=FIRST_S))
    except queue.Empty as error:
        raise TimedOut("the logs can't be read in time", remedy="see `dynbox logs`") from error
    finally:
        log.close_log()
    while not pane.complete:
        pane.advance()
    return pane
