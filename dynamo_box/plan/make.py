"""Profile + hardware + what is known of the models → a plan, or a refusal with every reason.

Pure: nothing here looks at the machine, so the same input gives the same plan, and any hardware can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Hardware, SimulatedGpus, simulate
from dynamo_box.plan.budget import allot, capacities, device_plans
from dynamo_box.plan.memory import (
    FRONTEND_BYTES,
    GUARD_BYTES,
    ROUTER_BYTES,
    context_length,
    gpu_least_bytes,
    worker_memory,
)
from dynamo_box.plan.placement import Demand, Placed, demands, gpus_needed, place
from dynamo_box.plan.processes import (
    computes_on_cpu,
    frontend_process,
    model_spec,
    router_process,
    worker_processes,
)
from dynamo_box.plan.types import Plan, RestartPolicy
from dynamo_box.profile.catalogue import facts_for
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.units import format_size
from dynamo_box.profile.wording import escaped

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile, ServedModel

BUILT_ENGINES = frozenset({"native", "mock"})


def make_plan(
    profile: Profile,
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    *,
    run_dir: str,
    port: int | None = None,
    shipped: Callable[[], Mapping[str, Profile]] | None = None,
) -> Plan:
    """The plan. `facts` are the store's models by name; the catalogue fills in for those not pulled yet,
    whose `ModelSpec.path` is then empty: plan again after the pull.

    `port` overrides the profile's. `shipped` is called on refusal only, for what else this machine could
    carry.

    Raises:
        PlanRefused: with all reasons as details.
    """
    real = hardware
    hardware = _planned_hardware(profile, hardware)
    reasons: list[str] = []
    known: dict[str, ModelFacts] = {}
    for model in profile.served:
        found = facts_for(model.origin, facts)
        if found is None:
            origin = escaped(model.origin)
            reasons.append(f"nothing is known of {origin} yet: run `dynbox pull {origin}` first")
        else:
            known[model.name] = found
            reasons += _context_reasons(model, found)
    wanted = demands(profile, hardware)
    placed, missing = place(wanted, known, hardware)
    too_few = gpus_needed(wanted) > len(hardware.gpus)
    reasons += [text + _least_gpu(profile, wanted, known) for text in missing] if too_few else missing

    memories = [worker_memory(worker, profile.memory.kv_per_worker) for worker in placed]
    used = tuple(dict.fromkeys(device for worker in placed for device in worker.devices))
    host_need = ROUTER_BYTES + FRONTEND_BYTES + 2 * GUARD_BYTES + sum(one.host + GUARD_BYTES for one in memories)
    capacity, unreadable = capacities(profile.memory, hardware, used, host_need)
    labels = {gpu.uuid: f"GPU {gpu.index} ({gpu.uuid})" for gpu in hardware.gpus}
    allotment = allot(memories, host_need, capacity, labels)
    reasons += unreadable or allotment.reasons
    reasons += _not_built(profile, wanted)
    if reasons:
        raise _refusal(profile, reasons, real, facts, shipped)

    specs = {model.name: model_spec(model, known[model.name]) for model in profile.served}
    models = tuple(specs.values())
    return Plan(
        profile=profile.name,
        host=profile.frontend.host,
        port=profile.frontend.port if port is None else port,
        models=models,
        devices=device_plans(hardware, capacity),
        processes=(
            router_process(profile.router, models, run_dir),
            *worker_processes(memories, allotment.kv, hardware.cpu, specs, run_dir),
            frontend_process(profile.frontend, models, run_dir, port),
        ),
        restart=RestartPolicy(
            first_s=profile.restart.first,
            factor=profile.restart.factor,
            longest_s=profile.restart.longest,
            stable_s=profile.restart.stable,
            give_up_after=profile.restart.give_up_after,
            silence_s=profile.restart.silence,
        ),
        drain_s=profile.drain,
        warnings=_warnings(profile, hardware, placed),
    )


def _planned_hardware(profile: Profile, hardware: Hardware) -> Hardware:
    if profile.simulate is None:
        return hardware
    groups = (SimulatedGpus(one.name, one.count, one.memory) for one in profile.simulate.devices)
    return simulate(tuple(groups), hardware.cpu)


def _context_reasons(model: ServedModel, facts: ModelFacts) -> list[str]:
    if model.engine == "mock" or model.context_length is None or model.context_length <= facts.context_length:
        return []
    return [
        f"{model.name}: context_length {model.context_length} is beyond the model's {facts.context_length}: "
        f"{model.context_length - facts.context_length} tokens too many"
    ]


def _least_gpu(profile: Profile, wanted: list[Demand], known: Mapping[str, ModelFacts]) -> str:
    """How large the GPUs would have to be that aren't there."""
    least = 0
    for demand in wanted:
        facts = known.get(demand.model.name)
        if facts and (demand.count or demand.indices):
            stand_in = simulate((SimulatedGpus("", demand.workers.tensor_parallel, 0),), CpuDevice()).gpus
            devices = tuple(gpu.uuid for gpu in stand_in)
            worker = Placed(demand.label, demand.model, facts, demand.role, devices, stand_in)
            least = max(least, gpu_least_bytes(worker_memory(worker, profile.memory.kv_per_worker)))
    size = round(least / profile.memory.device_fraction)
    return f"; each needs at least {format_size(size)} of memory" if least else ""


def _not_built(profile: Profile, wanted: list[Demand]) -> list[str]:
    reasons: dict[str, None] = {}
    for demand in wanted:
        engine = demand.model.engine
        if engine not in BUILT_ENGINES:
            reasons[f"{demand.model.name}: the {engine} engine is not built yet"] = None
        elif engine == "native" and (demand.count or demand.indices):
            reasons[f"{demand.label}: the native engine on GPUs is not built yet; set devices: cpu"] = None
        if demand.role != "aggregated":
            reasons[f"{demand.label}: {demand.role} workers are not built yet; use aggregated ones"] = None
    if profile.memory.tiers.host or profile.memory.tiers.disk:
        reasons["memory.tiers: KV tiers are not built yet; leave them out"] = None
    if profile.sleep.after_idle is not None:
        reasons["sleep.after_idle: sleeping models are not built yet; leave it out"] = None
    return list(reasons)


def fitting_profiles(hardware: Hardware, facts: Mapping[str, ModelFacts], profiles: Mapping[str, Profile]) -> list[str]:
    """Names of those that can be planned here, simulated ones last."""
    fitting: list[str] = []
    for name, profile in profiles.items():
        try:
            make_plan(profile, hardware, facts, run_dir="")
        except PlanRefused:
            continue
        fitting.append(name)
    return sorted(fitting, key=lambda name: (profiles[name].simulate is not None, name))


def _refusal(
    profile: Profile,
    reasons: list[str],
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    shipped: Callable[[], Mapping[str, Profile]] | None,
) -> PlanRefused:
    fitting = [one for one in fitting_profiles(hardware, facts, shipped()) if one != profile.name] if shipped else []
    remedy = f"shipped profiles that fit this machine: {', '.join(fitting)}" if fitting else None
    return PlanRefused(f"this machine can't carry profile {profile.name}", remedy=remedy, details=tuple(reasons))


def _warnings(profile: Profile, hardware: Hardware, placed: list[Placed]) -> tuple[str, ...]:
    found: list[str] = []
    computing = sum(computes_on_cpu(worker) for worker in placed)
    if computing > hardware.cpu.parallel:
        found.append(f"{computing} workers share {hardware.cpu.parallel} cores: they will slow each other down")
    if profile.simulate:
        found.append("simulated devices: speeds are a timing model's, and answers are not a model's")
    for worker in placed:
        limit = worker.facts.context_length
        if worker.model.engine == "mock" and context_length(worker) > limit:
            found.append(f"{worker.name}: a context beyond the {limit} tokens of the model it borrows from")
    if hardware.gpu_problem:
        found.append(f"GPUs can't be read: {hardware.gpu_problem}")
    return tuple(dict.fromkeys(found))
