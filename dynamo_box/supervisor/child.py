"""One child of the supervisor through all its lives: its state, what it said of itself, restarts, drain and stop.

`_run` lives it again and again; `stop` asks it to end. A failure of the program, of its guard or of the start (no
progress before the deadline) makes the life end, `why_it_ended` says why, and `states.after_failure` what comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import msgspec

from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.plan.types import ProcessPlan, RestartPolicy
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import Figures, WorkerFigures
from dynamo_box.protocol.framing import FrameError
from dynamo_box.protocol.spec import WorkerSpec
from dynamo_box.snapshot import Progress
from dynamo_box.supervisor.failure import Failure, why_it_ended
from dynamo_box.supervisor.life import Life, Surroundings
from dynamo_box.supervisor.logs import ProcessLog
from dynamo_box.supervisor.questions import Questions, R
from dynamo_box.supervisor.states import Retry, State, after_failure, check
from dynamo_box.supervisor.waiting import done_within, first_of, set_within

LAST_LINES = 20
LINGER_S = 5.0
"""How long a child may go on after it said that it failed, or closed its status socket."""
STOP_GRACE_S = 5.0
GUARD_PATIENCE_S = 3.0
"""How long after the guard's KILL nothing of the life may be left, before the guard itself is killed."""
ANSWER_MARGIN_S = 15.0
"""On top of a deadline that a child keeps itself: it says how it went."""


class Child:
    """`changed` is called after any change that people may see; `emit(level, text)` adds to the event list;
    `inherit` opens what each life gets beside its status socket, as descriptors by the variables that tell of them;
    `asked` hears what a client wants of a model.
    """

    def __init__(
        self,
        plan: ProcessPlan,
        policy: RestartPolicy,
        surroundings: Surroundings,
        log: ProcessLog,
        *,
        changed: Callable[[Child], None],
        emit: Callable[[str, str], None],
        gone: Callable[[], None],
        inherit: Callable[[], AbstractContextManager[Mapping[str, int]]],
        asked: Callable[[Child, status.Asked], None],
    ) -> None:
        self.plan = plan
        self.log = log
        self.state = State.PLANNED
        self.phase = ""
        self.progress: Progress | None = None
        self.info: dict[str, str] = {}
        self.figures: Figures | None = None
        self.failure: Failure | None = None
        self.restarts = 0
        self.killed = 0
        self.ever_ready = False
        self.resident_bytes: int | None = None
        self.life_began: float | None = None
        self._policy = policy
        self._surroundings = surroundings
        self._changed = changed
        self._emit = emit
        self._gone = gone
        self._inherit = inherit
        self._asked = asked
        self._loop = asyncio.get_running_loop()
        self._life: Life | None = None
        self._failures = 0
        self._ready_at: float | None = None
        self._said: status.Failed | None = None
        self._broken = ""
        self._heard_at: float | None = None
        self._suspected = False
        self._in_flight = 0
        self._changes_role = False
        self.started = asyncio.Event()
        self._stop_wanted = asyncio.Event()
        self._ready = asyncio.Event()
        self._start_timeout: asyncio.Timeout | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._questions = Questions(plan.name)
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def pid(self) -> int | None:
        return self._life.pid if self._life else None

    @property
    def is_ready(self) -> bool:
        """It can serve now: a program that just died is still `ready` until nothing is left of its life."""
        return self.state is State.READY and self.pid is not None

    @property
    def guard_pid(self) -> int | None:
        return self._life.guard_pid if self._life else None

    # what others ask for

    def start(self) -> asyncio.Task[None]:
        """Run until stopped or FATAL. The task never raises for anything that the child does."""
        self._stop_wanted.clear()
        self._failures = 0
        self.started.set()
        self._task = self._loop.create_task(self._run(), name=f"child {self.name}")
        return self._task

    async def stop(self, drain_s: float) -> int:
        """Drain until `drain_s`, then TERM, then KILL; on return nothing is left. With 0 there is no
        drain. How many requests were left unfinished, by what the child last said.
        """
        self._stop_wanted.set()
        life = self._life
        if life is None:
            self._in_flight = 0
        elif not life.ended.done():
            if self.state is State.READY or self._changes_role:
                self._in_flight = _requests_of(self.figures)  # a frozen one won't tell any more when it drains
                if drain_s > 0:
                    if self.state is State.READY:
                        self._to(State.DRAINING)
                    life.send(status.Drain(drain_s))
                    await done_within(life.ended, drain_s)
            if not life.ended.done():
                await self._end(life)
        if self._task is not None:
            await self._task
        if self.state is not State.STOPPED:
            self.phase = ""
            self._to(State.STOPPED)
        return self._in_flight

    async def _end(self, life: Life) -> None:
        if self.state is not State.STOPPING:
            self._to(State.STOPPING)
        life.send(status.Stop())
        life.terminate(STOP_GRACE_S)
        if not await done_within(life.ended, STOP_GRACE_S + GUARD_PATIENCE_S):
            life.kill()
            await life.ended

    def hurry(self) -> None:
        """Cut a drain short."""
        if self._life is not None and self.state is State.DRAINING:
            self._life.terminate(STOP_GRACE_S)

    async def wait_ready(self) -> None:
        """Until the process is ready.

        Raises:
            BoxError: it became FATAL, or was stopped, first.
        """
        if self._task is None:
            raise NotRunning(f"{self.name} was not started")
        while not self._ready.is_set():
            if self._task.done():
                raise self.failure_error()
            ready = self._loop.create_task(self._ready.wait())
            try:
                await first_of(ready, self._task)
            finally:
                ready.cancel()

    def failure_error(self) -> BoxError:
        """The last failure as an error for people."""
        return (self.failure or Failure("it was stopped")).error(self.name)

    async def command(
        self, make: Callable[[int], status.Set | status.CancelRequest], timeout_s: float
    ) -> status.Answer:
        """Send a numbered command and wait for its answer.

        Raises:
            NotRunning: the process isn't ready, or ended before it answered.
            TimedOut: no answer in time.
            BoxError: too many commands wait already.
        """
        if not self.is_ready:
            raise NotRunning(f"{self.name} is {self.state}", remedy="wait until `dynbox ps` shows it as ready")
        return await self._ask(make, status.Answer, timeout_s)

    async def move(self, make: Callable[[int], status.Move], timeout_s: float) -> status.Moved:
        """The same for a service of weight memory; one that doesn't answer in time is replaced, which loses nothing."""
        if not self.is_ready:
            raise NotRunning(f"{self.name} is {self.state}", remedy="wait until `dynbox ps` shows it as ready")
        try:
            return await self._ask(make, status.Moved, timeout_s)
        except TimedOut:
            self._replace(f"moving weights took longer than {timeout_s:g} s")
            raise

    async def sleep(self, drain_s: float, *, force: bool, why: str) -> status.Slept:
        """Have a ready worker finish what it runs, let go of its memory and stay. With an error in the answer it
        serves on.

        Raises:
            NotRunning: it isn't ready, or ended meanwhile: nothing of it is left to sleep.
            TimedOut: it didn't keep the deadline; it is being stopped.
        """
        if not self.is_ready:
            raise NotRunning(f"{self.name} is {self.state}")
        self._to(State.DRAINING)
        spec = self.plan.spec
        limit_s = drain_s + ANSWER_MARGIN_S + (spec.sleep_offload_s if isinstance(spec, WorkerSpec) else 0.0)
        try:
            slept = await self._ask(lambda number: status.Sleep(number, drain_s, force, why), status.Slept, limit_s)
        except TimedOut:
            self._replace(f"didn't fall asleep within {limit_s:g} s")
            raise
        if self._is_still(State.DRAINING):
            self.phase = ""
            self._to(State.READY if slept.error else State.ASLEEP)
        return slept

    async def wake(self, deadline_s: float) -> status.Woken:
        """Have a sleeping worker take its memory again and serve. With an error in the answer it sleeps on.

        Raises:
            NotRunning: it isn't asleep, or ended meanwhile.
            TimedOut: it didn't keep the deadline; it is being stopped.
        """
        if self.state is not State.ASLEEP or self.pid is None:
            raise NotRunning(f"{self.name} is {self.state}")
        self._to(State.WAKING)
        try:
            woken = await self._ask(
                lambda number: status.Wake(number, deadline_s), status.Woken, deadline_s + ANSWER_MARGIN_S
            )
        except TimedOut:
            self._replace(f"didn't wake within {deadline_s + ANSWER_MARGIN_S:g} s")
            raise
        if self._is_still(State.WAKING):
            self._to(State.ASLEEP if woken.error else State.READY)
            if not woken.error:
                self._ready.set()
        return woken

    async def set_role(self, role: str, drain_s: float) -> status.Answer:
        """Have a ready worker finish what it runs and serve as `role`, in this life and those to come. With an error in
        the answer it serves on as before.

        Raises:
            NotRunning: it isn't ready, or ended meanwhile: it comes back in its old role.
            TimedOut: it didn't keep the deadline; it is replaced, in its old role.
        """
        spec = self.plan.spec
        if not self.is_ready or not isinstance(spec, WorkerSpec):
            raise NotRunning(f"{self.name} is {self.state}", remedy="wait until `dynbox ps` shows it as ready")
        self._changes_role = True
        self._to(State.DRAINING)
        limit_s = drain_s + ANSWER_MARGIN_S
        try:
            answer = await self._ask(lambda number: status.SetRole(number, role, drain_s), status.Answer, limit_s)
        except TimedOut:
            self._replace(f"didn't change its role within {limit_s:g} s")
            raise
        if self._is_still(State.DRAINING) and not self._stop_wanted.is_set():
            self._changes_role = False
            self.phase = ""
            if not answer.error:
                spec = msgspec.structs.replace(spec, role=role)
                self.plan = msgspec.structs.replace(self.plan, role=role, spec=spec)
            self._to(State.READY)
            self._ready.set()
        return answer

    def _is_still(self, state: State) -> bool:
        """After a wait, in which anything may have happened."""
        return self.state is state

    def tell(self, message: status.ParentMessage) -> None:
        """Without an answer; dropped if the process isn't there."""
        if self._life is not None:
            self._life.send(message)

    async def _ask(self, make: Callable[[int], status.ParentMessage], kind: type[R], timeout_s: float) -> R:
        if self._life is None:
            raise NotRunning(f"{self.name} is {self.state}")
        return await self._questions.ask(self._life.send, make, kind, timeout_s)

    def _replace(self, why: str) -> None:
        """End this life; what follows is as after any failure."""
        if self._life is not None and not self._broken:
            self._broken = why
            self._gone()
            self._life.terminate(0.0)

    # its lives

    async def _run(self) -> None:
        while not self._stop_wanted.is_set():
            await self._live()
            if self._stop_wanted.is_set():
                return
            if self.state not in (State.STARTING, State.READY) and not self._changes_role:
                self._to(State.STOPPED)
                self._emit("warning", f"{self.failure.cause if self.failure else 'ended'} while its model slept")
                return
            verdict = after_failure(
                self._policy,
                failures=self._failures,
                ready_for_s=None if self._ready_at is None else self._loop.time() - self._ready_at,
                ever_ready=self.ever_ready,
                permanent=self.failure is not None and self.failure.permanent,
            )
            cause = self.failure.cause if self.failure else ""
            if not isinstance(verdict, Retry):
                self._to(State.FATAL)
                self._emit("error", f"{cause}; not restarted: {verdict.reason}")
                return
            self._failures = verdict.failures
            self._to(State.BACKOFF)
            self._emit("warning", f"{cause}; restart in {verdict.delay_s:g} s")
            if not await set_within(self._stop_wanted, verdict.delay_s):
                self.restarts += 1

    async def _live(self) -> None:
        """One life, to its very end. Afterwards `failure` says why it ended, unless it was asked to."""
        self._reset_for_life()
        self._to(State.STARTING)
        try:
            with self._inherit() as inherited:
                self._life = life = await Life.begin(
                    self.plan,
                    self._surroundings,
                    inherited=inherited,
                    log=self.log,
                    on_message=self._on_message,
                    on_status_closed=self._on_status_closed,
                    program_ended=self._on_program_end,
                    program_started=lambda: self._changed(self),
                )
        except OSError as error:
            self.failure = Failure(f"can't be spawned: {error}")
            return
        if self._stop_wanted.is_set():
            life.terminate(STOP_GRACE_S)
        timed_out = not await self._ready_in_time(life)
        if timed_out and not self._stop_wanted.is_set():
            self._broken = f"no progress for {self.plan.start_deadline_s:g} s while {self.phase or 'starting'}"
            life.terminate(STOP_GRACE_S)
        ending = await life.ended
        if self._linger is not None:
            self._linger.cancel()
        self._questions.child_ended()
        self.killed += life.killed
        self._life, self.life_began, self.resident_bytes, self.figures = None, None, None, None
        if not self._stop_wanted.is_set():
            self.failure = why_it_ended(
                ending,
                self._said,
                self._broken,
                self.log.last(LAST_LINES),
                start_timed_out=timed_out,
                ever_ready=self.ever_ready,
            )

    def _reset_for_life(self) -> None:
        self._ready.clear()
        self._ready_at = None
        self._said = None
        self._broken = ""
        self._heard_at, self._suspected = None, False
        self._linger = None
        self._changes_role = False
        self.phase, self.progress, self.figures, self.info = "", None, None, {}
        self.life_began = self._loop.time()
        self.log.forget_recent()

    async def _ready_in_time(self, life: Life) -> bool:
        """False when the start deadline passed; each step of progress moves it (see `_on_message`)."""
        ready = self._loop.create_task(self._ready.wait())
        try:
            async with asyncio.timeout(self.plan.start_deadline_s) as self._start_timeout:
                await first_of(ready, life.ended)
        except TimeoutError:
            return False
        finally:
            self._start_timeout = None
            ready.cancel()
        return True

    # what the child says

    def _on_message(self, message: status.ChildMessage) -> None:
        match message:
            case status.Starting():
                self._on_progress(message)
            case status.Ready():
                if self.state is State.STARTING:
                    self.info = message.info
                    self.phase, self.progress = "", None
                    self.ever_ready = True
                    self._ready_at = self._loop.time()
                    self._to(State.READY)
                    self._ready.set()
                    self._emit("info", "ready")
            case status.Report():
                self._heard_at, self._suspected = self._loop.time(), False
                self.figures = message.figures
                self._changed(self)
            case status.Note():
                self._emit(message.level, message.text)
            case status.Failed():
                self._said = message
                self._end_within(LINGER_S)
            case status.Draining():
                self._in_flight = message.in_flight
                self.phase = f"{message.in_flight} in flight"
                self._changed(self)
            case status.Answer() | status.Slept() | status.Woken() | status.Moved():
                self._questions.answered(message)
            case status.Asked():
                self._asked(self, message)

    def _on_progress(self, step: status.Starting) -> None:
        progress = None if step.done is None else Progress(step.done, step.total, step.unit)
        if (step.phase, progress) == (self.phase, self.progress):
            return
        self.phase, self.progress = step.phase, progress
        if self._start_timeout is not None and not self._start_timeout.expired():
            self._start_timeout.reschedule(self._loop.time() + self.plan.start_deadline_s)
        self._changed(self)

    def _on_status_closed(self, error: Exception | None) -> None:
        if isinstance(error, FrameError | msgspec.DecodeError):
            self._broken = self._broken or f"broke the status protocol: {error}"
            self._end_within(0.0)
        else:
            self._end_within(LINGER_S)

    def _end_within(self, seconds: float) -> None:
        """A child that has failed, or can't be spoken to, must exit by itself, and soon."""
        life = self._life
        if life is not None and self._linger is None and not self._stop_wanted.is_set():
            self._linger = self._loop.call_later(seconds, life.terminate, STOP_GRACE_S)

    def check_sign_of_life(self) -> None:
        """Kill a child that has stopped reporting: it is frozen, and holds the requests that it was given, or memory.

        Children report every two seconds at least. Two checks must find it silent, so that reports which wait in the
        socket while this process itself was stopped are read first.
        """
        life = self._life
        if life is None or self._heard_at is None or self._broken or self.state not in (State.READY, State.ASLEEP):
            return
        silent_s = self._loop.time() - self._heard_at
        if silent_s < self._policy.silence_s:
            return
        if not self._suspected:
            self._suspected = True
            return
        self._broken = f"frozen: no sign of life for {silent_s:.0f} s"
        self._gone()
        life.terminate(0.0)

    def _on_program_end(self) -> None:
        self._ready.clear()
        self._gone()
        self._questions.child_ended()
        self._changed(self)

    def _to(self, state: State) -> None:
        self.state = check(self.state, state)
        if state is not State.READY:
            self._ready.clear()
        self._changed(self)


def _requests_of(figures: Figures | None) -> int:
    """Requests that a worker holds, as it last reported."""
    return figures.running + figures.waiting if isinstance(figures, WorkerFigures) else 0
