"""A plan for reading (`dynbox up --dry-run`) and as data (`--json`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from dynamo_box.plan.awake_set import held_bytes
from dynamo_box.plan.types import DevicePlan, ModelPolicy, Plan, ProcessPlan
from dynamo_box.profile.units import format_size
from dynamo_box.protocol.spec import KvStoreSpec, RouterSpec, WorkerSpec
from dynamo_box.wording import duration

_RIGHT = frozenset({"THREADS", "WEIGHTS", "KV", "OVERHEAD", "MEMORY", "MAY USE", "PLANNED", "LEFT", "BYTES"})


def plan_text(plan: Plan) -> str:
    """Processes in start order, devices with what is left of them, and the arithmetic of every byte."""
    models = ", ".join(f"{model.name} (context {model.context_length})" for model in plan.models)
    parts = [
        "\n".join(
            (
                f"profile {plan.profile}: {models} at {plan.endpoint}",
                *topology_lines(plan),
                *leg_lines(plan),
                *sleep_lines(plan),
                *tier_lines(plan),
            )
        ),
        _table(
            ("PROCESS", "PROGRAM", "DEVICE", "CORES", "THREADS", "WEIGHTS", "KV", "OVERHEAD"),
            (_process_row(process) for process in plan.processes),
        ),
        _table(
            ("DEVICE", "NAME", "MEMORY", "MAY USE", "PLANNED", "LEFT"),
            (_device_row(plan, device) for device in plan.devices),
        ),
        _table(
            ("DEVICE", "PROCESS", "PURPOSE", "BYTES", "ARITHMETIC"),
            (
                (item.device, process.name, item.purpose, f"{item.bytes:,}", item.arithmetic)
                for process in plan.processes
                for item in process.memory
            ),
        ),
    ]
    if plan.warnings:
        parts.append("\n".join(f"note: {warning}" for warning in plan.warnings))
    return "\n\n".join(parts) + "\n"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, with the sums that a reader would take."""
    data: dict[str, Any] = msgspec.to_builtins(plan)
    data["endpoint"] = plan.endpoint
    data["digest"] = plan.digest
    for device in data["devices"]:
        device["planned_bytes"] = planned_bytes(plan, device["id"])
    return data


def planned_bytes(plan: Plan, device: str) -> int:
    """What is in use when `up` returns, by plan."""
    return held_bytes(plan, device)


_PLACES = {"device": "on the device", "host": "in host", "disk": "on disk"}


def sleep_lines(plan: Plan) -> list[str]:
    """Who is awake when `up` returns, who sleeps where, and what comes later; none for one model without a policy."""
    said = [f"{name} {_when(policy)}" for name, policy in plan.policies.items() if _when(policy)]
    lines = []
    if len(plan.models) > 1:
        asleep = [
            f"{name} {f'asleep {_PLACES[policy.keep]}' if policy.gms else 'stopped'}"
            for name, policy in plan.policies.items()
            if name not in plan.awake
        ]
        awake = [f"{', '.join(plan.awake)} awake"] if plan.awake else []
        lines.append(f"after up: {'; '.join((*awake, *asleep))}")
    if said:
        lines.append(f"later: {'; '.join(said)}")
    return lines


def topology_lines(plan: Plan) -> list[str]:
    """That nothing of it is real, if so; which topology was taken, and why not those before it."""
    lines = ["SIMULATED: these GPUs are not there; speeds are a model's, and answers are not"] if plan.simulated else []
    if plan.topology:
        lines.append(f"topology: {plan.topology}")
        lines += [f"  not {reason}" for reason in plan.passed_over]
    return lines


def leg_lines(plan: Plan) -> list[str]:
    """How requests are shared by prefill and decode workers; none without them."""
    disagg = next((process.spec.disagg for process in plan.processes if isinstance(process.spec, RouterSpec)), None)
    roles = {process.role for process in plan.processes if process.kind == "worker"}
    if disagg is None or not {"prefill", "decode"} & roles:
        return []
    words = {
        "strict": "every request, or it fails",
        "fallback": "every request while both are there",
        "conditional": f"prompts with {disagg.min_uncached_tokens:,} tokens to compute and more, which are "
        f"{disagg.min_uncached_share:.0%} of it at least, unless {disagg.max_prefill_tokens:,} wait",
    }
    return [f"prefill here, decode there: {words[disagg.policy]} (policy {disagg.policy})"]


def tier_lines(plan: Plan) -> list[str]:
    """How large the KV tiers are, who is kept out of them, and what said so; none without tiers."""
    store = next((process.spec for process in plan.processes if isinstance(process.spec, KvStoreSpec)), None)
    if store is None:
        return []

    def said(setting: str) -> str:
        return f"({plan.origins.get(setting, 'default')})"

    parts = [f"{format_size(store.host_bytes)} of host memory {said('memory.tiers.host')}"]
    if store.disk_bytes:
        where = f" in {store.directory} {said('memory.tiers.directory')}" if store.directory else ""
        parts.append(f"{format_size(store.disk_bytes)} on disk {said('memory.tiers.disk')}{where}")
        if store.disk_admission != "always":
            parts.append(f"to disk at the second hit {said('kv.disk_admission')}")
    else:
        parts.append(f"none on disk {said('memory.tiers.disk')}")
    priorities = {one.spec.offload.min_priority for one in plan.processes if isinstance(one.spec, WorkerSpec)}
    if threshold := max(priorities, default=0):
        parts.append(f"blocks of priority {threshold} and above {said('kv.offload.min_priority')}")
    which = "simulated KV tiers" if store.rehearsal else "KV tiers"
    return [f"{which}: {', '.join(parts)}"]


def _when(policy: ModelPolicy) -> str:
    if policy.pin:
        return "never sleeps by itself"
    words = []
    if policy.idle_ttl_s is not None:
        act = f"sleeps {_PLACES[policy.keep]}" if policy.gms else "is stopped"
        words.append(f"{act} after {_span(policy.idle_ttl_s)} without requests")
    if policy.min_awake_s:
        words.append(f"stays awake for {_span(policy.min_awake_s)} at least")
    return ", ".join(words)


def _span(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:g}s"


def _process_row(process: ProcessPlan) -> tuple[str, ...]:
    sums: dict[str, int] = {}
    for item in process.memory:
        sums[item.purpose] = sums.get(item.purpose, 0) + item.bytes
    kv = sums.get("KV", 0) + sums.get("KV tier", 0)
    if kv:
        sums["KV"] = kv
    sizes = (format_size(sums[purpose]) if purpose in sums else "-" for purpose in ("weights", "KV", "overhead"))
    return (
        process.name,
        " ".join(process.program),
        process.device or "-",
        ",".join(map(str, process.cores)) or "any",
        str(process.threads),
        *sizes,
    )


def _device_row(plan: Plan, device: DevicePlan) -> tuple[str, ...]:
    planned = planned_bytes(plan, device.id)
    memory = "NA" if device.memory_bytes is None else format_size(device.memory_bytes)
    name = f"{device.name} (simulated)" if device.kind == "simulated" else device.name
    left = device.capacity_bytes - planned
    return (
        device.id,
        name,
        memory,
        format_size(device.capacity_bytes),
        format_size(planned),
        format_size(left),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = (
        "  ".join(
            cell.rjust(width) if title in _RIGHT else cell.ljust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)
