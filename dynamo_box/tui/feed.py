"""What the events of a source add up to: the frame to show, and how things stand with whoever sends it. No Textual."""

from __future__ import annotations

import enum

from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.history import History
from dynamo_box.tui.model import Frame
from dynamo_box.tui.source import Connected, Ended, Jumped, Lost, NewSnapshot, SourceEvent


class Link(enum.StrEnum):
    """How things stand with the box, or with the recording."""

    WAITING = "waiting"
    LIVE = "live"
    LOST = "lost"
    ENDED = "ended"


class Feed:
    """`live`: snapshots are of now, so that time goes on between them; a recording's time is its snapshots'."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self.link = Link.WAITING
        self.lost: Lost | None = None
        self.snapshot: BoxSnapshot | None = None
        self.history = History()
        self.received_at = 0.0

    def take(self, event: SourceEvent, now: float) -> None:
        """`now` is Unix time."""
        match event:
            case Connected():
                self.link, self.lost, self.received_at = Link.LIVE, None, now
            case NewSnapshot(snapshot):
                self._take_snapshot(snapshot, now)
            case Jumped(past):
                self.history = History()
                for snapshot in past:
                    self._take_snapshot(snapshot, now)
            case Lost():
                self.link, self.lost = Link.LOST, event
            case Ended():
                self.link = Link.ENDED

    def frame(self, now: float) -> Frame | None:
        if self.snapshot is None:
            return None
        goes_on = self._live and self.link is Link.LIVE
        return Frame(self.snapshot, self.history, max(now, self.snapshot.at) if goes_on else self.snapshot.at)

    def uptime_s(self, now: float) -> float:
        """Of the box: it goes on between snapshots, and stops with the last."""
        if self.snapshot is None:
            return 0.0
        since = max(now - self.received_at, 0.0) if self._live and self.link is Link.LIVE else 0.0
        return self.snapshot.box.uptime_s + since

    def silent_s(self, now: float) -> float:
        """How long nothing has come over a connection that stands."""
        return max(now - self.received_at, 0.0) if self._live and self.link is Link.LIVE else 0.0

    def _take_snapshot(self, snapshot: BoxSnapshot, now: float) -> None:
        if self.snapshot is not None and snapshot.box.run_id != self.snapshot.box.run_id:
            self.history = History()
        self.link, self.lost = Link.LIVE, None
        self.snapshot, self.received_at = snapshot, now
        self.history.feed(snapshot)
