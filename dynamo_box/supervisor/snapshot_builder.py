"""The one place where the box's state becomes the value that everyone sees."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dynamo_box.plan.types import Plan
from dynamo_box.protocol.spec import ModelSpec
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, DeviceInfo, EventInfo, ModelInfo, ProcessInfo
from dynamo_box.supervisor.child import Child


def build(
    plan: Plan, box: BoxInfo, children: Sequence[Child], events: tuple[EventInfo, ...], loop_time: float
) -> BoxSnapshot:
    """`loop_time` is the event loop's clock, which children's times are in."""
    return BoxSnapshot(
        box=box,
        models=tuple(model_info(model, box.state, children) for model in plan.models),
        processes=tuple(_process_info(child, loop_time) for child in children),
        devices=_devices(plan),
        events=events,
        at=time.time(),
    )


def model_info(model: ModelSpec, box_state: str, children: Sequence[Child]) -> ModelInfo:
    """A model is ready when every role of it has a worker, and a router and a frontend are there to reach
    them.
    """
    workers = [child for child in children if child.plan.model == model.name]
    ready = [child for child in workers if child.is_ready]
    roles = {child.plan.role for child in workers}
    others = [child for child in children if child.plan.model is None]
    whole = bool(ready) and {child.plan.role for child in ready} == roles and all(child.is_ready for child in others)
    if box_state == "starting":
        state = "starting"
    else:
        state = "ready" if whole and box_state in ("ready", "degraded") else "unavailable"
    return ModelInfo(model.name, state, model.path, len(ready), len(workers))


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


def _devices(plan: Plan) -> tuple[DeviceInfo, ...]:
    planned: dict[str, dict[str, int]] = {}
    for item in plan.memory:
        purposes = planned.setdefault(item.device, {})
        purposes[item.purpose] = purposes.get(item.purpose, 0) + item.bytes
    return tuple(
        DeviceInfo(device.id, device.name, device.kind, device.memory_bytes, planned.get(device.id, {}))
        for device in plan.devices
    )
