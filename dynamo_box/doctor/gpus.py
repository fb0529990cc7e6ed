"""What NVML says of the GPUs, beyond what a plan needs to know: modes, lanes, peers and who holds memory.

Whatever NVML refuses (an old driver, a missing permission, a GPU of another kind) is None.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo_box.doctor import gpu_findings, processes
from dynamo_box.doctor.finding import Finding, failed
from dynamo_box.doctor.gpu_findings import GpuState, GpuUser, Pair
from dynamo_box.doctor.machine import Machine
from dynamo_box.hardware import Gpu, read_gpus

_READ_CAPABILITY = 0
"""NVML_P2P_CAPS_INDEX_READ, which some releases of pynvml define as a tuple, and then refuse."""


def check(machine: Machine) -> list[Finding]:
    if not machine.has_nvidia_driver:
        return []
    try:
        import pynvml
    except ImportError as error:
        return [failed("nvml", f"pynvml can't be imported: {error}", "the box can't see the GPUs")]
    return check_with(pynvml, machine)


def check_with(nvml: Any, machine: Machine) -> list[Finding]:
    """Through the functions of `pynvml`."""
    gpus, _, problem = read_gpus(nvml)
    if not gpus:
        return [gpu_findings.judge_nvml(gpus, problem)]
    states, pairs = read_states(nvml, gpus)
    return [
        gpu_findings.judge_nvml(gpus, problem),
        *gpu_findings.judge_modes(states),
        *gpu_findings.judge_links(gpus, states, pairs),
        gpu_findings.judge_users([_named(machine, state) for state in states], os.getuid()),
    ]


def read_states(nvml: Any, gpus: tuple[Gpu, ...]) -> tuple[list[GpuState], list[Pair]]:
    nvml.nvmlInit()
    try:

        def ask(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (nvml.NVMLError, nvml.NVMLLibraryMismatchError, UnicodeDecodeError):
                return None

        handles = {gpu.index: ask(nvml.nvmlDeviceGetHandleByIndex, gpu.index) for gpu in gpus}
        present = {index: handle for index, handle in handles.items() if handle is not None}
        states = [_state(nvml, ask, index, handle) for index, handle in present.items()]
        pairs = [
            Pair(
                first,
                second,
                ask(nvml.nvmlDeviceGetP2PStatus, one, other, _READ_CAPABILITY),
                ask(nvml.nvmlDeviceGetTopologyCommonAncestor, one, other),
            )
            for (first, one), (second, other) in itertools.combinations(present.items(), 2)
        ]
        return states, pairs
    finally:
        nvml.nvmlShutdown()


def _state(nvml: Any, ask: Callable[..., Any], index: int, handle: Any) -> GpuState:
    mig = ask(nvml.nvmlDeviceGetMigMode, handle)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    lists = [
        ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle),
        ask(nvml.nvmlDeviceGetGraphicsRunningProcesses, handle),
    ]
    users = {process.pid: process.usedGpuMemory for each in lists if each is not None for process in each}
    return GpuState(
        index=index,
        mig=None if mig is None else bool(mig[0]),
        compute_mode=ask(nvml.nvmlDeviceGetComputeMode, handle),
        lanes=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        lanes_possible=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        used_bytes=None if memory is None else int(memory.used),
        users=None if lists == [None, None] else tuple(GpuUser(pid, size) for pid, size in sorted(users.items())),
    )


def _named(machine: Machine, state: GpuState) -> GpuState:
    """With what /proc says of its users."""
    if state.users is None:
        return state
    users = (
        msgspec.structs.replace(
            user,
            name=processes.command(machine, user.pid),
            is_box=processes.box_process(machine, user.pid) is not None,
            uid=processes.uid_of(machine, user.pid),
        )
        for user in state.users
    )
    return msgspec.structs.replace(state, users=tuple(users))
