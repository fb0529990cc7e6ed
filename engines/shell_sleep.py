"""Sleep and wake of a worker: what the supervisor asks for by Sleep and Wake, and what becomes of it.

    awake ──Sleep──► falling asleep ──► asleep ──Wake──► waking ──► awake

One transition at a time: what comes in the middle of another is refused. Each way either arrives or leaves the
worker as it was: with requests left at a sleep's deadline it is announced again and serves on; a wake that fails
gives back what it took. The end of the process (Stop, Drain, TERM, no supervisor) interrupts both.

An engine that can't sleep is only brought to rest, withdrawn and with nothing in flight: the supervisor stops it then.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from dynamo_box.protocol import status
from engines.contract import SLEEP, Engine, EngineError, EngineInfo, Sleeper, SleepReport
from engines.log import get_logger
from engines.shell_announce import Announcement
from engines.shell_canary import Canary
from engines.shell_requests import Requests

ENGINE_SLEEP_S = 10.0
"""How long an engine may take to give its memory back once nothing runs."""
CANCEL_S = 3.0
"""How long it may take to end what a forced sleep cancels, at least."""
GIVE_BACK_S = 3.0
WATCHDOG_MARGIN_S = 5.0
LONGEST_S = 86_400.0
START_CANARY_S = 60.0
GOING_TO_SLEEP = "worker is going to sleep"

log = get_logger()


class Host(Protocol):
    """What the worker around it lends."""

    def send(self, message: status.ChildMessage) -> None: ...

    def fatal(self, cause: str) -> None: ...

    @property
    def ending(self) -> bool: ...


class SleepCycle:
    """`announcement` is set before the first `sleep`; the engine may take `offload_s` longer to fall asleep."""

    announcement: Announcement

    def __init__(
        self,
        host: Host,
        engine: Engine,
        info: EngineInfo,
        requests: Requests,
        canary: Canary,
        *,
        offload_s: float = 0.0,
    ) -> None:
        self._host = host
        self._engine_sleep_s = ENGINE_SLEEP_S + offload_s
        self._block_size = info.block_size
        self._sleeper = engine if isinstance(engine, Sleeper) and SLEEP in info.capabilities else None
        self._requests = requests
        self._canary = canary
        self._expected: tuple[int, ...] | None = None
        self._asleep = False
        self._task: asyncio.Task[None] | None = None
        self._doing = ""

    @property
    def doing(self) -> str:
        """What it is in the middle of, "" if nothing."""
        return self._doing

    @property
    def asleep(self) -> bool:
        return self._asleep

    async def remember(self) -> None:
        """Ask the canary for the first time: what it says now it must say after every wake.

        Raises:
            EngineError: it says nothing.
        """
        if self._sleeper is not None:
            self._expected = await self._canary.ask(self._block_size, START_CANARY_S)

    def sleep(self, message: status.Sleep) -> None:
        """Begin it, or answer at once."""
        if self._doing:
            self._host.send(status.Slept(message.id, error=f"the worker is {self._doing}"))
        elif self._asleep:
            self._host.send(status.Slept(message.id))
        else:
            self._begin("falling asleep", self._fall_asleep(message))

    def wake(self, message: status.Wake) -> None:
        """Begin it, or answer at once."""
        if self._doing:
            self._host.send(status.Woken(message.id, error=f"the worker is {self._doing}"))
        elif not self._asleep:
            self._host.send(status.Woken(message.id))
        else:
            self._begin("waking", self._wake_up(message))

    def abandon(self) -> None:
        """The process ends: leave it at what has been done, and have nothing more in the way."""
        if self._task is not None:
            self._task.cancel()

    def _begin(self, doing: str, work: Coroutine[Any, Any, None]) -> None:
        self._doing = doing
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._done)

    def _answer(self, message: status.Slept | status.Woken) -> None:
        """At the end of a transition: what is asked for next, on hearing this, may begin."""
        self._doing = ""
        self._host.send(message)

    def _done(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._doing = ""
            self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("sleep or wake failed", error=f"{type(error).__name__}: {error}")
            self._host.fatal(f"{type(error).__name__}: {error}")

    # falling asleep

    async def _fall_asleep(self, message: status.Sleep) -> None:
        began = time.perf_counter()
        self.announcement.withdraw()
        self._requests.refuse_new(GOING_TO_SLEEP)
        patience = min(max(0.0, message.drain_s), LONGEST_S)
        if message.force:
            self._requests.cancel_all(message.why or GOING_TO_SLEEP)
            patience = max(patience, CANCEL_S)
        if not await self._requests.idle(patience):
            left = self._requests.in_flight
            self._serve_again()
            self._answer(status.Slept(message.id, error=f"{left} requests still run", unfinished=left))
            return
        drained = time.perf_counter()
        try:
            async with asyncio.timeout(self._engine_sleep_s):
                report = await self._sleeper.sleep() if self._sleeper is not None else SleepReport(0, 0)
        except TimeoutError:
            self._fail(message.id, f"the engine did not fall asleep within {self._engine_sleep_s:g} s")
        except EngineError as error:
            if error.permanent:
                self._fail(message.id, error.cause)
            else:
                log.warning("the engine did not fall asleep", cause=error.cause)
                self._serve_again()
                self._answer(status.Slept(message.id, error=error.cause))
        else:
            self._asleep = True
            phases = {"drain": drained - began, **report.phases}
            log.info("asleep", kv_bytes=report.kv_bytes, weights_bytes=report.weights_bytes, phases=phases)
            self._answer(
                status.Slept(message.id, kv_bytes=report.kv_bytes, weights_bytes=report.weights_bytes, phases=phases)
            )

    def _fail(self, number: int, cause: str) -> None:
        """It is neither awake nor asleep, and only a new process can be either."""
        self._answer(status.Slept(number, error=cause))
        self._host.fatal(cause)

    def _serve_again(self) -> None:
        """After a sleep that came to nothing.

        The file is kept there by the announcement's own checks if it can't be written just now.
        """
        self._requests.accept()
        try:
            self.announcement.renew()
        except OSError as error:
            log.error("the instance file can't be written", error=str(error))

    # waking

    async def _wake_up(self, message: status.Wake) -> None:
        deadline_s = min(max(0.0, message.deadline_s), LONGEST_S)
        faulthandler.dump_traceback_later(deadline_s + WATCHDOG_MARGIN_S, exit=True)
        try:
            phases = await self._serve_as_before(deadline_s, self._sleeper) if self._sleeper is not None else {}
            if self._sleeper is None:
                self._asleep = False
                self._serve_again()
        except TimeoutError:
            self._sleep_on(message.id, f"the engine did not wake within {deadline_s:g} s", broken=True)
        except EngineError as error:
            self._sleep_on(message.id, error.cause, broken=error.permanent)
        except OSError as error:
            self._sleep_on(message.id, f"the worker can't be announced: {error}", broken=False)
        else:
            log.info("awake", phases=phases)
            self._answer(status.Woken(message.id, phases=phases))
        finally:
            # A drain that came meanwhile has set the watchdog for its own end.
            if not self._host.ending:
                faulthandler.cancel_dump_traceback_later()

    def _sleep_on(self, number: int, cause: str, *, broken: bool) -> None:
        log.error("the worker did not wake", cause=cause, broken=broken)
        self._answer(status.Woken(number, error=cause, broken=broken))

    async def _serve_as_before(self, deadline_s: float, sleeper: Sleeper) -> dict[str, float]:
        """Seconds by phase."""
        ends = time.monotonic() + deadline_s
        async with asyncio.timeout(deadline_s):
            report = await sleeper.wake(deadline_s)
        try:
            began = time.perf_counter()
            await self._answer_as_before(ends - time.monotonic())
            asked = time.perf_counter()
            self.announcement.renew()
        except Exception:
            await self._lie_down_again(sleeper)
            raise
        self._asleep = False
        self._requests.accept()
        return {**report.phases, "canary": asked - began, "register": time.perf_counter() - asked}

    async def _answer_as_before(self, timeout_s: float) -> None:
        """Raises EngineError, permanent: an engine that was started and doesn't say the same is of no use."""
        try:
            answer = await self._canary.ask(self._block_size, max(0.0, timeout_s))
        except EngineError as error:
            raise EngineError(error.cause, remedy=error.remedy, permanent=True) from error
        if answer != self._expected:
            expected = list(self._expected or ())
            cause = f"the canary prompt is answered with tokens {list(answer)} instead of {expected}"
            raise EngineError(cause, permanent=True)

    async def _lie_down_again(self, sleeper: Sleeper) -> None:
        self.announcement.withdraw()
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(GIVE_BACK_S):
                    await sleeper.sleep()
            except EngineError as error:
                log.error("the engine did not give its memory back", cause=error.cause)
