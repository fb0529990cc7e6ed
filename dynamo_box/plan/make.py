"""Profile + hardware + what is known of the models → a plan, or a refusal with every reason.

Pure: nothing here looks at the machine, so the same input gives the same plan, and any hardware can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec import structs

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Hardware, SimulatedGpus, simulate
from dynamo_box.plan.awake_set import Gathering, gather, groups
from dynamo_box.plan.budget import (
    allot,
    capacities,
    contenders,
    device_plans,
    host_reasons,
    sleeping_bytes,
    weights_in_host,
)
from dynamo_box.plan.cores import CoreShare, share_among, too_many
from dynamo_box.plan.memory import (
    FRONTEND_BYTES,
    GMS_BYTES,
    GUARD_BYTES,
    HOST,
    ROUTER_BYTES,
    WorkerMemory,
    context_length,
    gms_name,
    items,
    sharer,
    worker_memory,
)
from dynamo_box.plan.objections import context_reasons, least_gpu, no_way_over, not_built
from dynamo_box.plan.placement import Placed, demands, gpus_needed, place
from dynamo_box.plan.processes import (
    computes_on_cpu,
    frontend_process,
    gms_process,
    model_spec,
    router_process,
    uses_gms,
    worker_processes,
)
from dynamo_box.plan.simulate import simulated
from dynamo_box.plan.tiers import (
    host_bytes,
    kvstore_process,
    tier_plan,
    tier_reasons,
    tier_warnings,
    without_tiers,
)
from dynamo_box.plan.topologies import layouts, passed_over, reasons_of
from dynamo_box.plan.types import Following, ModelPolicy, Plan, RestartPolicy
from dynamo_box.profile.catalogue import facts_for
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.units import format_size
from dynamo_box.profile.wording import escaped
from dynamo_box.snapshot import Targets

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile

LOOK_EVERY_S = 5.0
"""How often a box that follows advice looks for some."""


def make_plan(
    profile: Profile,
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    *,
    run_dir: str,
    snapshots: str = "",
    tiers_directory: str = "",
    variables: Mapping[str, str] = MappingProxyType({}),
    port: int | None = None,
    shipped: Callable[[], Mapping[str, Profile]] | None = None,
) -> Plan:
    """The plan. `facts` are the store's models by name; the catalogue fills in for those not pulled yet,
    whose `ModelSpec.path` is then empty: plan again after the pull.

    `snapshots` is the directory of weights that sleep on disk, `tiers_directory` that of KV where the profile names
    none. `variables` says which environment variable gave a setting. `port` overrides the profile's. `shipped` is
    called on refusal only, for what else this machine could carry.

    Of the topologies of a profile the first one that fits is planned.

    Raises:
        PlanRefused: with all reasons as details.
    """
    tried: dict[str, list[str]] = {}
    planned_for = _planned_hardware(profile, hardware)
    for layout in layouts(profile):
        attempt = _plan(layout.profile, planned_for, facts, run_dir, snapshots, tiers_directory, variables, port)
        reasons = layout.too_small(planned_for)
        reasons += attempt if isinstance(attempt, list) else []
        if not reasons and isinstance(attempt, Plan):
            return structs.replace(attempt, topology=layout.name, passed_over=passed_over(tried))
        tried[layout.name] = reasons
    raise _refusal(profile, reasons_of(tuple(tried.items())), hardware, facts, shipped)


def _plan(
    profile: Profile,
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    run_dir: str,
    snapshots: str,
    tiers_directory: str,
    variables: Mapping[str, str],
    port: int | None,
) -> Plan | list[str]:
    """The plan, or every reason against it."""
    reasons: list[str] = []
    known: dict[str, ModelFacts] = {}
    for model in profile.served:
        found = facts_for(model.origin, facts)
        if found is None:
            origin = escaped(model.origin)
            reasons.append(f"nothing is known of {origin} yet: run `dynbox pull {origin}` first")
        else:
            known[model.name] = found
            reasons += context_reasons(model, found)
    wanted = demands(profile, hardware)
    placed, missing = place(wanted, known, hardware)
    too_few = gpus_needed(wanted) > len(hardware.gpus)
    reasons += [text + least_gpu(profile, wanted, known) for text in missing] if too_few else missing

    memories = [worker_memory(worker, profile.memory.kv_per_worker) for worker in placed]
    used = tuple(dict.fromkeys(device for worker in placed for device in worker.devices))
    policies = _policies(profile, placed)
    gms_devices = tuple(dict.fromkeys(worker.device for worker in placed if uses_gms(worker)))
    host_need = ROUTER_BYTES + FRONTEND_BYTES + 2 * GUARD_BYTES + sum(one.host + GUARD_BYTES for one in memories)
    host_need += len(gms_devices) * (GMS_BYTES + GUARD_BYTES)
    tiers = tier_plan(profile, memories, tiers_directory, variables)
    host_need += sum(item.bytes for item in host_bytes(tiers))
    division = _divide(profile, hardware, memories, policies, used, host_need, tiers.host_bytes if tiers else 0)
    reasons += division.reasons
    reasons += tier_reasons(profile, memories, variables)
    reasons += no_way_over(profile, wanted)
    reasons += not_built(wanted)
    if reasons:
        return reasons

    simulates = profile.simulate is not None
    specs = {model.name: model_spec(model, known[model.name], simulated=simulates) for model in profile.served}
    models = tuple(specs.values())
    capacity, gatherings = division.capacity, division.gatherings
    shares, at_once = _core_shares(memories, division, policies, hardware.cpu)
    host_left = capacity[HOST] - host_need
    return Plan(
        profile=profile.name,
        host=profile.frontend.host,
        port=profile.frontend.port if port is None else port,
        models=models,
        devices=device_plans(hardware, capacity),
        processes=(
            *(
                gms_process(device, _layouts(placed, device), capacity[device], host_left, snapshots, run_dir)
                for device in gms_devices
            ),
            *((kvstore_process(tiers, run_dir),) if tiers else ()),
            router_process(profile.router, profile.disagg, models, tiers, run_dir),
            *worker_processes(memories, division.kv, shares, specs, tiers, run_dir),
            frontend_process(profile.frontend, profile.disagg, models, run_dir, port, simulated=simulates),
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
        warnings=(
            *_warnings(profile, hardware, placed, at_once),
            *_homeless(policies, memories, host_left),
            *tier_warnings(profile, memories, variables),
        ),
        policies=policies,
        awake=gatherings[0].awake,
        origins=dict(tiers.origins) if tiers else {},
        following=Following(
            auto=profile.advise.auto,
            look_every_s=min(LOOK_EVERY_S, profile.advise.lasting),
            lasting_s=profile.advise.lasting,
            settle_s=profile.advise.settle,
            reverse_s=5 * profile.advise.settle,
        ),
        targets={
            model.name: Targets(model.targets.ttft, model.targets.itl)
            for model in profile.served
            if model.targets.model_fields_set
        },
    )


@dataclass(frozen=True)
class Division:
    """What each device may give and who is awake together, with KV bytes by worker; `reasons` speak against it."""

    capacity: Mapping[str, int]
    gatherings: tuple[Gathering, ...]
    kv: Mapping[str, int]
    reasons: tuple[str, ...]


def _divide(
    profile: Profile,
    hardware: Hardware,
    memories: list[WorkerMemory],
    policies: Mapping[str, ModelPolicy],
    used: tuple[str, ...],
    host_need: int,
    host_tier: int,
) -> Division:
    """The host's part (`host_tier` is in `host_need`) has to hold what sleeps there, and what sleeps depends on the
    device's part: where the profile leaves the split open, weights that find no room in the first division are set
    aside in a second.
    """
    labels = {gpu.uuid: f"GPU {gpu.index} ({gpu.uuid})" for gpu in hardware.gpus}
    models = contenders(memories, policies)

    def division(reserve: int) -> tuple[Division, int]:
        capacity, unreadable = capacities(profile.memory, hardware, used, host_need + reserve, host_tier)
        gatherings = gather(models, capacity)
        asleep = sleeping_bytes(memories, policies, gatherings)
        allotment = allot(memories, gatherings, capacity, labels)
        reasons = (*allotment.reasons, *host_reasons(host_need, capacity[HOST], asleep, host_tier))
        return Division(capacity, gatherings, allotment.kv, tuple(unreadable) or reasons), sum(asleep.values())

    first, asleep = division(0)
    if not asleep or not first.reasons or profile.memory.cpu is not None:
        return first
    second, _ = division(asleep)
    return first if second.reasons else second


def _policies(profile: Profile, placed: list[Placed]) -> dict[str, ModelPolicy]:
    services = {worker.model.name: gms_name(worker.device) for worker in placed if uses_gms(worker)}
    found = {}
    for model in profile.served:
        sleep = profile.sleep_of(model)
        found[model.name] = ModelPolicy(
            keep=sleep.keep,
            idle_ttl_s=sleep.idle_ttl,
            pin=sleep.pin,
            min_awake_s=sleep.min_awake,
            gms=services.get(model.name, ""),
        )
    return found


def _layouts(placed: list[Placed], device: str) -> tuple[str, ...]:
    here = (worker.model.name for worker in placed if worker.device == device and uses_gms(worker))
    return tuple(dict.fromkeys(here))


def _core_shares(
    memories: list[WorkerMemory], division: Division, policies: Mapping[str, ModelPolicy], cpu: CpuDevice
) -> tuple[dict[str, CoreShare], int]:
    """Cores by worker; workers that can be awake at the same time never have the same ones."""
    computing = [one.worker for one in memories if computes_on_cpu(one.worker)]
    if len(division.gatherings[0].awake) == len(policies):
        return share_among(cpu, (), [[worker.name for worker in computing]])
    needs = {name: _needs([one for one in memories if one.worker.model.name == name], division.kv) for name in policies}
    pinned = [name for name, policy in policies.items() if policy.pin]
    turns = groups(needs, pinned, division.capacity)
    always = [worker.name for worker in computing if worker.model.name in pinned]
    return share_among(
        cpu, always, [[worker.name for worker in computing if worker.model.name in turn] for turn in turns]
    )


def _needs(memories: list[WorkerMemory], kv: Mapping[str, int]) -> dict[str, int]:
    """What a model takes of each device while it is awake."""
    total: dict[str, int] = {}
    for index, one in enumerate(memories):
        for item in items(one, kv[one.worker.name], sharer(one, memories[:index])):
            if item.device != HOST:
                total[item.device] = total.get(item.device, 0) + item.bytes
    return total


def _homeless(policies: Mapping[str, ModelPolicy], memories: list[WorkerMemory], host_left: int) -> list[str]:
    """Models that are meant to sleep in host memory and find no room there."""
    found = []
    for name, policy in policies.items():
        size = weights_in_host(memories, name)
        if policy.gms and policy.keep == "host" and policy.idle_ttl_s is not None and size > host_left:
            found.append(
                f"{name} can't sleep: its weights take {format_size(size)} of host memory, {format_size(host_left)} "
                "are left; with keep: disk it could"
            )
    return found


def _planned_hardware(profile: Profile, hardware: Hardware) -> Hardware:
    if profile.simulate is None:
        return hardware
    groups = (SimulatedGpus(one.name, one.count, one.memory) for one in profile.simulate.devices)
    return simulate(tuple(groups), hardware.cpu)


def fitting_profiles(hardware: Hardware, facts: Mapping[str, ModelFacts], profiles: Mapping[str, Profile]) -> list[str]:
    """Names of those that can be planned here, simulated ones last."""
    fitting: list[str] = []
    for name, profile in profiles.items():
        if _fits(profile, hardware, facts):
            fitting.append(name)
    return sorted(fitting, key=lambda name: (profiles[name].simulate is not None, name))


def _fits(profile: Profile, hardware: Hardware, facts: Mapping[str, ModelFacts]) -> bool:
    try:
        make_plan(profile, hardware, facts, run_dir="")
    except PlanRefused:
        return False
    return True


def _refusal(
    profile: Profile,
    reasons: tuple[str, ...],
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    shipped: Callable[[], Mapping[str, Profile]] | None,
) -> PlanRefused:
    others = {name: one for name, one in shipped().items() if name != profile.name} if shipped else {}
    where = "these GPUs" if profile.simulate else "this machine"
    if profile.simulate:
        others = {name: simulated(one, profile.simulate.devices, facts) for name, one in others.items()}
    fitting = fitting_profiles(hardware, facts, others)
    remedy = f"shipped profiles that fit {where}: {', '.join(fitting)}" if fitting else None
    if profile.memory.tiers.host and _fits(without_tiers(profile), hardware, facts):
        remedy = "without KV tiers it would fit: set memory.tiers.host lower, or it and memory.tiers.disk to 0"
    return PlanRefused(f"{where} can't carry profile {profile.name}", remedy=remedy, details=reasons)


def _warnings(profile: Profile, hardware: Hardware, placed: list[Placed], computing: int) -> tuple[str, ...]:
    """`computing` workers are awake at once, at most."""
    found: list[str] = []
    if computing > hardware.cpu.parallel:
        found.append(too_many(computing, hardware.cpu.parallel))
    if profile.simulate:
        found.append("simulated devices: speeds are a timing model's, and answers are not a model's")
    for worker in placed:
        limit = worker.facts.context_length
        if worker.model.engine == "mock" and context_length(worker) > limit:
            found.append(f"{worker.name}: a context beyond the {limit} tokens of the model it borrows from")
    if hardware.gpu_problem:
        found.append(f"GPUs can't be read: {hardware.gpu_problem}")
    return tuple(dict.fromkeys(found))
