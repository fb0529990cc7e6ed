"""The models of a box: where each one's weights are, and the only way they get elsewhere.

Everyone (a person, a client, a request that waits, idleness, another model that needs room) asks here. A model does
one thing at a time (`_Model.turn`), and who needs room on a device has it to himself until he has it
(`_room`), so that two models can't be promised the same bytes. What goes first when room is short is decided by
`plan.awake.make_room`; what is and what was said is in `Residency`, which this is the one writer of.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from dynamo_box.errors import BoxError, ExitCode, NotRunning, PlanRefused, TimedOut
from dynamo_box.plan.awake import Needs, Room, Standing, make_room, needs_of
from dynamo_box.plan.types import ModelPolicy, Plan
from dynamo_box.profile.units import format_size
from dynamo_box.protocol import control, status
from dynamo_box.protocol.figures import FrontendFigures, GmsFigures, LayoutFigures, WorkerFigures
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.residency import Residency
from dynamo_box.supervisor import meter
from dynamo_box.supervisor.acts import FRONTEND
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.model_states import ModelState, check
from dynamo_box.supervisor.states import State
from dynamo_box.wording import size

MOVE_DEADLINE_S = 300.0
WAKE_DEADLINE_S = 60.0
TURN_DRAIN_S = 120.0
"""How long a model may finish what runs when it takes turns with another."""
ROOM_DEADLINE_S = 120.0
MAX_ASKED = 256
SHORTFALL_BYTES = 16 << 20
SHORTFALL_SHARE = 0.02
"""What may be missing of what was to be freed before it counts: allocators keep some."""


class _Model:
    """Known of one model. Times are the loop's; `since` is Unix time."""

    def __init__(self, name: str, policy: ModelPolicy, needs: Needs, workers: Sequence[Child]) -> None:
        self.name = name
        self.policy = policy
        self.needs = needs
        self.workers = tuple(workers)
        self.turn = asyncio.Lock()
        self.awake_at = 0.0
        self.asleep_at = 0.0
        self.said = Residency(
            model=name,
            since=time.time(),
            engine_sleeps=bool(policy.gms),
            keep=policy.keep,
            pin=policy.pin,
            idle_ttl_s=policy.idle_ttl_s,
            min_awake_s=policy.min_awake_s,
        )

    @property
    def state(self) -> ModelState:
        return ModelState(self.said.state)

    @property
    def is_up(self) -> bool:
        return any(worker.is_ready for worker in self.workers)


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
        self._run_key = run_key
        self._idle_s = idle_s
        self._stays_down = stays_down
        self._emit = emit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._capacity = {device.id: device.capacity_bytes for device in plan.devices}
        self._models = {
            model.name: _Model(
                model.name,
                plan.policies.get(model.name, ModelPolicy()),
                needs_of(plan, model.name),
                [child for child in children.values() if child.plan.model == model.name],
            )
            for model in plan.models
        }
        self._room = asyncio.Lock()
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: tuple[int | None, tuple[Residency, ...]] = (None, ())

    # what is

    def residency(self, name: str) -> Residency:
        """As everyone sees it."""
        model = self._models[name]
        weights = self._layout(model)
        bytes_ = weights.bytes if weights is not None and weights.bytes else None
        said = msgspec.structs.replace(model.said, weights_bytes=bytes_)
        if model.state is ModelState.AWAKE and not model.is_up:
            return msgspec.structs.replace(said, state="unavailable")
        return said

    def residencies(self) -> tuple[Residency, ...]:
        return tuple(self.residency(name) for name in self._models)

    def why_not_act(self, worker: Child) -> str:
        """Why a worker can't be restarted or drained now, "" if it can."""
        model = self._models.get(worker.plan.model or "")
        if model is None or model.state in (ModelState.STARTING, ModelState.AWAKE):
            return ""
        return f"is {_words(model.state)}; `dynbox wake {model.name}` wakes it"

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
            raise BoxError(f"{name} is {_words(model.state)}", remedy=f"`dynbox wake {name}` wakes it")
        async with model.turn:
            if (now := self.residency(name).state) not in ("awake", "unavailable"):
                raise BoxError(f"{name} is {_words(ModelState(now))}", remedy=f"`dynbox wake {name}` wakes it")
            yield

    def note_workers(self, plan: Plan) -> None:
        """Workers have come or gone; `plan` has the processes there are now."""
        for model in self._models.values():
            model.workers = tuple(child for child in self._children.values() if child.plan.model == model.name)
            model.needs = needs_of(plan, model.name)
        self._moved.set()

    # start

    def started(self, name: str) -> None:
        """Its workers are ready for the first time."""
        model = self._models[name]
        model.awake_at = self._loop.time()
        self._to(model, ModelState.AWAKE, place="device" if model.policy.gms else "")

    async def retire(self, name: str) -> None:
        """It has proved itself, and there is no room for it: its first sleep.

        Raises:
            BoxError: it couldn't.
        """
        model = self._models[name]
        async with model.turn:
            await self._put_to_sleep(model, model.policy.keep, 0.0, force=False, hold=False, fall_back=True)

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
                return await self._move_asleep(model, to or model.said.place or place, hold=hold)
            if model.state is ModelState.STARTING:
                raise BoxError(f"{name} is starting", remedy="wait until `dynbox ps` shows it as ready")
            return await self._put_to_sleep(model, place, drain_s, force=force, hold=hold)

    async def wake(self, name: str, *, on_demand: bool = False) -> control.ModelWoken:
        """Make room for a model and have it serve again.

        Raises:
            PlanRefused: there is no room, and nobody may go to sleep for it.
            BoxError: no such model, or neither waking nor a cold start worked. On demand also: it is held.
        """
        model = self._model(name)
        asked_at = self._loop.time()
        if model.state is ModelState.AWAKE:
            return control.ModelWoken(0, self.residency(name), already=True, text=f"{name} is awake already")
        async with self._room, model.turn:
            if model.state is not ModelState.ASLEEP:
                return control.ModelWoken(0, self.residency(name), already=True, text=f"{name} is awake already")
            if on_demand and model.said.held:
                raise BoxError(f"{name} is held asleep", remedy=f"`dynbox wake {name}` wakes it")
            await self._find_room(model)
            async with self._settled(model, ModelState.ASLEEP):
                return await self._wake(model, asked_at)

    @contextlib.asynccontextmanager
    async def _settled(self, model: _Model, otherwise: ModelState) -> AsyncIterator[None]:
        """Nothing, a bug included, may leave a model half-way: nobody could ever act on it again."""
        try:
            yield
        except Exception:
            if model.state in (ModelState.FALLING_ASLEEP, ModelState.WAKING):
                self._to(model, otherwise)
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

    def _model(self, name: str) -> _Model:
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

    async def _fall_asleep_idle(self, model: _Model, idle_s: float) -> None:
        async with model.turn:
            if model.state is not ModelState.AWAKE or self._is_busy(model):
                return
            self._emit("info", None, f"{model.name} has been idle for {idle_s:.0f} s")
            try:
                await self._put_to_sleep(model, model.policy.keep, 0.0, force=False, hold=False, fall_back=True)
            except BoxError as error:
                self._emit("warning", None, f"{model.name} can't sleep: {error.what}")

    # falling asleep

    async def _put_to_sleep(
        self, model: _Model, to: Place, drain_s: float, *, force: bool, hold: bool, fall_back: bool = False
    ) -> control.ModelSlept:
        """From awake to asleep, measured. `fall_back`: to disk where host memory is short."""
        began = self._loop.time()
        to = self._possible_place(model, to, fall_back=fall_back)
        before = await self._read_memory()
        was = model.state
        self._to(model, ModelState.FALLING_ASLEEP, phase="finishing requests")
        try:
            slept = await self._quiet(model, drain_s, force=force)
        except BoxError as error:
            self._to(model, ModelState.AWAKE, since=model.said.since if was is ModelState.AWAKE else None)
            self._emit("warning", None, f"{model.name} stays awake: {error.what}")
            raise
        phases = {"drain": self._loop.time() - began, **_sum_phases(slept)}
        model.asleep_at = self._loop.time()
        expected = dict.fromkeys(model.needs.awake, 0)
        for worker, answer in slept.items():
            device = worker.plan.device or "cpu"
            expected[device] = expected.get(device, 0) + answer.kv_bytes
        place: Place | str = "device" if model.policy.gms else ""
        problem: BoxError | None = None
        if model.policy.gms and to != "device":
            weights = before.of_layout(model.name)
            self._phase(model, f"moving weights to {to}")
            try:
                moved = await self._move(model, to)
                phases.update(moved.phases)
                place = to
                for one in weights.values():
                    expected[one.device] = expected.get(one.device, 0) + one.bytes
            except BoxError as error:
                problem = error
        phases["total"] = self._loop.time() - began
        self._to(
            model,
            ModelState.ASLEEP,
            place=place,
            held=hold,
            sleeps=model.said.sleeps + 1,
            sleep_phases=_rounded(phases),
        )
        freed = await self._measure(model, before, expected, moved=place in ("host", "disk"))
        text = _slept_text(model, place, freed, phases["total"])
        self._emit("warning" if problem or any(one.fell_short for one in freed) else "info", None, text)
        if problem is not None:
            raise BoxError(
                f"{model.name} sleeps, but its weights are still on the device: {problem.what}",
                remedy=problem.remedy or f"`dynbox sleep {model.name} --to disk`",
            )
        return control.ModelSlept(0, self.residency(model.name), freed, text=text)

    def _possible_place(self, model: _Model, to: Place, *, fall_back: bool) -> Place:
        """Raises BoxError where host memory is short, unless disk will do."""
        service = self._service(model)
        layout = self._layout(model)
        if to != "host" or service is None or layout is None or not isinstance(service.figures, GmsFigures):
            return to
        figures = service.figures
        free = figures.host_capacity_bytes - figures.host_bytes
        if layout.bytes <= free:
            return to
        if fall_back:
            self._emit("warning", None, f"host memory has no room for {model.name}'s weights: they go to disk")
            return "disk"
        raise BoxError(
            f"{model.name}'s weights take {format_size(layout.bytes)}, and {format_size(max(free, 0))} of the "
            f"{format_size(figures.host_capacity_bytes)} for sleeping weights in host memory are free",
            remedy=f"`dynbox sleep {model.name} --to disk`",
        )

    async def _quiet(self, model: _Model, drain_s: float, *, force: bool) -> dict[Child, status.Slept]:
        """Bring all its workers to rest, or none: asleep, or stopped where the engine can't sleep.

        Raises:
            BoxError: requests still run; all serve on.
        """
        why = f"cancelled: {model.name} was put to sleep by force" if force else ""
        ready = [worker for worker in model.workers if worker.is_ready]
        outcomes = await asyncio.gather(
            *(worker.sleep(drain_s, force=force, why=why) for worker in ready), return_exceptions=True
        )
        slept: dict[Child, status.Slept] = {}
        problem: BoxError | None = None
        for worker, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, status.Slept) and not outcome.error:
                slept[worker] = outcome
            elif isinstance(outcome, status.Slept):
                problem = TimedOut(
                    f"{worker.name}: {outcome.error}",
                    remedy="wait longer with --drain SECONDS, or cancel them with --force",
                )
            elif isinstance(outcome, NotRunning | TimedOut):
                continue  # it is dead or dying: nothing of it is left to sleep
            elif isinstance(outcome, BaseException):
                raise outcome
        if problem is not None:
            await asyncio.gather(*(worker.wake(WAKE_DEADLINE_S) for worker in slept), return_exceptions=True)
            raise problem
        if not model.policy.gms:
            await asyncio.gather(*(worker.stop(0) for worker in model.workers if worker.state is not State.FATAL))
            return {}
        await asyncio.gather(*(worker.stop(0) for worker in self._not_asleep(model)))
        return slept

    def _not_asleep(self, model: _Model) -> list[Child]:
        """Workers on their way up or down: waking starts them anew."""
        at_rest = (State.ASLEEP, State.STOPPED, State.PLANNED, State.FATAL)
        return [worker for worker in model.workers if worker.state not in at_rest]

    async def _move_asleep(self, model: _Model, to: Place | str, *, hold: bool) -> control.ModelSlept:
        """It sleeps already: only its weights may go elsewhere."""
        place = model.said.place
        if hold and not model.said.held:
            self._say(model, held=True)
        if not model.policy.gms or to == place or to == "":
            return control.ModelSlept(0, self.residency(model.name), already=True, text=_already(model))
        if to == "device":
            raise BoxError(
                f"{model.name} sleeps in {place}; weights go back to the device when it wakes",
                remedy=f"`dynbox wake {model.name}`",
            )
        target: Place = "host" if to == "host" else "disk"
        target = self._possible_place(model, target, fall_back=False)
        before = await self._read_memory()
        weights = before.of_layout(model.name)
        began = self._loop.time()
        await self._move(model, target)
        expected: dict[str, int] = {}
        for one in weights.values():
            expected[one.device] = expected.get(one.device, 0) + one.bytes
        self._say(model, place=target)
        freed = await self._measure(model, before, expected, moved=True)
        text = _slept_text(model, target, freed, self._loop.time() - began)
        self._emit("info", None, text)
        return control.ModelSlept(0, self.residency(model.name), freed, text=text)

    async def _move(self, model: _Model, place: Place) -> status.Moved:
        """Raises BoxError: its weights are where they were, or lost (then the service has forgotten them)."""
        service = self._children[model.policy.gms]
        await service.wait_ready()
        moved = await service.move(lambda number: status.Move(number, model.name, place), MOVE_DEADLINE_S)
        if moved.error:
            holders = f" (held by {', '.join(moved.holders)})" if moved.holders else ""
            raise BoxError(f"{moved.error}{holders}", details=("lost",) if moved.lost else ())
        return moved

    # waking

    async def _find_room(self, model: _Model) -> None:
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
                place = self._possible_place(victim, place, fall_back=True)
                await self._move(victim, place)
                self._say(victim, place=place)
            elif victim.state is ModelState.AWAKE:
                self._emit("info", None, f"{name} {reason}")
                await self._put_to_sleep(victim, place, TURN_DRAIN_S, force=False, hold=False, fall_back=True)

    def _room_for(self, model: _Model) -> Room:
        now = self._loop.time()
        others = [self._standing(one, now) for one in self._models.values() if one is not model]
        return make_room(self._standing(model, now), others, self._capacity)

    def _standing(self, model: _Model, now: float) -> Standing:
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

    async def _wake(self, model: _Model, asked_at: float) -> control.ModelWoken:
        began = self._loop.time()
        slept_s = began - model.asleep_at
        phases: dict[str, float] = {}
        if began - asked_at > 0.001:
            phases["room"] = began - asked_at
        place = model.said.place
        self._to(
            model, ModelState.WAKING, phase="restoring weights" if place in ("host", "disk") else "mapping weights"
        )
        reason = ""
        try:
            if model.policy.gms and place in ("host", "disk"):
                moved = await self._move(model, "device")
                phases["restore"] = sum(moved.phases.values())
                self._phase(model, "mapping weights")
            phases.update(await self._wake_workers(model))
        except BoxError as error:
            reason = error.what
        if reason:
            self._emit("warning", None, f"{model.name} can't wake ({reason}): cold start")
            self._phase(model, "cold start")
            cold_began = self._loop.time()
            try:
                await self._start_cold(model)
            except BoxError as error:
                self._to(model, ModelState.AWAKE, place="", note=f"{reason}; then {error.what}", held=False)
                raise
            phases["cold start"] = self._loop.time() - cold_began
        phases["total"] = self._loop.time() - asked_at
        model.awake_at = self._loop.time()
        self._to(
            model,
            ModelState.AWAKE,
            place="device" if model.policy.gms else "",
            held=False,
            wakes=model.said.wakes + 1,
            cold_wakes=model.said.cold_wakes + bool(reason),
            cold=bool(reason),
            note=reason,
            slept_s=round(model.said.slept_s + slept_s, 3),
            wake_phases=_rounded(phases),
        )
        text = _woken_text(model, phases, reason)
        self._emit("info", None, text)
        return control.ModelWoken(0, self.residency(model.name), text=text)

    async def _wake_workers(self, model: _Model) -> dict[str, float]:
        """Those that sleep wake, those that were stopped start; the phases of the slowest.

        Raises:
            BoxError: one of those that slept couldn't wake.
        """
        asleep = [worker for worker in model.workers if worker.state is State.ASLEEP]
        down = [
            worker
            for worker in model.workers
            if worker.state in (State.STOPPED, State.PLANNED, State.FATAL) and worker.name not in self._stays_down()
        ]
        for worker in down:
            worker.start()
        outcomes = await asyncio.gather(
            *(self._wake_worker(worker) for worker in asleep),
            *(self._started_in(worker) for worker in down),
            return_exceptions=True,
        )
        failed = next((one for one in outcomes if isinstance(one, BaseException)), None)
        if failed is not None:
            raise failed
        slowest = max((one for one in outcomes if isinstance(one, dict)), key=lambda one: sum(one.values()), default={})
        return dict(slowest)

    async def _wake_worker(self, worker: Child) -> dict[str, float]:
        woken = await worker.wake(WAKE_DEADLINE_S)
        if woken.error:
            raise BoxError(f"{worker.name}: {woken.error}")
        return woken.phases

    async def _started_in(self, worker: Child) -> dict[str, float]:
        began = self._loop.time()
        await worker.wait_ready()
        return {"start": self._loop.time() - began}

    async def _start_cold(self, model: _Model) -> None:
        """All its workers anew; they map what is committed, or load from the model's source.

        Raises:
            BoxError: one was given up.
        """
        workers = [worker for worker in model.workers if worker.name not in self._stays_down()]
        await asyncio.gather(*(worker.stop(0) for worker in workers))
        for worker in workers:
            worker.start()
        for worker in workers:
            await worker.wait_ready()

    # what is looked at

    def _service(self, model: _Model) -> Child | None:
        return self._children.get(model.policy.gms)

    def _layout(self, model: _Model) -> LayoutFigures | None:
        service = self._service(model)
        if service is None or not isinstance(service.figures, GmsFigures):
            return None
        return next((one for one in service.figures.layouts if one.name == model.name), None)

    def _runs(self, model: _Model) -> bool:
        """Something runs or waits on its workers, by what they last reported."""
        return any(
            isinstance(worker.figures, WorkerFigures) and worker.figures.running + worker.figures.waiting > 0
            for worker in model.workers
        )

    def _is_busy(self, model: _Model) -> bool:
        frontends = (child.figures for child in self._children.values() if isinstance(child.figures, FrontendFigures))
        waiting = any(request.model == model.name for figures in frontends for request in figures.live)
        return waiting or self._runs(model)

    def _used_s(self, model: _Model, now: float) -> float:
        """Since its last request ended, or since it woke if there has been none."""
        idle_s = self._idle_s(model.name)
        awake_s = now - model.awake_at
        return awake_s if idle_s is None else min(idle_s, awake_s)

    async def _read_memory(self) -> meter.Reading:
        workers = [
            (child.pid, child.plan.device)
            for child in self._children.values()
            if child.pid is not None and child.plan.device == "cpu"
        ]
        return await asyncio.to_thread(meter.read, self._run_key, workers)

    async def _measure(
        self, model: _Model, before: meter.Reading, expected: Mapping[str, int], *, moved: bool
    ) -> tuple[control.Freed, ...]:
        """What each device gave back since `before`; who still holds weights that were to go is named."""
        after = await self._read_memory()
        found = []
        for device, wanted in expected.items():
            freed = before.on_device(device) - after.on_device(device)
            holders: dict[str, None] = {}
            if moved:
                for inode, one in before.of_layout(model.name).items():
                    if one.device == device and inode in after.files:
                        holders.update(dict.fromkeys(meter.who(pid) for pid in sorted(after.files[inode].holders)))
            if not holders and wanted - freed > max(SHORTFALL_BYTES, int(wanted * SHORTFALL_SHARE)):
                holders["nobody that can be seen"] = None
            found.append(control.Freed(device, wanted, max(freed, 0), tuple(holders)))
        return tuple(found)

    async def _wait_for_change(self, timeout_s: float) -> None:
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()

    def note_change(self) -> None:
        """Something that a waiting decision may depend on has changed."""
        self._moved.set()

    # what is said

    def _to(self, model: _Model, state: ModelState, *, since: float | None = None, **more: Any) -> None:
        check(model.state, state)
        if more.get("phase") is None:
            more["phase"] = ""
        self._say(model, state=str(state), since=time.time() if since is None else since, **more)

    def _phase(self, model: _Model, phase: str) -> None:
        self._say(model, phase=phase)

    def _say(self, model: _Model, **changes: Any) -> None:
        model.said = msgspec.structs.replace(model.said, **changes)
        self._moved.set()
        self.tell_frontends()
        self._changed()


def _sum_phases(slept: Mapping[Child, status.Slept]) -> dict[str, float]:
    """Of the slowest worker."""
    return max((dict(one.phases) for one in slept.values()), key=lambda one: sum(one.values()), default={})


def _rounded(phases: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 5) for name, seconds in phases.items()}


def _words(state: ModelState) -> str:
    return str(state).replace("_", " ")


def _already(model: _Model) -> str:
    where = f" in {model.said.place}" if model.said.place else ""
    return f"{model.name} sleeps{where} already"


def _slept_text(model: _Model, place: str, freed: Sequence[control.Freed], took_s: float) -> str:
    if not model.policy.gms:
        return f"{model.name}: its engine can't sleep, so its workers were stopped in {took_s:.2f} s"
    where = {"device": "with its weights on the device", "host": "in host memory", "disk": "on disk"}[place]
    parts = ", ".join(_freed_text(one) for one in freed)
    return f"{model.name} sleeps {where}: {parts} in {took_s:.2f} s"


def _freed_text(freed: control.Freed) -> str:
    text = f"{freed.device} freed {size(freed.freed_bytes)} of {size(freed.expected_bytes)}"
    return f"{text} (still held by {', '.join(freed.holders)})" if freed.fell_short else text


def _woken_text(model: _Model, phases: Mapping[str, float], reason: str) -> str:
    parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in phases.items() if name != "total")
    cold = f"; a cold start: {reason}" if reason else ""
    return f"{model.name} is awake after {phases['total']:.2f} s ({parts}){cold}"
