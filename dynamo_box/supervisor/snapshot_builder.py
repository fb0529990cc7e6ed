"""The one place where the box's state becomes the value that everyone sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from dynamo_box.plan.cores import crowding
from dynamo_box.plan.types import Plan
from dynamo_box.protocol.figures import FrontendFigures, RouterFigures, WorkerFigures
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.spec import ModelSpec, RouterSpec
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, DeviceInfo, EventInfo, ModelInfo, ProcessInfo, Targets
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.devices import DeviceSampler


class SnapshotBuilder:
    """Knows what was planned, and when a model's last request ended in an earlier life of the frontend."""

    def __init__(self, plan: Plan, children: Mapping[str, Child], sampler: DeviceSampler) -> None:
        self._plan = plan
        self._by_name = children
        self._sampler = sampler
        self._planned = _planned_devices(plan)
        self._last_ended: dict[str, float] = {}
        self.residency: Callable[[str], Residency | None] = lambda _model: None

    @property
    def _children(self) -> tuple[Child, ...]:
        return tuple(self._by_name.values())

    def note_workers(self, plan: Plan) -> None:
        """Workers have come or gone; `plan` has the processes there are now."""
        self._planned = _planned_devices(plan)

    def idle_s(self, model: str) -> float | None:
        """Seconds since its last request ended: 0 while one runs, None if there has been none."""
        self._note_endings()
        return _idle_s(model, self._children, self._last_ended.get(model), time.time())

    def build(self, box: BoxInfo, events: tuple[EventInfo, ...], loop_time: float) -> BoxSnapshot:
        """`loop_time` is the event loop's clock, which children's times are in."""
        now = time.time()
        host = self._sampler.host
        self._note_endings()
        return BoxSnapshot(
            box=box,
            models=tuple(
                model_info(
                    model,
                    box.state,
                    self._children,
                    self._last_ended.get(model.name),
                    now,
                    self.residency(model.name),
                    self._plan.targets.get(model.name, NO_TARGETS),
                )
                for model in self._plan.models
            ),
            processes=tuple(_process_info(child, loop_time) for child in self._children),
            devices=self.devices(),
            events=events,
            at=now,
            host=None if host is None else host.figures,
            host_memory_bytes=None if host is None else host.memory_bytes,
            disks=self._sampler.disks,
        )

    def devices(self) -> tuple[DeviceInfo, ...]:
        """What was planned, with what each device says now."""
        return tuple(
            msgspec.structs.replace(
                device, figures=self._sampler.figures(device.id), note=self._crowded() if device.kind == "cpu" else ""
            )
            for device in self._planned
        )

    def _crowded(self) -> str:
        states = {model.name: self.residency(model.name) for model in self._plan.models}
        asleep = {name for name, residency in states.items() if residency and residency.state == "asleep"}
        return crowding(self._plan, [child.plan for child in self._children], asleep)

    def _note_endings(self) -> None:
        for child in self._children:
            if isinstance(child.figures, FrontendFigures):
                self._last_ended.update(child.figures.last_ended)


AUXILIARY = frozenset({"gms", "kvstore"})
"""Models are reached without these."""
NO_TARGETS = Targets()
SLEEP_STATES = ("falling_asleep", "asleep", "waking")


def model_info(
    model: ModelSpec,
    box_state: str,
    children: Sequence[Child],
    last_ended: float | None,
    now: float,
    residency: Residency | None = None,
    targets: Targets = NO_TARGETS,
) -> ModelInfo:
    """A model is ready when it has workers for all that requests need, and a router and a frontend are there to reach
    them; services of weight memory and KV tiers aren't needed for that. `last_ended` (of its last request) and `now`
    are Unix time.
    """
    workers = [child for child in children if child.plan.model == model.name]
    ready = [child for child in workers if child.is_ready]
    others = [child for child in children if child.plan.model is None and child.plan.kind not in AUXILIARY]
    whole = _is_served(ready, _policy(children)) and all(child.is_ready for child in others)
    if residency is not None and residency.state in SLEEP_STATES:
        state = str(residency.state)
    elif box_state == "starting":
        state = "starting"
    else:
        state = "ready" if whole and box_state in ("ready", "degraded") else "unavailable"
    idle_s = _idle_s(model.name, children, last_ended, now)
    return ModelInfo(model.name, state, model.path, len(ready), len(workers), idle_s, residency, targets)


def _is_served(ready: Sequence[Child], policy: str) -> bool:
    """Any worker serves whole requests, whatever its role, unless the policy is strict: then prefill or decode workers
    need somebody beside them for the other leg.
    """
    roles = [child.plan.role for child in ready]
    if policy != "strict" or not {"prefill", "decode"} & set(roles):
        return bool(ready)
    return len(ready) > 1 and any(role != "decode" for role in roles) and any(role != "prefill" for role in roles)


def _policy(children: Sequence[Child]) -> str:
    """As the router says it is, since it changes while the box runs; as planned before it says so."""
    for child in children:
        if isinstance(child.figures, RouterFigures) and child.figures.disagg:
            return child.figures.disagg_settings.policy
        if isinstance(child.plan.spec, RouterSpec):
            return child.plan.spec.disagg.policy
    return ""


def _idle_s(model: str, children: Sequence[Child], last_ended: float | None, now: float) -> float | None:
    busy = any(_has_request(child, model) for child in children)
    return 0.0 if busy else None if last_ended is None else round(max(0.0, now - last_ended), 1)


def _has_request(child: Child, model: str) -> bool:
    """A request of the model runs or waits there. A frontend names the oldest of its requests, workers count all."""
    match child.figures:
        case FrontendFigures(live=live):
            return any(request.model == model for request in live)
        case WorkerFigures(running=running, waiting=waiting):
            return child.plan.model == model and running + waiting > 0
        case _:
            return False


def _process_info(child: Child, loop_time: float) -> ProcessInfo:
    plan = child.plan
    return ProcessInfo(
        name=plan.name,
        kind=plan.kind,
        model=plan.model,
        role=plan.role,
        state=str(child.state),
        phase=child.phase,
        pid=child.pid,
        restarts=child.restarts,
        device=plan.device,
        rss_bytes=child.resident_bytes,
        uptime_s=None if child.life_began is None else round(loop_time - child.life_began, 3),
        progress=child.progress,
        cause=child.failure.cause if child.failure else "",
        guard_pid=child.guard_pid,
        info=child.info,
        figures=child.figures,
    )


def _planned_devices(plan: Plan) -> tuple[DeviceInfo, ...]:
    """Of models that are awake once the box is up, and the weights of those that sleep on a device."""
    planned: dict[str, dict[str, int]] = {}
    for process, item in ((one, item) for one in plan.processes for item in one.memory):
        asleep = process.model is not None and bool(plan.awake) and process.model not in plan.awake
        keeps = asleep and plan.policies[process.model or ""].keep == "device" and item.purpose == "weights"
        if asleep and item.device != "host" and not keeps:
            continue
        purposes = planned.setdefault(item.device, {})
        purposes[item.purpose] = purposes.get(item.purpose, 0) + item.bytes
    return tuple(
        DeviceInfo(device.id, device.name, device.kind, device.memory_bytes, planned.get(device.id, {}))
        for device in plan.devices
    )
