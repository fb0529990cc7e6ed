"""A thread with a connection of its own that outlives the store. What it does with it is its subclass's.

The thread goes round: it takes in answers and jobs, does one piece of work, and sleeps if there was none until an
answer, a job or a deadline comes. Whatever goes wrong ends the connection: every job is answered at once, the arena is
given back, and a new connection is tried again and again, with jobs being refused meanwhile. So a piece of work must
be short, and whoever waits within one must have a limit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dynamo_box.kv.client.arena import Arena, Holder, SharedArena
from dynamo_box.kv.client.session import StoreFailure, StoreGone, StoreRefused, StoreSession

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0

NOT_YET = "not connected yet"
CLOSED = "the worker's side of the tiers is closed"
STILL_MAPPED = "the memory of the kvstore before is still mapped"
NO_ROOM = "the host tier has no room for a block of this layout"

log = logging.getLogger(__name__)

J = TypeVar("J")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds after which a store that hasn't answered counts as gone; `fetch_s` is what a whole Fetch may take."""

    attach_s: float = 5.0
    seek_s: float = 1.0
    store_s: float = 5.0
    load_s: float = 20.0
    fetch_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Link:
    session: StoreSession
    arena: Arena


class Lane(Holder, Generic[J]):
    def __init__(
        self,
        name: str,
        dial: Callable[[], StoreSession],
        shared: SharedArena,
        limits: Limits,
        on_status: Callable[[], None],
    ) -> None:
        self._dial = dial
        self._shared = shared
        self._limits = limits
        self._on_status = on_status
        self._status = NOT_YET
        self._guard = threading.Lock()
        self._inbox: deque[J] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = self._ended = False
        self._ending = self._writing = False
        """Of the connection: its end is wanted; slots that it reserved are being written."""
        self._session: StoreSession | None = None
        self._link: Link | None = None
        self._epoch = 0
        self._permanent = False
        self._delay_s = FIRST_DELAY_S
        self._next_step_at = 0.0
        """When to dial, or until when the store may take to let us in."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # What a subclass does, on the thread.

    def begin(self, link: Link, job: J) -> None:
        """Take the job up. It must be known to `abort` before anything can go wrong."""
        raise NotImplementedError

    def work(self, link: Link) -> bool:
        """Do one short piece of work; False if there was none."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `work` has something to do at the latest, on the monotonic clock."""
        raise NotImplementedError

    def refuse(self, job: J, reason: str) -> None:
        """Answer a job that can't be begun."""
        raise NotImplementedError

    def abort(self, reason: str) -> None:
        """Answer every job that was begun: the connection is gone, or about to be."""
        raise NotImplementedError

    # For any thread.

    @property
    def status(self) -> str:
        return self._status

    def start(self) -> None:
        self._thread.start()

    def put(self, job: J) -> None:
        with self._guard:
            if not self._ended:
                self._inbox.append(job)
                os.eventfd_write(self._wake, 1)
                return
        self.refuse(job, CLOSED)

    def let_go(self) -> None:
        """Make the thread find that its connection has ended."""
        with self._guard:
            self._ending = True
            self._interrupt()

    def close(self) -> None:
        """Tell the thread to end."""
        with self._guard:
            if self._closing:
                return
            self._closing = self._ending = True
            os.eventfd_write(self._wake, 1)
            self._interrupt()

    def join(self) -> None:
        """After `close`: every job has its answer and nothing is held any more."""
        if self._thread.ident is None:
            self._finish()
        else:
            self._thread.join()

    # The thread.

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While slots are written: the connection stays, since its end gives them to others."""
        with self._guard:
            self._writing = True
        try:
            yield
        finally:
            with self._guard:
                self._writing = False
                self._interrupt()

    def _interrupt(self) -> None:
        """If it is to end, and may: whatever waits for the store in the thread waits no longer. Under the guard."""
        if self._ending and not self._writing and self._session is not None:
            self._session.interrupt()

    def _run(self) -> None:
        while not self._closing:
            if not self._turn():
                self._sleep()
        self._finish()

    def _turn(self) -> bool:
        """Whether there may be more to do at once."""
        try:
            if self._link is not None:
                self._link.session.pump()
            while (job := self._next_job()) is not None:
                if self._link is None:
                    self.refuse(job, self._status)
                else:
                    self.begin(self._link, job)
            if self._link is None:
                return self._connect()
            return self.work(self._link)
        except StoreFailure as error:
            self._lose(error)
        except Exception as error:  # a job that nobody answers would hold a request for ever
            log.exception("the worker's side of the KV tiers starts over")
            self._lose(error)
        return True

    def _next_job(self) -> J | None:
        with self._guard:
            return self._inbox.popleft() if self._inbox and not self._closing else None

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._session is not None:
            poll.register(self._session.fileno(), select.POLLIN)
        idle_until = None if self._permanent else self._next_step_at
        until = idle_until if self._link is None else self.next_deadline()
        left_ms = None if until is None else max((until - time.monotonic()) * 1000, 0) + 1
        if any(fd == self._wake for fd, _ in poll.poll(left_ms)):
            os.eventfd_read(self._wake)

    def _connect(self) -> bool:
        """One step towards a connection; whether it stands."""
        now = time.monotonic()
        if self._session is None:
            if self._permanent or now < self._next_step_at:
                return False
            epoch = self._shared.epoch_to_dial()
            if epoch is None:
                self._say(STILL_MAPPED)
                self._next_step_at = now + FIRST_DELAY_S
                return False
            self._publish(self._dial())
            self._epoch, self._next_step_at = epoch, now + self._limits.attach_s
        assert self._session is not None
        came = self._session.attached()
        if came is None:
            if now >= self._next_step_at:
                raise StoreGone(f"the kvstore has not let us in for {self._limits.attach_s:g} s")
            return False
        arena = self._shared.take(self, self._epoch, *came)
        if arena is None:
            raise StoreGone("another kvstore took over meanwhile")
        self._link = Link(self._session, arena)
        self._delay_s = FIRST_DELAY_S
        self._say("" if arena.slots else NO_ROOM)
        return True

    def _publish(self, session: StoreSession) -> None:
        """Let `close` and `let_go` reach it."""
        with self._guard:
            self._session, self._ending = session, self._closing
            self._interrupt()

    def _lose(self, error: Exception) -> None:
        was_linked = self._link is not None
        self._permanent = isinstance(error, StoreRefused) and error.permanent
        self._say(str(error) or type(error).__name__)
        self._let_everything_go(self._status)
        if was_linked:
            self._shared.lost(self._epoch)
        self._next_step_at = time.monotonic() + self._delay_s
        self._delay_s = min(self._delay_s * 2, MAX_DELAY_S)

    def _let_everything_go(self, reason: str) -> None:
        with self._guard:
            session, self._session = self._session, None
        self._link = None
        if session is not None:
            session.close()
        try:
            self.abort(reason)
        finally:
            self._shared.give_back(self)

    def _finish(self) -> None:
        self._say(CLOSED)
        self._let_everything_go(CLOSED)
        with self._guard:
            self._ended = True
            left = list(self._inbox)
            self._inbox.clear()
            os.close(self._wake)
        for job in left:
            self.refuse(job, CLOSED)

    def _say(self, status: str) -> None:
        if status != self._status:
            log.info("KV tiers, %s: %s", self._thread.name, status or "connected")
            self._status = status
            self._on_status()
