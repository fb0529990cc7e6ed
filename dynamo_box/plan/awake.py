"""Which models can be awake together, and which must sleep so that another can wake. Pure: data in, decision and
reasons out; the plan asks before anything runs, the supervisor while it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dynamo_box.plan.types import Plan
from dynamo_box.profile.units import format_size

TURN_S = 0.5
"""A model that has just woken keeps its room so long even if nothing seems to run: requests that waited for it are on
their way."""
BUSY_TURN_S = 2.0
"""The same for a model with requests, when another that has none to spare waits: they take turns."""


@dataclass(frozen=True)
class Needs:
    """Bytes by device: `awake` all that the model takes, `weights` what stays if it sleeps with its weights there."""

    awake: Mapping[str, int]
    weights: Mapping[str, int]


@dataclass(frozen=True)
class Standing:
    """One model at this moment. `state` is awake, asleep or moving (on its way to either: its room is spoken for).
    `keep` is where its weights go when it sleeps, `place` where they are. `used_s` is the time since it was last used,
    `awake_s` since it woke.
    """

    name: str
    needs: Needs
    state: Literal["awake", "asleep", "moving"]
    place: str = "device"
    keep: str = "host"
    pin: bool = False
    busy: bool = False
    used_s: float = 0.0
    awake_s: float = 0.0
    min_awake_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """Put `model` to sleep with its weights `to` a place (or move them there, if it sleeps already)."""

    model: str
    to: str
    reason: str


@dataclass(frozen=True)
class Room:
    """`steps` in order make room. `wait_s`: not yet, ask again after that time or when something has changed.
    `missing` says why there can't be room at all.
    """

    steps: tuple[Step, ...] = ()
    wait_s: float | None = None
    missing: str = ""


def make_room(wanted: Standing, others: Sequence[Standing], capacity: Mapping[str, int]) -> Room:
    """What has to go so that `wanted` can wake.

    Idle models go first, the least recently used before others; then busy ones take turns, the one that has been awake
    for longest first (what runs on it is finished); then weights that sleep on the device move to host memory. Pinned
    models stay. No more goes than is needed.
    """
    held = {one.name: _held(one) for one in others}
    if not (short := _shortage(wanted, held, capacity)):
        return Room()
    pinned = {one.name: _held(one) for one in others if one.pin}
    if hopeless := _shortage(wanted, pinned, capacity):
        return Room(missing=_explain(wanted, others, hopeless, capacity))
    steps: list[Step] = []
    soonest: float | None = None
    candidates = [one for one in others if one.state == "awake" and not one.pin and _shares(one, wanted)]
    idle = sorted((one for one in candidates if not one.busy), key=lambda one: (-one.used_s, one.name))
    busy = sorted((one for one in candidates if one.busy), key=lambda one: (-one.awake_s, one.name))
    for one in (*idle, *busy):
        turn_s = max(one.min_awake_s, BUSY_TURN_S if one.busy else TURN_S)
        if one.awake_s < turn_s:
            left_s = turn_s - one.awake_s
            soonest = left_s if soonest is None else min(soonest, left_s)
            continue
        why = "takes turns with" if one.busy else "makes room for"
        steps.append(Step(one.name, one.keep, f"{why} {wanted.name}"))
        held[one.name] = one.needs.weights if one.keep == "device" else {}
        if not (short := _shortage(wanted, held, capacity)):
            return Room(tuple(_needed(steps, wanted, others, capacity)))
    on_device = [one for one in others if not one.pin and any(held[one.name].values()) and _sleeps(one, steps)]
    for one in sorted(on_device, key=lambda one: (-one.used_s, one.name)):
        steps.append(Step(one.name, "host", f"its weights make room for {wanted.name}"))
        held[one.name] = {}
        if not (short := _shortage(wanted, held, capacity)):
            return Room(tuple(_needed(steps, wanted, others, capacity)))
    moving = [one.name for one in others if one.state == "moving" and _shares(one, wanted)]
    if soonest is not None or moving:
        return Room(wait_s=soonest if soonest is not None else TURN_S)
    return Room(missing=_explain(wanted, others, short, capacity))


def needs_of(plan: Plan, model: str) -> Needs:
    """What the plan gives the workers of a model on devices; interpreters and libraries are the host's and stay."""
    awake: dict[str, int] = {}
    weights: dict[str, int] = {}
    for process in plan.processes:
        if process.model != model:
            continue
        for item in process.memory:
            if item.device == "host":
                continue
            awake[item.device] = awake.get(item.device, 0) + item.bytes
            if item.purpose == "weights":
                weights[item.device] = weights.get(item.device, 0) + item.bytes
    return Needs(awake, weights)


def _held(one: Standing) -> Mapping[str, int]:
    if one.state == "asleep":
        return one.needs.weights if one.place == "device" else {}
    return one.needs.awake


def _sleeps(one: Standing, steps: Iterable[Step]) -> bool:
    return one.state == "asleep" or any(step.model == one.name for step in steps)


def _shares(one: Standing, wanted: Standing) -> bool:
    return bool(one.needs.awake.keys() & wanted.needs.awake.keys())


def _shortage(wanted: Standing, held: Mapping[str, Mapping[str, int]], capacity: Mapping[str, int]) -> dict[str, int]:
    """Missing bytes by device."""
    short = {}
    for device, size in wanted.needs.awake.items():
        free = capacity.get(device, 0) - sum(holding.get(device, 0) for holding in held.values())
        if size > free:
            short[device] = size - free
    return short


def _needed(
    steps: Sequence[Step], wanted: Standing, others: Sequence[Standing], capacity: Mapping[str, int]
) -> list[Step]:
    """Without those that turn out not to help: a later, larger one may have made an earlier one needless."""
    kept = list(steps)
    for step in steps:
        without = [one for one in kept if one is not step]
        if any(one.model == step.model and one is not step for one in kept):
            continue
        held = {one.name: _after(one, without) for one in others}
        if not _shortage(wanted, held, capacity):
            kept = without
    return kept


def _after(one: Standing, steps: Iterable[Step]) -> Mapping[str, int]:
    held = _held(one)
    for step in steps:
        if step.model == one.name:
            held = one.needs.weights if step.to == "device" else {}
    return held


def _explain(
    wanted: Standing, others: Sequence[Standing], short: Mapping[str, int], capacity: Mapping[str, int]
) -> str:
    device, missing = next(iter(short.items()))
    pinned = [one.name for one in others if one.pin and one.state != "asleep" and _shares(one, wanted)]
    beside = f" beside {', '.join(pinned)} (pinned)" if pinned else ""
    return (
        f"{wanted.name} needs {format_size(wanted.needs.awake[device])} on {device}, which may use "
        f"{format_size(capacity.get(device, 0))}: {format_size(missing)} missing{beside}"
    )
