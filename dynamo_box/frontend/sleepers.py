"""Models that sleep, and the requests that wait for them to wake.

The supervisor says where every model is (`Residencies`); until it has, every model counts as awake. A request to one
that is asleep, falling asleep or waking joins that model's queue. The queue asks the supervisor to wake the model:
once, and again, after a pause, when that failed or when the model fell asleep again. Waiting ends in one of three ways:
the model is awake and all go on; a request's own time is up; or the whole queue fails with the reason, because waking
has failed too often, or at once where there is no room for the model and none will come by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from dynamo_box.errors import ExitCode
from dynamo_box.frontend import errors
from dynamo_box.frontend.asking import Asking
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.requests import LiveRequest
from dynamo_box.frontend.stats import WAKING
from dynamo_box.log import get_logger
from dynamo_box.metrics import FrontendMetrics
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.status import Asked, Told

ASLEEP = ("asleep", "falling_asleep")
SLEEPING = (*ASLEEP, "waking")

FIRST_SIGN_S = 0.5
"""A model that wakes faster costs its stream neither an HTTP status of its own for errors nor its worker's name."""

SIGN_EVERY_S = 1.0

ASK_AGAIN_S = 1.0
MAX_FAILURES = 3
"""Failed wakes in a row, before all that wait fail too. Those for want of time don't count: others may be done soon."""

SETTLE_S = 1.0
"""A worker may refuse a request a moment before this process hears that its model falls asleep."""

MAX_WAKES = 8
"""A request that was sent back so often by models that fell asleep again is given up."""

PASSING = (ExitCode.TIMED_OUT, ExitCode.NOT_RUNNING)

log = get_logger()


class _Queue:
    """The requests that wait for one model."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.waiting = 0
        self.changed = asyncio.Event()
        self.asked: int | None = None
        """The number of the Asked that is unanswered."""
        self.again: asyncio.TimerHandle | None = None
        """Runs while the next Asked is due later."""
        self.failures = 0
        self.reason = ""
        """Why the last wake failed."""
        self.refusal: ApiError | None = None
        """What all that wait are told, once they wait no more."""

    def wake_up(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Sleepers:
    """`on_change` is called after every news."""

    def __init__(
        self,
        asking: Asking,
        metrics: FrontendMetrics,
        *,
        max_waking: int,
        wake_timeout_s: float,
        on_change: Callable[[Iterable[Residency]], None],
    ) -> None:
        self._asking = asking
        self._metrics = metrics
        self._max_waking = max_waking
        self._wake_timeout_s = wake_timeout_s
        self._on_change = on_change
        self._latest: dict[str, Residency] = {}
        self._queues: dict[str, _Queue] = {}
        self._changed = asyncio.Event()

    @property
    def residencies(self) -> tuple[Residency, ...]:
        return tuple(self._latest.values())

    def residency(self, model: str) -> Residency | None:
        return self._latest.get(model)

    def is_sleeping(self, model: str) -> bool:
        """Asleep, on its way there, or on its way back."""
        residency = self._latest.get(model)
        return residency is not None and residency.state in SLEEPING

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests wait, by model."""
        return {model: queue.waiting for model, queue in self._queues.items()}

    def update(self, residencies: Iterable[Residency]) -> None:
        """Take news of some models or all."""
        residencies = tuple(residencies)
        for residency in residencies:
            before = self._latest.get(residency.model)
            self._latest[residency.model] = residency
            queue = self._queues.get(residency.model)
            if queue is not None and before != residency:
                self._follow(queue, before, residency)
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change(residencies)

    async def wait_until_awake(self, live: LiveRequest) -> None:
        """Return when the request's model is not sleeping: at once if it isn't now.

        Raises:
            ApiError: it doesn't wake, or not in time, or has no room, or too many wait for it, or it is held (503).
        """
        model = live.stats.model
        if not self.is_sleeping(model):
            return
        self._refuse_held(model)
        queue = self._queues.setdefault(model, _Queue(model))
        if queue.waiting >= self._max_waking:
            self._metrics.wake_refused.labels(model).inc()
            raise errors.too_many_waiting(model, self._max_waking)
        live.wakes += 1
        if live.wakes > MAX_WAKES:
            raise errors.wake_failed(model, f"it fell asleep {MAX_WAKES} times before this request had its turn")
        queue.waiting += 1
        live.stats.phase = WAKING
        began = time.monotonic()
        try:
            await self._wait(queue, live, began)
        finally:
            live.last_step = time.monotonic()
            live.waited_for_wake_s += live.last_step - began
            live.stats.phase = "queued"
            queue.waiting -= 1
            if queue.waiting == 0:
                self._close(queue)
        self._metrics.wake_wait.labels(model).observe(live.last_step - began)

    async def wait_for_sleep(self, model: str) -> bool:
        """A worker says that its model goes to sleep: is that so? Waits SETTLE_S for the news of it."""
        if model not in self._latest:
            return False
        try:
            async with asyncio.timeout(SETTLE_S):
                while not self.is_sleeping(model):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _wait(self, queue: _Queue, live: LiveRequest, began: float) -> None:
        deadline = began + self._wake_timeout_s - live.waited_for_wake_s
        sign_at = began + FIRST_SIGN_S
        while True:
            now = time.monotonic()
            if queue.refusal is not None:
                raise queue.refusal
            if not self.is_sleeping(queue.model):
                return
            self._refuse_held(queue.model)
            if now >= deadline:
                raise errors.wake_timed_out(queue.model, self._wake_timeout_s, self._doing(queue))
            self._ask(queue)
            if now < sign_at:
                await _wait_for(queue.changed, min(sign_at, deadline) - now)
                continue
            sign_at = now + SIGN_EVERY_S
            await live.sign_of_life(f"waking {queue.model} ({self._doing(queue)}, {now - began:.0f} s)")

    def _refuse_held(self, model: str) -> None:
        residency = self._latest[model]
        if residency.held and residency.state in ASLEEP:
            raise errors.held(model)

    def _doing(self, queue: _Queue) -> str:
        """In words; the reason of the last failure, if there is one."""
        residency = self._latest[queue.model]
        doing = residency.phase or residency.state.replace("_", " ")
        return f"{doing}; {queue.reason}" if queue.reason else doing

    # asking the supervisor

    def _ask(self, queue: _Queue) -> None:
        """Ask for a wake, unless that is under way, or due later."""
        if self._latest[queue.model].state not in ASLEEP or queue.asked is not None or queue.again is not None:
            return
        log.info("asks to wake", model=queue.model, waiting=queue.waiting, failures=queue.failures)
        asked = Asked(0, "wake", queue.model, on_demand=True)
        queue.asked = self._asking.ask(asked, lambda told: self._on_told(queue, told))

    def _on_told(self, queue: _Queue, told: Told) -> None:
        queue.asked = None
        if told.code != ExitCode.OK:
            queue.reason = told.text
            queue.failures += told.code not in PASSING
            if told.code == ExitCode.USAGE:
                self._give_up(queue, errors.no_room(queue.model, f"{told.text}; {told.remedy}"))
                return
            if queue.failures >= MAX_FAILURES:
                self._give_up(queue, errors.wake_failed(queue.model, queue.reason))
                return
        if self._latest[queue.model].state in ASLEEP and queue.waiting:
            self._ask_later(queue)

    def _follow(self, queue: _Queue, before: Residency | None, now: Residency) -> None:
        if now.state not in SLEEPING:
            queue.failures, queue.reason = 0, ""
            self._answered(queue)
        elif now.state in ASLEEP and before is not None and before.state not in ASLEEP:
            self._ask_later(queue)
        queue.wake_up()

    def _ask_later(self, queue: _Queue) -> None:
        if queue.again is None:
            queue.again = asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._ask_again, queue)

    def _ask_again(self, queue: _Queue) -> None:
        """What was asked before the model fell asleep again counts as answered, even if no answer has come."""
        self._answered(queue)
        queue.wake_up()

    def _give_up(self, queue: _Queue, refusal: ApiError) -> None:
        """Fail all that wait; who comes after them starts a queue of its own."""
        log.warning("can't be woken", model=queue.model, waiting=queue.waiting, reason=queue.reason)
        queue.refusal = refusal
        self._close(queue)
        queue.wake_up()

    def _answered(self, queue: _Queue) -> None:
        """Whatever is asked or due: it is of no interest any more."""
        if queue.asked is not None:
            self._asking.forget(queue.asked)
            queue.asked = None
        if queue.again is not None:
            queue.again.cancel()
            queue.again = None

    def _close(self, queue: _Queue) -> None:
        self._answered(queue)
        if self._queues.get(queue.model) is queue:
            del self._queues[queue.model]


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Return when it is set, or after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
