"""Where the terminal UI gets its snapshots from: a running box, or a recording (`dynamo_box.tui.replay`).

A source runs in a thread of its own and hands over events in order. It never gives up by itself: a box that is gone
may come back, with another plan and pid, and then its snapshots follow as if nothing had been.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.paths import RunDir
from dynamo_box.snapshot import BoxSnapshot

HZ = 4.0
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 1.0


@dataclass(frozen=True)
class Connected:
    """Somebody is there; snapshots follow."""


@dataclass(frozen=True)
class NewSnapshot:
    snapshot: BoxSnapshot


@dataclass(frozen=True)
class Jumped:
    """A recording was moved to another moment: history starts over with `past`, oldest first, and the last is now."""

    past: tuple[BoxSnapshot, ...]


class Why(enum.StrEnum):
    """ABSENT: there has been no box yet. STOPPED: it ended as it was told to."""

    ABSENT = "absent"
    STOPPED = "stopped"
    BROKEN = "broken"


@dataclass(frozen=True)
class Lost:
    """Nobody is there (any more); the source goes on looking. The words are those of a BoxError."""

    why: Why
    reason: str
    remedy: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The recording has been played to its end. It may still be moved back."""


SourceEvent = Connected | NewSnapshot | Jumped | Lost | Ended
Deliver = Callable[[SourceEvent], None]
"""Called from the source's thread; returns at once and may be called after `close` has begun, never after it ended."""


class Source(Protocol):
    """`acts` says whether there is a box behind it that can be told to do something."""

    @property
    def acts(self) -> bool: ...

    def start(self, deliver: Deliver) -> None:
        """Begin to deliver; once."""
        ...

    def close(self) -> None:
        """Stop, and wait until the thread is gone."""
        ...


@runtime_checkable
class Seekable(Source, Protocol):
    """A source that can be moved in time. Seconds count from the recording's start; methods may be called from any
    thread and are followed by an event as soon as something else is to be shown.
    """

    @property
    def position_s(self) -> float: ...

    @property
    def duration_s(self) -> float: ...

    @property
    def speed(self) -> float: ...

    @property
    def paused(self) -> bool: ...

    @property
    def note(self) -> str:
        """What is wrong with the recording, for a person; empty if nothing is."""
        ...

    def seek(self, position_s: float) -> None:
        """Move to `position_s`, clipped to the recording; followed by `Jumped`."""
        ...

    def set_paused(self, paused: bool) -> None: ...

    def set_speed(self, speed: float) -> None: ...


class LiveSource:
    """The box in `run_dir`, watched over its control socket at `HZ`."""

    acts = True

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._client: ControlClient | None = None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver) -> None:
        self._thread = threading.Thread(target=self._run, args=(deliver,), name="box-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closing.set()
            if self._client is not None:
                self._client.interrupt()
        if self._thread is not None:
            self._thread.join()

    def _run(self, deliver: Deliver) -> None:
        said: Lost | None = None
        wait_s = RETRY_FIRST_S
        while not self._closing.is_set():
            seen = _Seen()
            lost = self._watch(deliver, seen, first=said is None)
            if self._closing.is_set():
                return
            if seen.snapshots:
                wait_s = RETRY_FIRST_S
            # "No box is running" adds nothing to how the last one ended.
            if seen.snapshots or said is None or (lost != said and lost.why is not Why.ABSENT):
                deliver(lost)
                said = lost
            self._closing.wait(wait_s)
            wait_s = min(wait_s * 2, RETRY_LONGEST_S)

    def _watch(self, deliver: Deliver, seen: _Seen, *, first: bool) -> Lost:
        """Deliver what one connection yields; returns why it ended."""
        try:
            with ControlClient.connect(self._run_dir) as client, self._interruptible(client):
                if first:
                    deliver(Connected())
                for snapshot in client.watch(HZ):
                    seen.snapshots += 1
                    seen.state = snapshot.box.state
                    deliver(NewSnapshot(snapshot))
        except NotRunning as error:
            return Lost(Why.ABSENT, error.what, error.remedy or "", error.details)
        except BoxError as error:
            return Lost(Why.BROKEN, f"lost: {error.what}", error.remedy or "", error.details)
        if seen.state in ("stopping", "stopped"):
            return Lost(Why.STOPPED, "the box has stopped", "start one with `dynbox up`")
        return Lost(Why.BROKEN, "lost: the supervisor went away", "`dynbox logs supervisor` may say why")

    @contextlib.contextmanager
    def _interruptible(self, client: ControlClient) -> Iterator[None]:
        """While `client` waits for the box, `close` may end the wait."""
        with self._lock:
            self._client = client
            if self._closing.is_set():
                client.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._client = None


@dataclass
class _Seen:
    """What one connection has brought."""

    snapshots: int = 0
    state: str = ""
