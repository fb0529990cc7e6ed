"""Play a recording: the same events as a running box gives, by a clock that can be stopped, hastened and moved.

One thread plays. It sleeps on a condition until the next frame is due or somebody changes the clock. However fast the
recording plays, the screen gets snapshots a few times a second; in between only as many are decoded as the history of
the box needs.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from dynamo_box.control.logs import Entry
from dynamo_box.errors import BoxError, UsageError
from dynamo_box.protocol.figures import FrontendFigures, RouterFigures
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui import demos
from dynamo_box.tui.history import BUCKET_S, KEPT_BUCKETS
from dynamo_box.tui.log_feed import TAIL_LINES, DeliverLog, LogBatch
from dynamo_box.tui.recording import Kind, Recording
from dynamo_box.tui.source import HZ, Connected, Deliver, Ended, Jumped, NewSnapshot

SLOWEST, FASTEST = 0.1, 100.0
PAST_S = BUCKET_S * KEPT_BUCKETS
EARLY_S = 0.05
"""Snapshots that were recorded at HZ come a little before their time, now and then."""


def locate(name: str) -> Path:
    """The recording that a person means by `name`: a file, or one of the demos that ship.

    Raises:
        UsageError: it is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if name in demos.DEMOS:
        return demos.path(name)
    raise UsageError(
        f"there is no recording {name!r}",
        remedy="name a file that `dynbox top --record FILE` wrote, or a demo",
        details=tuple(f"{demo}: {summary}" for demo, summary in demos.DEMOS.items()),
    )


def open_replay(name: str, speed: float = 1.0) -> Replay:
    """Raises:
    UsageError: no such recording, not a recording, or a speed out of range.
    BoxError: it is damaged, or this program can read no snapshot in it.
    """
    if not SLOWEST <= speed <= FASTEST:
        raise UsageError(f"--speed {speed:g} is out of range", remedy=f"use {SLOWEST:g} to {FASTEST:g}")
    recording = Recording.open(locate(name))
    try:
        return Replay(recording, speed)
    except BoxError:
        recording.close()
        raise


class Replay:
    """A `Seekable` source, and the feed of the log lines that were recorded. It closes `recording` with itself."""

    acts = False

    def __init__(self, recording: Recording, speed: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises:
        BoxError: no snapshot in it can be read.
        """
        self.recording = recording
        self._snapshots = array("I", (n for n in range(len(recording)) if recording.kind(n) is Kind.SNAPSHOT))
        self._telling = self._that_close_buckets()
        self._speed = speed
        self._paused = False
        self._clock = clock
        self._changed = threading.Condition()
        self._origin_s, self._origin_clock = 0.0, clock()
        self._moved = True
        self._log_moved = False
        self._closing = False
        self._deliver_log: DeliverLog | None = None
        self._delivering_log = threading.Lock()
        self._thread: threading.Thread | None = None
        # The thread's own: frames below `_done` have been delivered.
        self._done = 0
        self._ended = False
        self._awake_clock = -math.inf

    @property
    def note(self) -> str:
        """What is wrong with the recording, for a person; empty if nothing is."""
        said = ["cut short"] if self.recording.cut_short else []
        if skipped := self.recording.skipped:
            said.append(f"{skipped} unreadable {'frame' if skipped == 1 else 'frames'} skipped")
        return ", ".join(said)

    @property
    def position_s(self) -> float:
        with self._changed:
            return self._position()

    @property
    def duration_s(self) -> float:
        return self.recording.duration_s

    @property
    def speed(self) -> float:
        return self._speed

    @property
    def paused(self) -> bool:
        return self._paused

    def seek(self, position_s: float) -> None:
        with self._changed:
            self._set_origin(min(max(position_s, 0.0), self.duration_s))
            self._moved = self._log_moved = True
            self._changed.notify_all()

    def set_paused(self, paused: bool) -> None:
        with self._changed:
            self._set_origin(self._position())
            self._paused = paused
            self._changed.notify_all()

    def set_speed(self, speed: float) -> None:
        """`speed` is clipped to what is allowed."""
        with self._changed:
            self._set_origin(self._position())
            self._speed = min(max(speed, SLOWEST), FASTEST)
            self._changed.notify_all()

    def start(self, deliver: Deliver) -> None:
        with self._changed:
            self._set_origin(self._origin_s)
            self._thread = threading.Thread(target=self._run, args=(deliver,), name="replay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.recording.close()

    def start_log(self, deliver: DeliverLog) -> None:
        with self._changed:
            self._deliver_log = deliver
            self._log_moved = True
            self._changed.notify_all()

    def close_log(self) -> None:
        with self._delivering_log:
            self._deliver_log = None

    def _position(self) -> float:
        stands = self._paused or self._thread is None
        gone = 0.0 if stands else (self._clock() - self._origin_clock) * self._speed
        return min(self._origin_s + gone, self.duration_s)

    def _set_origin(self, position_s: float) -> None:
        self._origin_s, self._origin_clock = position_s, self._clock()

    def _run(self, deliver: Deliver) -> None:
        deliver(Connected())
        while True:
            with self._changed:
                while not (self._closing or self._moved or self._log_moved or self._due_in() <= 0):
                    due_in = self._due_in()
                    self._changed.wait(None if due_in == math.inf else due_in)
                if self._closing:
                    return
                until = bisect_right(self.recording.times, self._position())
                moved, log_moved = self._moved, self._log_moved
                self._moved = self._log_moved = False
                self._awake_clock = self._clock()
            self._show(deliver, until, moved)
            if moved or log_moved:
                self._give_log(LogBatch(self._log_before(until), anew=True))
            elif entries := self._log_between(self._done, until):
                self._give_log(LogBatch(entries))
            self._done = until
            if until == len(self.recording) and not self._ended:
                self._ended = True
                deliver(Ended())

    def _due_in(self) -> float:
        """Seconds of the real clock until there is something to deliver; infinite if nothing is to come."""
        if self._paused or self._done == len(self.recording):
            return math.inf
        frame_in = (self.recording.times[self._done] - self._position()) / self._speed
        return max(frame_in, self._awake_clock + 1 / HZ - EARLY_S - self._clock())

    def _show(self, deliver: Deliver, until: int, moved: bool) -> None:
        if not moved:
            for snapshot in self._between(until):
                deliver(NewSnapshot(snapshot))
            return
        self._ended = False
        if past := self._past(until):
            deliver(Jumped(past))

    def _that_close_buckets(self) -> set[int]:
        """Frames of the last snapshots in each bucket of the history, which are those that it can't do without."""
        recording = self.recording
        first = next((each for frame in self._snapshots if (each := recording.snapshot(frame)) is not None), None)
        if first is None:
            raise BoxError(
                f"no snapshot in {recording.path} can be read by this program",
                remedy=f"play it with the dynbox that recorded it ({recording.header.dynbox})",
            )
        start = first.at - recording.times[self._snapshots[0]]
        bucket_of = {frame: math.floor((start + recording.times[frame]) / BUCKET_S) for frame in self._snapshots}
        return {frame for frame, after in pairwise(self._snapshots) if bucket_of[frame] != bucket_of[after]}

    def _between(self, until: int) -> Iterator[BoxSnapshot]:
        """Of the snapshots that are due the last, and before it those that the history needs."""
        frames = self._snapshots[bisect_left(self._snapshots, self._done) : bisect_left(self._snapshots, until)]
        for frame in frames:
            if frame != frames[-1] and frame not in self._telling:
                continue
            if (snapshot := self.recording.snapshot(frame)) is not None:
                yield snapshot

    def _past(self, until: int) -> tuple[BoxSnapshot, ...]:
        """What a screen must know that starts in the middle: outlines of the minutes before, then the latest snapshot.

        Before the first snapshot, that one.
        """
        recording = self.recording
        last = max(bisect_left(self._snapshots, until) - 1, 0)
        oldest_s = recording.times[self._snapshots[last]] - PAST_S
        found: list[BoxSnapshot] = []
        for frame in reversed(self._snapshots[: last + 1]):
            if found and recording.times[frame] < oldest_s:
                break
            if found and frame not in self._telling:
                continue
            if (snapshot := recording.snapshot(frame)) is not None:
                found.append(_outline(snapshot) if found else snapshot)
        return tuple(reversed(found))

    def _log_between(self, start: int, until: int) -> tuple[Entry, ...]:
        if self._deliver_log is None:
            return ()
        frames = (frame for frame in range(start, until) if self.recording.kind(frame) is Kind.LOG)
        return tuple(entry for frame in frames for entry in self.recording.entries(frame))

    def _log_before(self, until: int) -> tuple[Entry, ...]:
        """The last TAIL_LINES lines of the frames below `until`."""
        if self._deliver_log is None:
            return ()
        found: list[Entry] = []
        for frame in range(until - 1, -1, -1):
            if len(found) >= TAIL_LINES:
                break
            if self.recording.kind(frame) is Kind.LOG:
                found.extend(reversed(self.recording.entries(frame)))
        return tuple(reversed(found[:TAIL_LINES]))

    def _give_log(self, batch: LogBatch) -> None:
        with self._delivering_log:
            if self._deliver_log is not None:
                self._deliver_log(batch)


def _outline(snapshot: BoxSnapshot) -> BoxSnapshot:
    """`snapshot` without what only the latest is asked for: decisions, live requests, events. They are most of it."""
    processes = tuple(_outline_of(process) for process in snapshot.processes)
    return msgspec.structs.replace(snapshot, processes=processes, events=())


def _outline_of(process: ProcessInfo) -> ProcessInfo:
    match process.figures:
        case RouterFigures() as figures:
            return msgspec.structs.replace(process, figures=msgspec.structs.replace(figures, decisions=()))
        case FrontendFigures() as figures:
            return msgspec.structs.replace(process, figures=msgspec.structs.replace(figures, live=()))
        case _:
            return process
