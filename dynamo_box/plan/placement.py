"""Which worker runs on which device.

Workers of one role share out its devices, `tensor_parallel` to a replica, so that fewer devices than replicas
mean that replicas share. Devices asked for by number are nobody else's; those named by index may be named
again elsewhere, by a person who knows why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.hardware import Gpu, Hardware
from dynamo_box.profile.facts import ModelFacts

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile, RoleWorkers, ServedModel

CPU = "cpu"


@dataclass(frozen=True)
class Placed:
    """One worker on its devices: `("cpu",)`, or as many GPUs as it spans."""

    name: str
    model: ServedModel
    facts: ModelFacts
    role: str
    devices: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()

    @property
    def simulated(self) -> bool:
        return any(gpu.simulated for gpu in self.gpus)

    @property
    def device(self) -> str:
        return ",".join(self.devices)


@dataclass(frozen=True)
class Demand:
    """What one role of one model asks for: `count` GPUs, or those at `indices`; neither means the cpu."""

    model: ServedModel
    role: str
    workers: RoleWorkers
    count: int = 0
    indices: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.model.name}.{self.role}"


def demands(profile: Profile, hardware: Hardware) -> list[Demand]:
    simulated = any(gpu.simulated for gpu in hardware.gpus)
    return [
        _demand(model, role, workers, simulated) for model in profile.served for role, workers in model.workers.roles
    ]


def place(wanted: list[Demand], facts: Mapping[str, ModelFacts], hardware: Hardware) -> tuple[list[Placed], list[str]]:
    """Workers in the order of the profile, and what is missing. `facts` are by the name a model is served
    under.
    """
    missing = _missing_gpus(wanted, hardware)
    if missing:
        return [], missing
    by_index = {gpu.index: gpu for gpu in hardware.gpus}
    named = {index for demand in wanted for index in demand.indices}
    free = [gpu for gpu in hardware.gpus if gpu.index not in named]
    placed: list[Placed] = []
    for demand in wanted:
        span = demand.workers.tensor_parallel
        if demand.indices:
            gpus = [by_index[index] for index in demand.indices]
            groups = [tuple(gpus[at : at + span]) for at in range(0, len(gpus), span)]
        else:
            groups = [_take_close(free, span) for _ in range(demand.count // span)]
        placed += _replicas(demand, facts.get(demand.model.name), groups)
    return placed, []


def gpus_needed(wanted: list[Demand]) -> int:
    named = {index for demand in wanted for index in demand.indices}
    return len(named) + sum(demand.count for demand in wanted)


def _demand(model: ServedModel, role: str, workers: RoleWorkers, simulated: bool) -> Demand:
    devices = workers.devices
    if isinstance(devices, tuple):
        return Demand(model, role, workers, indices=devices)
    if isinstance(devices, int):
        return Demand(model, role, workers, count=devices)
    on_cpu = devices == CPU or model.engine == "native" or (model.engine == "mock" and not simulated)
    return Demand(model, role, workers, count=0 if on_cpu else workers.replicas * workers.tensor_parallel)


def _missing_gpus(wanted: list[Demand], hardware: Hardware) -> list[str]:
    have = len(hardware.gpus)
    need = gpus_needed(wanted)
    why = hardware.gpu_problem and f" ({hardware.gpu_problem})"
    if need > have:
        asked = ", ".join(
            f"{demand.label} {demand.count or len(demand.indices)}"
            for demand in wanted
            if demand.count or demand.indices
        )
        return [f"needs {_gpus(need)} ({asked}), this machine has {have or 'none'}{why}: {need - have} missing"]
    indices = {gpu.index for gpu in hardware.gpus}
    return [
        f"{demand.label} asks for GPU {index}; this machine has {', '.join(map(str, sorted(indices)))}"
        for demand in wanted
        for index in demand.indices
        if index not in indices
    ]


def _take_close(free: list[Gpu], span: int) -> tuple[Gpu, ...]:
    """The first free GPU and those best connected to it: by NVLink, then in the same NUMA node."""
    first = free.pop(0)
    free.sort(key=lambda gpu: (gpu.uuid not in (first.links or ()), gpu.numa != first.numa, gpu.index))
    group = (first, *free[: span - 1])
    del free[: span - 1]
    free.sort(key=lambda gpu: gpu.index)
    return group


def _replicas(demand: Demand, facts: ModelFacts | None, groups: list[tuple[Gpu, ...]]) -> Iterator[Placed]:
    if facts is None:
        return
    for replica in range(demand.workers.replicas):
        gpus = groups[replica % len(groups)] if groups else ()
        devices = tuple(gpu.uuid for gpu in gpus) or (CPU,)
        name = f"{demand.label}.{replica}"
        yield Placed(name, demand.model, facts, demand.role, devices, gpus)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
