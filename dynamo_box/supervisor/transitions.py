"""How one model falls asleep, moves and wakes: workers, weights and what is said of it, in step.

Whoever calls has the model's turn; whether it should sleep or wake is decided elsewhere (`models.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.profile.units import format_size
from dynamo_box.protocol import control, status
from dynamo_box.protocol.gms import Place
from dynamo_box.supervisor import meter, model_words, model_workers
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.freed import freed_between
from dynamo_box.supervisor.model import Model
from dynamo_box.supervisor.model_states import ModelState

MOVE_DEADLINE_S = 300.0


class NoMemory(BoxError):
    """There may be some later."""


class Transitions:
    """`children` by name; `stays_down` names workers that a person drained; `emit` as of `Models`."""

    def __init__(
        self,
        children: Mapping[str, Child],
        run_key: str,
        stays_down: Callable[[], Collection[str]],
        emit: Callable[[str, str | None, str], None],
    ) -> None:
        self._children = children
        self._run_key = run_key
        self._stays_down = stays_down
        self._emit = emit
        self._loop = asyncio.get_running_loop()

    # falling asleep

    async def put_to_sleep(
        self,
        model: Model,
        to: Place,
        drain_s: float,
        *,
        force: bool = False,
        hold: bool = False,
        fall_back: bool = False,
    ) -> control.ModelSlept:
        """From awake to asleep, measured. `fall_back`: to disk where host memory is short.

        Raises:
            BoxError: it couldn't, and serves on; or it sleeps, but its weights are where they were.
        """
        began = self._loop.time()
        to = self._possible_place(model, to, fall_back=fall_back)
        before = await self._read_memory()
        was = model.state
        model.to(ModelState.FALLING_ASLEEP, phase="finishing requests")
        try:
            slept = await model_workers.rest(
                model.workers,
                drain_s,
                why_cancelled=f"cancelled: {model.name} was put to sleep by force" if force else "",
                engine_sleeps=bool(model.policy.gms),
            )
        except BoxError as error:
            model.to(ModelState.AWAKE, since=model.said.since if was is ModelState.AWAKE else None)
            self._emit("warning", None, f"{model.name} stays awake: {error.what}")
            raise
        phases = {"drain": self._loop.time() - began}
        phases.update(model_workers.slowest([one.phases for one in slept.values()]))
        model.asleep_at = self._loop.time()
        expected = dict.fromkeys(model.needs.awake, 0)
        for worker, answer in slept.items():
            device = worker.plan.device or "cpu"
            expected[device] = expected.get(device, 0) + answer.kv_bytes
        place: Place | str = "device" if model.policy.gms else ""
        problem: BoxError | None = None
        if model.policy.gms and to != "device":
            model.say(phase=f"moving weights to {to}")
            try:
                moved = await self._move_weights(model, to)
                phases.update(moved.phases)
                place = to
                _expect_weights(expected, before, model)
            except BoxError as error:
                problem = error
        phases["total"] = self._loop.time() - began
        model.to(
            ModelState.ASLEEP,
            place=place,
            held=hold,
            sleeps=model.said.sleeps + 1,
            sleep_phases=_rounded(phases),
        )
        freed = await self._measure(model, before, expected, moved=place in ("host", "disk"))
        text = model_words.slept(model, place, freed, phases["total"])
        self._emit("warning" if problem or any(one.fell_short for one in freed) else "info", None, text)
        if problem is not None:
            raise BoxError(
                f"{model.name} sleeps, but its weights are still on the device: {problem.what}",
                remedy=problem.remedy
                or f"{'once that is mended, ' if to == 'disk' else ''}`dynbox sleep {model.name} --to disk`",
            )
        return control.ModelSlept(0, model.residency, freed, text=text)

    async def move(self, model: Model, to: Place | str, *, hold: bool) -> control.ModelSlept:
        """It sleeps already: only its weights may go elsewhere.

        Raises:
            BoxError: they can't; it sleeps as it was.
        """
        place = model.said.place
        if hold and not model.said.held:
            model.say(held=True)
        if not model.policy.gms or to == place or to == "":
            return control.ModelSlept(0, model.residency, already=True, text=model_words.already_asleep(model))
        if to == "device":
            raise BoxError(
                f"{model.name} sleeps in {place}; weights go back to the device when it wakes",
                remedy=f"`dynbox wake {model.name}`",
            )
        target = self._possible_place(model, "host" if to == "host" else "disk", fall_back=False)
        before = await self._read_memory()
        began = self._loop.time()
        await self._move_weights(model, target)
        expected: dict[str, int] = {}
        _expect_weights(expected, before, model)
        model.say(place=target)
        freed = await self._measure(model, before, expected, moved=True)
        text = model_words.slept(model, target, freed, self._loop.time() - began)
        self._emit("info", None, text)
        return control.ModelSlept(0, model.residency, freed, text=text)

    async def make_way(self, model: Model, to: Place) -> None:
        """Weights of a model that sleeps go off its device, for another model.

        Raises:
            BoxError: they can't.
        """
        place = self._possible_place(model, to, fall_back=True)
        await self._move_weights(model, place)
        model.say(place=place)

    def _possible_place(self, model: Model, to: Place, *, fall_back: bool) -> Place:
        """Raises BoxError where host memory is short, unless disk will do."""
        layout, figures = model.layout, model.service_figures
        if to != "host" or layout is None or figures is None:
            return to
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

    async def _move_weights(self, model: Model, place: Place) -> status.Moved:
        """
        Raises:
            NoMemory: its weights are where they were.
            BoxError: they are where they were, or lost (then the service has forgotten them).
        """
        assert model.service is not None
        try:
            moved = await self._moved_by(model.service, model.name, place)
        except NotRunning:  # it has just died: what was committed is its successor's, as it was
            moved = await self._moved_by(model.service, model.name, place)
        if moved.error:
            holders = f" (held by {', '.join(moved.holders)})" if moved.holders else ""
            raise (NoMemory if moved.no_room else BoxError)(f"{moved.error}{holders}")
        return moved

    async def _moved_by(self, service: Child, layout: str, place: Place) -> status.Moved:
        """
        Raises:
            NotRunning: the service ended before it answered.
            BoxError: it won't come back, or is silent.
        """
        await service.wait_ready()
        return await service.move(lambda number: status.Move(number, layout, place), MOVE_DEADLINE_S)

    async def _read_memory(self) -> meter.Reading:
        workers = [
            (child.pid, child.plan.device)
            for child in self._children.values()
            if child.pid is not None and child.plan.device == "cpu"
        ]
        return await asyncio.to_thread(meter.read, self._run_key, workers)

    async def _measure(
        self, model: Model, before: meter.Reading, expected: Mapping[str, int], *, moved: bool
    ) -> tuple[control.Freed, ...]:
        after = await self._read_memory()
        return freed_between(before, after, expected, layout=model.name if moved else None)

    # waking

    async def wake(self, model: Model, asked_at: float) -> control.ModelWoken:
        """From asleep to awake; by a cold start if it can't wake.

        Raises:
            NoMemory: there is none for its weights, nor would there be any for a cold start; it sleeps on.
            BoxError: the cold start failed too.
        """
        began = self._loop.time()
        slept_s, slept_since = began - model.asleep_at, model.said.since
        phases: dict[str, float] = {}
        if began - asked_at > 0.001:
            phases["room"] = began - asked_at
        place = model.said.place
        model.to(ModelState.WAKING, phase="restoring weights" if place in ("host", "disk") else "mapping weights")
        reason = ""
        try:
            if model.policy.gms and place in ("host", "disk"):
                moved = await self._move_weights(model, "device")
                phases["restore"] = sum(moved.phases.values())
                model.say(phase="mapping weights")
            phases.update(await model_workers.wake(model.workers, self._stays_down()))
        except NoMemory as error:
            self._emit("warning", None, f"{model.name} can't wake now and sleeps on: {error.what}")
            model.to(ModelState.ASLEEP, since=slept_since)
            raise
        except BoxError as error:
            reason = error.what
        if reason:
            self._emit("warning", None, f"{model.name} can't wake ({reason}): cold start")
            model.say(phase="cold start")
            cold_began = self._loop.time()
            try:
                await model_workers.start_cold(model.workers, self._stays_down())
            except BoxError as error:
                model.to(ModelState.AWAKE, place="", note=f"{reason}; then {error.what}", held=False)
                raise
            phases["cold start"] = self._loop.time() - cold_began
        phases["total"] = self._loop.time() - asked_at
        model.awake_at = self._loop.time()
        model.to(
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
        text = model_words.woken(model, phases, reason)
        self._emit("info", None, text)
        return control.ModelWoken(0, model.residency, text=text)


def _expect_weights(expected: dict[str, int], before: meter.Reading, model: Model) -> None:
    """Add what the model's weights took on each device."""
    for one in before.of_layout(model.name).values():
        expected[one.device] = expected.get(one.device, 0) + one.bytes


def _rounded(phases: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 5) for name, seconds in phases.items()}
