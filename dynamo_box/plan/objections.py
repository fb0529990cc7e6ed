"""What stands against a plan beside bytes: contexts, engines that aren't built, KV that has no way over. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynamo_box.hardware import CpuDevice, SimulatedGpus, simulate
from dynamo_box.plan.memory import gpu_least_bytes, worker_memory
from dynamo_box.plan.placement import Demand, Placed
from dynamo_box.plan.tiers import TIERED_ENGINES
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.units import format_size

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile, ServedModel

BUILT_ENGINES = frozenset({"native", "mock"})


def context_reasons(model: ServedModel, facts: ModelFacts) -> list[str]:
    if model.engine == "mock" or model.context_length is None or model.context_length <= facts.context_length:
        return []
    return [
        f"{model.name}: context_length {model.context_length} is beyond the model's {facts.context_length}: "
        f"{model.context_length - facts.context_length} tokens too many"
    ]


def least_gpu(profile: Profile, wanted: list[Demand], known: Mapping[str, ModelFacts]) -> str:
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


def not_built(wanted: list[Demand]) -> list[str]:
    reasons: dict[str, None] = {}
    for demand in wanted:
        engine = demand.model.engine
        if engine not in BUILT_ENGINES:
            reasons[f"{demand.model.name}: the {engine} engine is not built yet"] = None
        elif engine == "native" and (demand.count or demand.indices):
            reasons[f"{demand.label}: the native engine on GPUs is not built yet; set devices: cpu"] = None
    return list(reasons)


def no_way_over(profile: Profile, wanted: list[Demand]) -> list[str]:
    """Prefill workers of a box without tiers have no way to hand over what they computed."""
    models = dict.fromkeys(
        demand.model.name for demand in wanted if demand.role != "aggregated" and demand.model.engine in TIERED_ENGINES
    )
    if profile.memory.tiers.host:
        return []
    return [
        f"{name}: prefill workers hand KV to decode workers through the host tier, and there is none; "
        "set memory.tiers.host"
        for name in models
    ]
