"""How the cores are shared out.

Only workers that compute on the cpu get a share. Two workers whose threads outnumber the cores run at a
fraction of their speed, so shares never overlap while there is a core for each; router and frontend run
wherever there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from dynamo_box.hardware import CpuDevice
from dynamo_box.plan.types import Plan, ProcessPlan
from dynamo_box.protocol.spec import WorkerSpec


class CoreShare(NamedTuple):
    """`cores` to pin to, empty for none."""

    threads: int
    cores: tuple[int, ...] = ()


def share_among(
    cpu: CpuDevice, always: Sequence[str], turns: Sequence[Sequence[str]]
) -> tuple[dict[str, CoreShare], int]:
    """Shares by worker, and how many compute at once at most. The workers of each of `turns` are never awake together
    with those of another, so that they may have the same cores; those of `always` have theirs beside them.
    """
    most = max((len(turn) for turn in turns), default=0)
    found: dict[str, CoreShare] = {}
    if not always:
        for turn in turns:
            found.update(zip(turn, share_cores(cpu, len(turn)), strict=True))
        return found, most
    shares = share_cores(cpu, len(always) + most)
    for turn in turns or ((),):
        found.update(zip((*always, *turn), shares, strict=False))
    return found, len(always) + most


def share_cores(cpu: CpuDevice, workers: int) -> list[CoreShare]:
    """One share for each of `workers`; the first ones get what doesn't divide.

    A lone worker is not pinned, and neither is anyone under a cgroup's quota, which counts time and not
    cores.
    """
    if workers == 0:
        return []
    usable = cpu.parallel
    if workers == 1 or usable < workers or usable < len(cpu.cores):
        return [CoreShare(max(1, usable // workers))] * workers
    each, over = divmod(len(cpu.cores), workers)
    shares: list[CoreShare] = []
    start = 0
    for worker in range(workers):
        count = each + (1 if worker < over else 0)
        shares.append(CoreShare(count, cpu.cores[start : start + count]))
        start += count
    return shares


def with_emptiest_share(
    clone: ProcessPlan, planned: Iterable[ProcessPlan], there: Iterable[ProcessPlan]
) -> ProcessPlan:
    """`clone` on the cores that were `planned` for a worker of its model and that the fewest of those `there` are on:
    on those of one that is gone, if one is.
    """
    on = Counter(process.cores for process in there if process.model == clone.model)
    shares = [clone, *(process for process in planned if process.cores)] if clone.cores else [clone]
    share = min(shares, key=lambda process: on[process.cores])
    assert isinstance(clone.spec, WorkerSpec)
    spec = msgspec.structs.replace(clone.spec, threads=share.threads)
    return msgspec.structs.replace(clone, spec=spec, cores=share.cores, threads=share.threads, env=share.env)


def crowding(plan: Plan, there: Iterable[ProcessPlan], asleep: Collection[str]) -> str:
    """What to say of the workers `there` that compute on the cpu at once, those of models `asleep` left out; "" if
    they have a core for each thread.
    """
    cores = sum(device.cores for device in plan.devices)
    computing = [process for process in there if _computes(process) and process.model not in asleep]
    crowded = cores and sum(process.threads for process in computing) > cores
    return too_many(len(computing), cores) if crowded else ""


def too_many(workers: int, cores: int) -> str:
    return f"{workers} workers share {cores} core{'s' if cores > 1 else ''}: they will slow each other down"


def _computes(process: ProcessPlan) -> bool:
    """As `plan.processes.computes_on_cpu`."""
    spec = process.spec
    return isinstance(spec, WorkerSpec) and spec.device == "cpu" and spec.engine != "mock"
