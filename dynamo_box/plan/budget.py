"""What the plan may give away of each device, who gets how much KV of it, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.hardware import Hardware
from dynamo_box.plan.memory import HOST, WorkerMemory, context_length, device_memory, sharer
from dynamo_box.plan.placement import CPU
from dynamo_box.plan.types import DevicePlan
from dynamo_box.profile.units import format_size

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Memory

HOST_FRACTION = 0.9
CPU_FRACTION = 0.8


@dataclass(frozen=True)
class Allotment:
    """KV bytes by worker on each of its devices, whole blocks; `reasons` say what is missing by how much."""

    kv: Mapping[str, int]
    reasons: tuple[str, ...]


def capacities(
    memory: Memory, hardware: Hardware, devices: Sequence[str], host_need: int
) -> tuple[dict[str, int], list[str]]:
    """Bytes by device, and what stands against it. The cpu device gets its part of the host's budget, "host"
    the rest.

    Where the profile doesn't say, that part leaves a fifth to the host, or `host_need` if that is more.
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
        usual = max(0, min(int(budget * CPU_FRACTION), budget - host_need))
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
        plans.append(DevicePlan(device, name, kind, device_memory(hardware, device), size))
    return tuple(plans)


def allot(
    workers: Sequence[WorkerMemory],
    host_need: int,
    capacity: Mapping[str, int],
    device_names: Mapping[str, str],
) -> Allotment:
    """KV for every worker: what it asks for, else its usual amount, else an even part of what is left.

    A worker never gets less than one sequence of full length needs; if a device can't give that, it is a
    reason.
    """
    reasons = [text for worker in workers if (text := _too_little_asked(worker))]
    room = {device: _room(device, workers, capacity) for device in capacity if device != HOST}
    for device, left in room.items():
        if left < 0:
            reasons.append(_missing(device, workers, capacity[device], device_names.get(device, device)))
    if host_need > capacity[HOST]:
        reasons.append(
            f"host: needs {format_size(host_need)} for interpreters and libraries, may use "
            f"{format_size(capacity[HOST])}: {format_size(host_need - capacity[HOST])} missing"
        )
    kv = {worker.worker.name: _kv(worker, workers, room) for worker in workers}
    return Allotment(kv, tuple(reasons))


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


def _room(device: str, workers: Sequence[WorkerMemory], capacity: Mapping[str, int]) -> int:
    """What is left of the device once everyone has the least; negative if they can't."""
    kv = sum(_least(worker) for worker in workers if device in worker.worker.devices)
    return capacity[device] - sum(_fixed(device, workers)) - kv


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


def _missing(device: str, workers: Sequence[WorkerMemory], capacity: int, name: str) -> str:
    here = [worker for worker in workers if device in worker.worker.devices]
    weights, overhead = _fixed(device, workers)
    kv = sum(_least(worker) for worker in here)
    need = weights + overhead + kv
    parts = f"weights {format_size(weights)} + KV {format_size(kv)} + overhead {format_size(overhead)}"
    text = (
        f"{name}: needs {format_size(need)} ({parts}), may use {format_size(capacity)}: "
        f"{format_size(need - capacity)} missing"
    )
    hint = _shorter_context(here, capacity - weights - overhead)
    return f"{text}; {hint}" if hint else text


def _shorter_context(here: Sequence[WorkerMemory], for_kv: int) -> str | None:
    """The context with which everyone's least would fit, if only contexts are too long."""
    if any(worker.kv is not None for worker in here) or len({worker.worker.model.name for worker in here}) != 1:
        return None
    blocks = for_kv // len(here) // here[0].block
    tokens = blocks * here[0].worker.model.block_size
    return f"with context_length: {tokens} it would fit" if tokens >= 512 else None
