"""Which models are awake together, reckoned before anything runs. Pure. `awake.py` decides the same at run time, from
what is awake then.

If all models fit together, they are one gathering. Else the first gathering is what is awake when `up` returns: the
pinned models, then as many others as fit, in the order of the profile. Each of the rest needs a gathering of its own,
with the pinned ones: it is what is awake when a request has woken it. A plan has to carry every gathering, and a
worker's KV is what all gatherings that it is part of can give it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dynamo_box.plan.types import Plan


@dataclass(frozen=True)
class Contender:
    """A model, with bytes by device: `least` that its workers can do with, and what `stays` there while it sleeps."""

    name: str
    least: Mapping[str, int]
    stays: Mapping[str, int]
    pin: bool = False


@dataclass(frozen=True)
class Gathering:
    """Models that are awake together, in the order of the profile, `pinned` among them; `asleep` is what the others
    hold of each device.
    """

    awake: tuple[str, ...]
    pinned: tuple[str, ...]
    asleep: Mapping[str, int]


def gather(contenders: Sequence[Contender], capacity: Mapping[str, int]) -> tuple[Gathering, ...]:
    """All gatherings, that of `up` first. If not even the pinned models fit together, theirs is the only one."""
    pinned = {one.name for one in contenders if one.pin}
    if not _fits(pinned, contenders, capacity):
        return (_gathering(pinned, contenders),)
    if _fits(everyone := {one.name for one in contenders}, contenders, capacity):
        return (_gathering(everyone, contenders),)
    awake = set(pinned)
    for one in contenders:
        if _fits(awake | {one.name}, contenders, capacity):
            awake.add(one.name)
    rest = [one.name for one in contenders if one.name not in awake]
    found = (awake, *(pinned | {name} for name in rest))
    return tuple(_gathering(names, contenders) for names in found if names)


def groups(
    needs: Mapping[str, Mapping[str, int]], pinned: Iterable[str], capacity: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Unpinned models in groups, so that models of different groups are never awake together: no two of them fit beside
    the pinned ones. `needs` are all that a model takes while it is awake.
    """
    fixed = tuple(pinned)
    found: list[tuple[str, ...]] = []
    for name in needs:
        if name in fixed:
            continue
        together = [group for group in found if any(_carries((*fixed, one, name), needs, capacity) for one in group)]
        found = [group for group in found if group not in together]
        found.append((*(one for group in together for one in group), name))
    return found


def held_bytes(plan: Plan, device: str) -> int:
    """What is set aside of a device when `up` returns: by all that is awake then, and by weights that sleep there."""
    held = 0
    for process in plan.processes:
        sleeps = process.model is not None and process.model not in plan.awake
        policy = plan.policies.get(process.model or "")
        stays = policy is not None and policy.gms and policy.keep == "device"
        for item in process.memory:
            if item.device == device and (not sleeps or device == "host" or (stays and item.purpose == "weights")):
                held += item.bytes
    return held


def _gathering(awake: set[str], contenders: Sequence[Contender]) -> Gathering:
    asleep: dict[str, int] = {}
    for one in contenders:
        if one.name not in awake:
            for device, size in one.stays.items():
                asleep[device] = asleep.get(device, 0) + size
    here = [one for one in contenders if one.name in awake]
    return Gathering(tuple(one.name for one in here), tuple(one.name for one in here if one.pin), asleep)


def _fits(awake: set[str], contenders: Sequence[Contender], capacity: Mapping[str, int]) -> bool:
    held = {one.name: one.least if one.name in awake else one.stays for one in contenders}
    return _carries(held, held, capacity)


def _carries(names: Iterable[str], sizes: Mapping[str, Mapping[str, int]], capacity: Mapping[str, int]) -> bool:
    total: dict[str, int] = {}
    for name in names:
        for device, size in sizes[name].items():
            total[device] = total.get(device, 0) + size
    return all(size <= capacity.get(device, 0) for device, size in total.items())
