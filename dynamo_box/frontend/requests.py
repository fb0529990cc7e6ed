"""All requests between admission and end, and what may end one early.

An interruption (the client has left, the operator cancels, nothing moves, the process stops) cancels the request's task
wherever it waits, and its `finally` blocks give back the sequence, the lease and the place in the queue. The task then
finds the reason here and answers with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.reply import Reply
from dynamo_box.frontend.stats import WAKING, RequestStats, Stats

STALL_CHECK_S = 1.0
FIRST_TOKEN_PATIENCE = 5.0
"""Before its first token on a worker a request may wait for its turn there, so it has this many stall limits if that
worker moves."""


class LiveRequest:
    """One request, run by the task that made this object."""

    __slots__ = (
        "_reason",
        "_reply",
        "_task",
        "awaits_turn",
        "last_step",
        "stats",
        "waited_for_wake_s",
        "wakes",
        "worker_last_step",
    )

    def __init__(self, stats: RequestStats, reply: Reply) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._reply = reply
        self._reason: ApiError | None = None
        self.stats = stats
        self.last_step = time.monotonic()
        self.awaits_turn = True
        """Has the worker where it is now said nothing of it yet?"""
        self.worker_last_step: Callable[[], float] | None = None
        self.wakes = 0
        """How often it has waited for its model to wake, and `waited_for_wake_s` how long in all."""
        self.waited_for_wake_s = 0.0

    def begin_leg(self, worker_last_step: Callable[[], float]) -> None:
        """It waits for its turn on a worker, which last moved at `worker_last_step()`."""
        self.last_step = time.monotonic()
        self.awaits_turn = True
        self.worker_last_step = worker_last_step

    async def sign_of_life(self, text: str) -> None:
        """Tell a client that reads a stream what its request waits for."""
        if self.stats.streamed:
            await self._reply.comment(text)

    def interrupt(self, reason: ApiError) -> None:
        """End the request with `reason`; the first one counts."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def interruption(self) -> ApiError | None:
        """Why the task has just been cancelled; None if that was somebody else's doing."""
        if self._reason is not None:
            self._task.uncancel()
        return self._reason

    def stall(self, now: float, limit_s: float) -> ApiError | None:
        """The error to end this request with, if nothing has moved for too long."""
        idle_s = now - self.last_step
        if idle_s < limit_s:
            return None
        if self._reply.sending:
            return errors.slow_client(limit_s)
        if self.stats.phase == WAKING:
            return None
        waits_its_turn = (
            self.awaits_turn
            and self.worker_last_step is not None
            and now - self.worker_last_step() < limit_s
            and idle_s < limit_s * FIRST_TOKEN_PATIENCE
        )
        return None if waits_its_turn else errors.stalled(self.stats.worker, limit_s)


class Requests:
    """`max_live` requests may wait or run; one more is turned away. Each may take `max_generation_s`, its waiting
    included.
    """

    def __init__(self, stats: Stats, *, max_live: int, stall_limit_s: float, max_generation_s: float) -> None:
        self.stats = stats
        self.draining = False
        self._max_live = max_live
        self._stall_limit_s = stall_limit_s
        self._max_generation_s = max_generation_s
        self._live: dict[LiveRequest, None] = {}
        self._fell = asyncio.Event()

    @property
    def active(self) -> int:
        return len(self._live)

    def admit(self, stats: RequestStats, reply: Reply) -> LiveRequest:
        """Take a request of the current task; to be given back with `end`.

        Raises:
            ApiError: no room, or the process is about to stop (503).
        """
        if self.draining:
            raise errors.draining()
        if len(self._live) >= self._max_live:
            raise errors.overloaded(self._max_live)
        live = LiveRequest(stats, reply)
        self._live[live] = None
        self.stats.begin(stats)
        return live

    def end(self, live: LiveRequest, status: int) -> None:
        del self._live[live]
        self.stats.end(live.stats, status)
        self._fell.set()

    def interrupt(self, request_id: str, reason: ApiError) -> int:
        """End every live request of this id; how many there were."""
        found = [live for live in self._live if live.stats.request_id == request_id]
        for live in found:
            live.interrupt(reason)
        return len(found)

    def interrupt_all(self, reason: ApiError) -> None:
        for live in self._live:
            live.interrupt(reason)

    async def watch_the_time(self) -> None:
        """End requests in which nothing moves, and those that have had all their time; runs until cancelled."""
        while True:
            await asyncio.sleep(min(STALL_CHECK_S, self._stall_limit_s, self._max_generation_s))
            now = time.monotonic()
            for live in self._live:
                error = live.stall(now, self._stall_limit_s)
                if now - live.stats.began >= self._max_generation_s:
                    error = errors.took_too_long(self._max_generation_s)
                if error is not None:
                    live.interrupt(error)

    async def drain(self, tell: Callable[[int], None]) -> None:
        """Take nothing new; return when the last request has ended. `tell` hears how many are left, 0 at last."""
        self.draining = True
        while self._live:
            tell(len(self._live))
            self._fell.clear()
            await self._fell.wait()
        tell(0)
