"""How the cores are shared out.

Only workers that compute on the cpu get a share. Two workers whose threads outnumber the cores run at a
fraction of their speed, so shares never overlap while there is a core for each; router and frontend run
wherever there is room.
"""

from __future__ import annotations

from typing import NamedTuple

from dynamo_box.hardware import CpuDevice


class CoreShare(NamedTuple):
    """`cores` to pin to, empty for none."""

    threads: int
    cores: tuple[int, ...] = ()


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
