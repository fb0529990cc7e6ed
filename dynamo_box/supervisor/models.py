"""The models of a box: which are awake, and the only way to have one sleep or wake.

Everyone (a person, a client, a request that waits, idleness, another model that needs room) asks here. A model does
one thing at a time (`Model.turn`), and who needs room on a device has it to himself until he has it (`_room`), so that
two models can't be promised the same bytes. What goes first when room is short is decided by `plan.awake.make_room`;
how a model gets from one state to another is in `transitions.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from typing import Any

from dynamo_box.errors import BoxError, ExitCode, NotRunning, PlanRefused, TimedOut
from dynamo_box.plan.awake import Room, Standing, make_room, needs_of
from dynamo_box.plan.types import ModelPolicy, Plan
from dynamo_box.protocol import control, status
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.residency import Residency
from dynamo_box.supervisor.acts import FRONTEND
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.model import Model
from dynamo_box.supervisor.model_states import ModelState
from dynamo_box.supervisor.model_words import words
from dynamo_box.supervisor.states import State
from dynamo_box.supervisor.transitions import Transitions

TURN_DRAIN_S = 120.0
"""How long a model may finish what runs when it takes turns with another."""
ROOM_DEADLINE_S = 120.0
MAX_ASKED = 256


class Models:
    """`idle_s(model)` is the time since its last request ended (0 while one runs, None without one so far);
    `stays_down` names workers that a person drained; `emit(level, process, text)` adds to the event list; `changed` is
    called when a Residency did.
    """

    def __init__(
        self,
        plan: Plan,
        children: Mapping[str, Child],
        run_key: str,
        *,
        idle_s: Callable[[str], float | None],
        stays_down: Callable[[], Collection[str]],
        emit: Callable[[str, str | None, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._children = children
        self._idle_s = idle_s
        self._emit = emit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._capacity = {device.id: device.capacity_bytes for device in plan.devices}
        self._models = {model.name: self._known(plan, model.name) for model in plan.models}
        self._transitions = Transitions(children, run_key, stays_down, emit)
        self._room = asyncio.Lock()
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: tuple[int | None, tuple[Residency, ...]] = (None, ())

    def _known(self, plan: Plan, name: str) -> Model:
        policy = plan.policies.get(name, ModelPolicy())
        service = self._children.get(policy.gms)
        return Model(name, policy, needs_of(plan, name), self._workers_of(name), service, self._said)

    def _workers_of(self, name: str) -> tuple[Child, ...]:
        return tuple(child for child in self._children.values() if child.plan.model == name)

    # what is

    def residency(self, name: str) -> Residency:
        """As everyone sees it."""
        return self._models[name].residency

    def residencies(self) -> tuple[Residency, ...]:
        return tuple(model.residency for model in self._models.values())

    def why_not_act(self, worker: Child) -> str:
        """Why a worker can't be restarted or drained now, "" if it can."""
        model = self._models.get(worker.plan.model or "")
        if model is None or model.state in (ModelState.STARTING, ModelState.AWAKE):
            return ""
        return f"is {words(model.state)}; `dynbox wake {model.name}` wakes it"

    def tell_frontends(self) -> None:
        """Send what has changed; everything to a frontend that has just begun."""
        for child in self._children.values():
            if child.plan.kind != FRONTEND or child.pid is None or child.state is State.STARTING:
                continue
            now = (child.pid, self.residencies())
            if now != self._told:
                self._told = now
                child.tell(status.Residencies(now[1]))

    @property
    def asleep(self) -> dict[str, str]:
        """Where the weights of each model are that sleeps."""
        return {model.name: model.said.place for model in self._models.values() if model.state is ModelState.ASLEEP}

    @contextlib.asynccontextmanager
    async def kept_awake(self, name: str) -> AsyncIterator[None]:
        """Meanwhile nobody puts a model to sleep.

        Raises:
            BoxError: no such model, or it isn't awake.
        """
        model = self._model(name)
        if model.state is not ModelState.AWAKE:
            raise BoxError(f"{name} is {words(model.state)}", remedy=f"`dynbox wake {name}` wakes it")
        async with model.turn:
            if (now := model.residency.state) not in ("awake", "unavailable"):
                raise BoxError(f"{name} is {words(ModelState(now))}", remedy=f"`dynbox wake {name}` wakes it")
            yield

    def note_workers(self, plan: Plan) -> None:
        """Workers have come or gone; `plan` has the processes there are now."""
        for model in self._models.values():
            model.workers = self._workers_of(model.name)
            model.needs = needs_of(plan, model.name)
        self._moved.set()

    # start

    def started(self, name: str) -> None:
        """Its workers are ready for the first time."""
        model = self._models[name]
        model.awake_at = self._loop.time()
        model.to(ModelState.AWAKE, place="device" if model.policy.gms else "")

    async def retire(self, name: str) -> None:
        """It has proved itself, and there is no room for it: its first sleep.

        Raises:
            BoxError: it couldn't.
        """
        model = self._models[name]
        async with model.turn:
            await self._transitions.put_to_sleep(model, model.policy.keep, 0.0, fall_back=True)

    # what people and clients ask for

    async def sleep(
        self, name: str, *, to: Place | None, force: bool, hold: bool, drain_s: float
    ) -> control.ModelSlept:
        """Let a model finish and take its weights to a place. Asleep already, it is only moved there.

        Raises:
            BoxError: no such model, or it couldn't: it serves on.
        """
        model = self._model(name)
        place = to or model.policy.keep
        async with model.turn, self._settled(model, ModelState.AWAKE):
            if model.state is ModelState.ASLEEP:
                return await self._transitions.move(model, to or model.said.place or place, hold=hold)
            if model.state is ModelState.STARTING:
                raise BoxError(f"{name} is starting", remedy="wait until `dynbox ps` shows it as ready")
            return await self._transitions.put_to_sleep(model, place, drain_s, force=force, hold=hold)

    async def wake(self, name: str, *, on_demand: bool = False) -> control.ModelWoken:
        """Make room for a model and have it serve again.

        Raises:
            PlanRefused: there is no room, and nobody may go to sleep for it.
            BoxError: no such model, or neither waking nor a cold start worked. On demand also: it is held.
        """
        model = self._model(name)
        asked_at = self._loop.time()
        if model.state is ModelState.AWAKE:
            return control.ModelWoken(0, model.residency, already=True, text=f"{name} is awake already")
        async with self._room, model.turn:
            if model.state is not ModelState.ASLEEP:
                return control.ModelWoken(0, model.residency, already=True, text=f"{name} is awake already")
            if on_demand and model.said.held:
                raise BoxError(f"{name} is held asleep", remedy=f"`dynbox wake {name}` wakes it")
            await self._find_room(model)
            async with self._settled(model, ModelState.ASLEEP):
                return await self._transitions.wake(model, asked_at)

    @contextlib.asynccontextmanager
    async def _settled(self, model: Model, otherwise: ModelState) -> AsyncIterator[None]:
        """Nothing, a bug included, may leave a model half-way: nobody could ever act on it again."""
        try:
            yield
        except Exception:
            if model.state in (ModelState.FALLING_ASLEEP, ModelState.WAKING):
                model.to(otherwise)
            raise

    def asked(self, child: Child, message: status.Asked) -> None:
        """A client, or a request that waits, through a frontend."""
        if len(self._tasks) >= MAX_ASKED:
            child.tell(status.Told(message.id, int(ExitCode.FAILED), f"{MAX_ASKED} sleeps and wakes are under way"))
            return
        self._spawn(self._answer(child, message))

    def tick(self) -> None:
        """Once a second: whoever has been idle for long enough goes to sleep."""
        now = self._loop.time()
        for model in self._models.values():
            ttl_s = model.policy.idle_ttl_s
            if ttl_s is None or model.policy.pin or model.state is not ModelState.AWAKE or model.turn.locked():
                continue
            if now - model.awake_at < max(ttl_s, model.policy.min_awake_s):
                continue
            idle_s = self._used_s(model, now)
            if not self._is_busy(model) and idle_s >= ttl_s:
                self._spawn(self._fall_asleep_idle(model, idle_s))

    async def close(self) -> None:
        """Call off what is under way; the box is about to stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _model(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            raise NotRunning(f"no model is called {name!r}", remedy=f"there are: {', '.join(self._models)}")
        return model

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, child: Child, message: status.Asked) -> None:
        try:
            if message.act == "wake":
                text = (await self.wake(message.model, on_demand=message.on_demand)).text
            else:
                slept = await self.sleep(
                    message.model, to=message.to, force=message.force, hold=message.hold, drain_s=message.drain_s
                )
                text = slept.text
            child.tell(status.Told(message.id, 0, text, residency=self.residency(message.model)))
        except BoxError as error:
            child.tell(status.Told(message.id, int(error.exit_code), error.what, error.remedy or ""))
        except Exception as error:  # noqa: BLE001 - a bug: the client must not wait for ever, and people must see it
            self._emit("error", None, f"{message.act} of {message.model} failed: {error!r}")
            child.tell(status.Told(message.id, int(ExitCode.FAILED), f"{message.act} failed: {error!r}"))

    async def _fall_asleep_idle(self, model: Model, idle_s: float) -> None:
        async with model.turn:
            if model.state is not ModelState.AWAKE or self._is_busy(model):
                return
            self._emit("info", None, f"{model.name} has been idle for {idle_s:.0f} s")
            try:
                await self._transitions.put_to_sleep(model, model.policy.keep, 0.0, fall_back=True)
            except BoxError as error:
                self._emit("warning", None, f"{model.name} can't sleep: {error.what}")

    # waking

    async def _find_room(self, model: Model) -> None:
        """Put others to sleep until it fits.

        Raises:
            PlanRefused: it can't, unless a person acts.
            BoxError: not in time, or one of them didn't go; nothing more than needed was put to sleep.
        """
        deadline = self._loop.time() + ROOM_DEADLINE_S
        while True:
            room = self._room_for(model)
            if room.missing:
                remedy = "put another model to sleep, or unpin one"
                raise PlanRefused(f"there is no room: {room.missing}", remedy=remedy)
            if room.wait_s is None and not room.steps:
                return
            if self._loop.time() >= deadline:
                raise TimedOut(f"no room for {model.name} within {ROOM_DEADLINE_S:g} s")
            if room.wait_s is not None:
                await self._wait_for_change(min(room.wait_s + 0.01, deadline - self._loop.time()))
                continue
            for step in room.steps:
                await self._carry_out(step.model, step.to, step.reason)

    async def _carry_out(self, name: str, to: str, reason: str) -> None:
        victim = self._models[name]
        place: Place = "disk" if to == "disk" else "host" if to == "host" else "device"
        async with victim.turn:
            if victim.state is ModelState.ASLEEP and place != "device":
                await self._transitions.make_way(victim, place)
            elif victim.state is ModelState.AWAKE:
                self._emit("info", None, f"{name} {reason}")
                await self._transitions.put_to_sleep(victim, place, TURN_DRAIN_S, fall_back=True)

    def _room_for(self, model: Model) -> Room:
        now = self._loop.time()
        others = [self._standing(one, now) for one in self._models.values() if one is not model]
        return make_room(self._standing(model, now), others, self._capacity)

    def _standing(self, model: Model, now: float) -> Standing:
        moving = model.state in (ModelState.FALLING_ASLEEP, ModelState.WAKING, ModelState.STARTING)
        asleep = model.state is ModelState.ASLEEP
        return Standing(
            name=model.name,
            needs=model.needs,
            state="moving" if moving else "asleep" if asleep else "awake",
            place=model.said.place,
            keep=model.policy.keep if model.policy.gms else "host",
            pin=model.policy.pin,
            busy=self._is_busy(model),
            used_s=self._used_s(model, now),
            awake_s=now - model.awake_at,
            min_awake_s=model.policy.min_awake_s,
        )

    # what is looked at

    def _is_busy(self, model: Model) -> bool:
        frontends = (child.figures for child in self._children.values() if isinstance(child.figures, FrontendFigures))
        waiting = any(request.model == model.name for figures in frontends for request in figures.live)
        return waiting or model.runs

    def _used_s(self, model: Model, now: float) -> float:
        """Since its last request ended, or since it woke if there has been none."""
        idle_s = self._idle_s(model.name)
        awake_s = now - model.awake_at
        return awake_s if idle_s is None else min(idle_s, awake_s)

    async def _wait_for_change(self, timeout_s: float) -> None:
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()

    def note_change(self) -> None:
        """Something that a waiting decision may depend on has changed."""
        self._moved.set()

    def _said(self) -> None:
        """Something else is said of a model."""
        self._moved.set()
        self.tell_frontends()
        self._changed()
