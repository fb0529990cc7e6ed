"""What the plan may give away of each device, who gets how much KV of it, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.hardware import Hardware
from dynamo_box.plan.awake_set import Contender, Gathering
from dynamo_box.plan.memory import HOST, MIB, WorkerMemory, context_length, device_memory, sharer
from dynamo_box.plan.placement import CPU
from dynamo_box.plan.types import DevicePlan, ModelPolicy
from dynamo_box.profile.units import format_size

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Memory

HOST_FRACTION = 0.9
CPU_FRACTION = 0.8
LAYOUT_GRANULE = 2 * MIB
LARGEST = 1 << 63


@dataclass(frozen=True)
class Allotment:
    """KV bytes by worker on each of its devices, whole blocks; `reasons` say what is missing by how much."""

    kv: Mapping[str, int]
    reasons: tuple[str, ...]


def capacities(
    memory: Memory, hardware: Hardware, devices: Sequence[str], host_need: int, host_tier: int = 0
) -> tuple[dict[str, int], list[str]]:
    """Bytes by device, and what stands against it. The cpu device gets its part of the host's budget, "host"
    the rest.

    Where the profile doesn't say, that part leaves `host_tier` and a fifth of the rest to the host, or `host_need`
    (which has `host_tier` in it) if that is more.
    """
    found: dict[str, int] = {}
    reasons: list[str] = []
    available = hardware.cpu.memory_available
    if available is None:
        available = hardware.cpu.memory_total
    if memory.host is None and available is None:
        reasons.append("this machine's memory can't be read: set memory.host in the profile")
    budget = memory.host if memory.host is not None else int((available or 0) * HOST_FRACTION)
    if memory.host is not None and available is not None and memory.host > available:
        reasons.append(
            f"memory.host is {format_size(memory.host)}, {format_size(available)} are available: "
            f"{format_size(memory.host - available)} missing"
        )
    if CPU in devices:
        usual = max(0, min(int((budget - host_tier) * CPU_FRACTION), budget - host_need))
        share = memory.cpu if memory.cpu is not None else usual
        if share > budget:
            reasons.append(
                f"memory.cpu is {format_size(share)}, the box may use {format_size(budget)}: "
                f"{format_size(share - budget)} missing"
            )
        found[CPU] = share
        budget -= min(share, budget)
    found[HOST] = budget
    for gpu in hardware.gpus:
        if gpu.uuid in devices:
            if gpu.memory_total is None:
                reasons.append(f"the memory of GPU {gpu.index} ({gpu.uuid}) can't be read")
            total = gpu.memory_total or 0
            free = total if gpu.memory_free is None else gpu.memory_free
            found[gpu.uuid] = min(int(total * memory.device_fraction), free)
    return found, reasons


def device_plans(hardware: Hardware, capacity: Mapping[str, int]) -> tuple[DevicePlan, ...]:
    gpus = {gpu.uuid: gpu for gpu in hardware.gpus}
    plans = []
    for device, size in capacity.items():
        gpu = gpus.get(device)
        if gpu:
            kind, name = "simulated" if gpu.simulated else "cuda", gpu.name or f"GPU {gpu.index}"
        else:
            kind, name = (
                device,
                (hardware.cpu.name or "cpu") if device == CPU else "interpreters and libraries",
            )
        cores = hardware.cpu.parallel if kind == CPU else 0
        plans.append(DevicePlan(device, name, kind, device_memory(hardware, device), size, cores))
    return tuple(plans)


def contenders(workers: Sequence[WorkerMemory], policies: Mapping[str, ModelPolicy]) -> list[Contender]:
    """The models, in the order of the profile."""
    found = []
    for name, policy in policies.items():
        mine = [worker for worker in workers if worker.worker.model.name == name]
        devices = dict.fromkeys(device for worker in mine for device in worker.worker.devices)
        weights = {device: _fixed(device, mine)[0] for device in devices}
        least = {device: sum(_parts(device, mine)) for device in devices}
        stays = weights if policy.gms and policy.keep == "device" else {}
        found.append(Contender(name, least, stays, policy.pin))
    return found


def allot(
    workers: Sequence[WorkerMemory],
    gatherings: Sequence[Gathering],
    capacity: Mapping[str, int],
    device_names: Mapping[str, str],
) -> Allotment:
    """KV for every worker: what it asks for, else its usual amount, else an even part of what is left to those that are
    awake together, in the gathering that leaves least.

    A worker never gets less than one sequence of full length needs; if a device can't give that, it is a
    reason.
    """
    reasons = [text for worker in workers if (text := _too_little_asked(worker))]
    kv: dict[str, int] = {}
    for gathering in gatherings:
        here = [worker for worker in workers if worker.worker.model.name in gathering.awake]
        devices = [
            device
            for device in capacity
            if gathering.asleep.get(device) or any(device in worker.worker.devices for worker in here)
        ]
        room = {device: _room(device, here, gathering, capacity) for device in devices}
        for device, left in room.items():
            if left < 0:
                whose = f"{device_names.get(device, device)}: {_who(gathering, workers)}"
                reasons.append(_missing(device, here, gathering, capacity[device], whose))
        for worker in here:
            kv[worker.worker.name] = min(_kv(worker, here, room), kv.get(worker.worker.name, LARGEST))
    return Allotment(kv, tuple(reasons))


def host_reasons(need: int, capacity: int, asleep: Mapping[str, int], tier: int = 0) -> list[str]:
    """What stands against the host's part. `asleep` are weights that must find room in host memory, by model, so that
    others can wake; `tier` is the part of `need` that the host tier of KV is.
    """
    weights = sum(asleep.values())
    if need > capacity:
        weights, asleep = 0, {}
    total = need + weights
    if total <= capacity:
        return []
    parts = [f"{format_size(need - tier)} for interpreters and libraries"]
    parts += [f"{format_size(tier)} for the host tier of KV"] if tier else []
    parts += [f"{format_size(weights)} for the weights of {', '.join(asleep)} while they sleep"] if weights else []
    said = f" ({' + '.join(parts)})" if len(parts) > 1 else parts[0].removeprefix(format_size(need))
    missing = total - capacity
    text = f"host: needs {format_size(total)}{said}, may use {format_size(capacity)}: {format_size(missing)} missing"
    return [f"{text}; with keep: disk they need none" if weights else text]


def sleeping_bytes(
    workers: Sequence[WorkerMemory], policies: Mapping[str, ModelPolicy], gatherings: Sequence[Gathering]
) -> dict[str, int]:
    """Weights by model that host memory has to take so that models can take turns: for a moment of each turn those of
    all of them, since one has left its device before the other comes from the host.
    """
    if len(gatherings) == 1 and len(gatherings[0].awake) == len(policies):
        return {}
    turning = [name for name, policy in policies.items() if policy.gms and policy.keep == "host" and not policy.pin]
    return {name: weights_in_host(workers, name) for name in turning}


def weights_in_host(workers: Sequence[WorkerMemory], model: str) -> int:
    """Bytes of a model's weights in whole granules, one copy of what each device holds."""
    mine = [worker for worker in workers if worker.worker.model.name == model]
    devices = dict.fromkeys(device for worker in mine for device in worker.worker.devices)
    return sum(-(-_fixed(device, mine)[0] // LAYOUT_GRANULE) * LAYOUT_GRANULE for device in devices)


def _least(worker: WorkerMemory) -> int:
    if not worker.kv_counts:
        return 0
    return worker.kv if worker.kv is not None else worker.kv_least


def _fixed(device: str, workers: Sequence[WorkerMemory]) -> tuple[int, int]:
    """(weights, overhead) on the device; weights that workers share count once."""
    weights = overhead = 0
    for index, worker in enumerate(workers):
        if device in worker.worker.devices:
            overhead += worker.overhead
            if worker.weights and sharer(worker, workers[:index]) is None:
                weights += worker.weights.per_device
    return weights, overhead


def _parts(device: str, workers: Sequence[WorkerMemory]) -> tuple[int, int, int]:
    """(weights, least KV, overhead) on the device."""
    weights, overhead = _fixed(device, workers)
    return weights, sum(_least(worker) for worker in workers if device in worker.worker.devices), overhead


def _room(device: str, workers: Sequence[WorkerMemory], gathering: Gathering, capacity: Mapping[str, int]) -> int:
    """What is left of the device once everyone has the least; negative if they can't."""
    return capacity[device] - gathering.asleep.get(device, 0) - sum(_parts(device, workers))


def _kv(worker: WorkerMemory, workers: Sequence[WorkerMemory], room: Mapping[str, int]) -> int:
    if worker.kv is not None:
        size = worker.kv
    elif not worker.kv_counts:
        size = worker.kv_default
    else:
        parts = []
        for device in worker.worker.devices:
            sharing = sum(1 for one in workers if one.kv is None and device in one.worker.devices)
            parts.append(worker.kv_least + max(0, room[device]) // sharing)
        size = min(parts)
        if CPU in worker.worker.devices:
            size = min(size, worker.kv_default)
    return size // worker.block * worker.block


def _too_little_asked(worker: WorkerMemory) -> str | None:
    if worker.kv is None or worker.kv >= worker.kv_least:
        return None
    model = worker.worker.model
    span = len(worker.worker.devices)
    tokens = worker.kv // worker.block * model.block_size
    return (
        f"{worker.worker.name}: {format_size(worker.kv * span)} of KV hold {tokens} tokens, a context has "
        f"{context_length(worker.worker)}: {format_size((worker.kv_least - worker.kv) * span)} missing; "
        f"raise kv_memory to {format_size(worker.kv_least * span)}, or set context_length: {tokens}"
    )


def _who(gathering: Gathering, workers: Sequence[WorkerMemory]) -> str:
    """`a beside b, c (pinned) `; nothing where there is one model only, or all sleep."""
    if not gathering.awake or len({worker.worker.model.name for worker in workers}) == 1:
        return ""
    pinned = ", ".join(gathering.pinned)
    others = ", ".join(name for name in gathering.awake if name not in gathering.pinned)
    return f"{others} beside {pinned} (pinned) " if others and pinned else f"{others or f'{pinned} (pinned)'} "


def _missing(device: str, workers: Sequence[WorkerMemory], gathering: Gathering, capacity: int, whose: str) -> str:
    here = [worker for worker in workers if device in worker.worker.devices]
    weights, kv, overhead = _parts(device, here)
    asleep = gathering.asleep.get(device, 0)
    need = weights + kv + overhead + asleep
    parts = f"weights {format_size(weights)} + KV {format_size(kv)} + overhead {format_size(overhead)}"
    parts += f" + weights asleep there {format_size(asleep)}" if asleep else ""
    text = (
        f"{whose}needs {format_size(need)} ({parts}), may use {format_size(capacity)}: "
        f"{format_size(need - capacity)} missing"
    )
    if gathering.awake and asleep >= need - capacity:
        return f"{text}; with keep: host for those asleep it would fit"
    hint = _shorter_context(here, capacity - weights - overhead - asleep) if here else None
    return f"{text}; {hint}" if hint else text


def _shorter_context(here: Sequence[WorkerMemory], for_kv: int) -> str | None:
    """The context with which everyone's least would fit, if only contexts are too long."""
    if any(worker.kv is not None for worker in here) or len({worker.worker.model.name for worker in here}) != 1:
        return None
    blocks = for_kv // len(here) // here[0].block
    tokens = blocks * here[0].worker.model.block_size
    return f"with context_length: {tokens} it would fit" if tokens >= 512 else None
