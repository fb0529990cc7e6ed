"""More workers of a model while its box runs, cloned from planned ones, and what is planned with them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from dynamo_box.errors import PlanRefused
from dynamo_box.plan.cores import with_emptiest_share
from dynamo_box.plan.types import ByteItem, Plan, ProcessPlan
from dynamo_box.profile.units import format_size
from dynamo_box.protocol.spec import WorkerSpec

HOST = "host"
WEIGHTS = "weights"
MAX_WORKERS = 256
"""Of one role of a model, as in a profile."""


def as_of_now(plan: Plan, present: Sequence[ProcessPlan]) -> Plan:
    """`plan` with the processes that there are. Of a planned worker that is no more, the weights that it shares stay:
    their service holds them.
    """
    names = {process.name for process in present}
    left = [
        msgspec.structs.replace(process, memory=weights)
        for process in plan.processes
        if process.name not in names and _shares(process) and (weights := _weights(process))
    ]
    return msgspec.structs.replace(plan, processes=(*present, *left))


def grow(
    plan: Plan,
    present: Sequence[ProcessPlan],
    model: str,
    role: str,
    count: int,
    asleep: Mapping[str, str] | None = None,
) -> list[ProcessPlan]:
    """`count` further workers of `model` in `role`, beside the processes `present`. Each is like a planned one of that
    role, or of another where there was none, on the devices and the cores with the fewest workers. `asleep` are models
    that sleep, with the place of their weights.

    Raises:
        PlanRefused: there is no room for all of them; with how much is missing on which device.
    """
    templates = [process for process in plan.processes if process.model == model and process.kind == "worker"]
    templates.sort(key=lambda process: process.role != role)
    there = list(present)
    added: list[ProcessPlan] = []
    for number in range(count):
        fit, shortages = _first_fit(plan, there, templates, _free_name(model, role, there), role, asleep or {})
        if fit is None:
            short = min(shortages, key=lambda shortage: shortage.missing)
            raise PlanRefused(
                f"there is no room for {number + 1} more {role} worker{'s' if number else ''} of {model}",
                remedy="scale another role or model down first",
                details=(short.text,),
            )
        there.append(fit)
        added.append(fit)
    return added


@dataclass(frozen=True)
class _Shortage:
    missing: int
    text: str


def _first_fit(
    plan: Plan,
    there: Sequence[ProcessPlan],
    templates: Sequence[ProcessPlan],
    name: str,
    role: str,
    asleep: Mapping[str, str],
) -> tuple[ProcessPlan | None, list[_Shortage]]:
    """The clone of the first template that fits, those of emptier devices before others; else why none does."""
    crowd = {
        template.device: sum(1 for process in there if process.kind == "worker" and process.device == template.device)
        for template in templates
    }
    shortages: list[_Shortage] = []
    for template in sorted(templates, key=lambda process: crowd[process.device]):
        clone = with_emptiest_share(_clone(template, name, role), templates, there)
        short = _shortage(plan, there, clone, asleep)
        if short is None:
            return clone, []
        shortages.append(short)
    return None, shortages


def _clone(template: ProcessPlan, name: str, role: str) -> ProcessPlan:
    assert isinstance(template.spec, WorkerSpec)
    memory = template.memory
    if _shares(template):
        memory = tuple(
            ByteItem(item.device, WEIGHTS, 0, "the layout of its model: counted there")
            if item.purpose == WEIGHTS
            else item
            for item in memory
        )
    spec = msgspec.structs.replace(template.spec, name=name, role=role)
    return msgspec.structs.replace(template, name=name, role=role, spec=spec, memory=memory)


def _free_name(model: str, role: str, there: Sequence[ProcessPlan]) -> str:
    taken = {process.name for process in there}
    return next(name for number in range(len(taken) + 1) if (name := f"{model}.{role}.{number}") not in taken)


def _shortage(
    plan: Plan, there: Sequence[ProcessPlan], clone: ProcessPlan, asleep: Mapping[str, str]
) -> _Shortage | None:
    used = _used(as_of_now(plan, there).processes, asleep)
    need: dict[str, int] = {}
    for item in clone.memory:
        need[item.device] = need.get(item.device, 0) + item.bytes
    worst: _Shortage | None = None
    for device in plan.devices:
        wanted = need.get(device.id, 0)
        missing = wanted - (device.capacity_bytes - used.get(device.id, 0))
        if wanted and missing > (worst.missing if worst else 0):
            free = max(0, device.capacity_bytes - used.get(device.id, 0))
            worst = _Shortage(
                missing,
                f"{device.id}: {clone.name} needs {format_size(wanted)}, {format_size(free)} of "
                f"{format_size(device.capacity_bytes)} are free: {format_size(missing)} missing",
            )
    return worst


def _used(processes: Collection[ProcessPlan], asleep: Mapping[str, str]) -> dict[str, int]:
    """Bytes by device; models that sleep hold of a device what weights they left there."""
    used: dict[str, int] = {}
    for process in processes:
        place = asleep.get(process.model or "")
        for item in process.memory:
            stays = place is None or item.device == HOST or (place == "device" and item.purpose == WEIGHTS)
            if stays:
                used[item.device] = used.get(item.device, 0) + item.bytes
    return used


def _shares(process: ProcessPlan) -> bool:
    """Its weights belong to a service of weight memory."""
    return isinstance(process.spec, WorkerSpec) and bool(process.spec.gms)


def _weights(process: ProcessPlan) -> tuple[ByteItem, ...]:
    return tuple(item for item in process.memory if item.purpose == WEIGHTS and item.bytes)
