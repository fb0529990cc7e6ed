"""What this machine has: NVIDIA GPUs by NVML when there is a driver, and always the cpu with its memory.

Whatever can't be read is None, never an error: a driver that half works leaves gaps, not a crash. Cores and
memory are what this process may use: its affinity and its cgroups (v1 and v2) count, not the machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dynamo_box.limits import Cgroups, least, lines, meminfo, number

_SWITCH = "NVSwitch"
"""Stands for the PCI bus id of a link's other end, which isn't a GPU's."""


class Gpu(msgspec.Struct, frozen=True):
    """`links` are UUIDs of GPUs reached over NVLink, None where the driver doesn't say; memory in bytes."""

    uuid: str
    index: int
    name: str | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    links: tuple[str, ...] | None = None
    numa: int | None = None
    simulated: bool = False


class CpuDevice(msgspec.Struct, frozen=True):
    """`cores` are the ids this process may run on; `quota` is how many a cgroup lets it use at once."""

    name: str | None = None
    cores: tuple[int, ...] = (0,)
    quota: float | None = None
    memory_total: int | None = None
    memory_available: int | None = None

    @property
    def parallel(self) -> int:
        """Threads that can truly run at once, at least 1."""
        usable = len(self.cores) if self.quota is None else min(len(self.cores), math.floor(self.quota))
        return max(1, usable)


class Hardware(msgspec.Struct, frozen=True):
    """`driver` is the NVIDIA driver's version; `gpu_problem` says why its GPUs can't be read."""

    cpu: CpuDevice
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    gpu_problem: str = ""


class SimulatedGpus(msgspec.Struct, frozen=True):
    name: str
    count: int
    memory: int


def detect() -> Hardware:
    """Look now. Takes milliseconds without a driver."""
    cpu = detect_cpu()
    library = _driver_library()
    if library is None:
        return Hardware(cpu=cpu)
    try:
        import pynvml
    except Exception as error:  # noqa: BLE001 - whatever a broken driver package raises, the box runs on the cpu
        return Hardware(cpu=cpu, gpu_problem=f"pynvml can't be imported: {error}")
    gpus, driver, problem = read_gpus(pynvml)
    return Hardware(cpu=cpu, gpus=gpus, driver=driver, gpu_problem=problem)


def simulate(groups: tuple[SimulatedGpus, ...], cpu: CpuDevice) -> Hardware:
    """Hardware with these GPUs and this cpu. Simulated UUIDs say what they are and never change."""
    gpus: list[Gpu] = []
    for group in groups:
        for _ in range(group.count):
            index = len(gpus)
            uuid = f"SIM-{index:02d}"
            gpus.append(Gpu(uuid, index, group.name, group.memory, group.memory, simulated=True))
    return Hardware(cpu=cpu, gpus=tuple(gpus))


def read_gpus(nvml: Any) -> tuple[tuple[Gpu, ...], str | None, str]:
    """GPUs, driver version and what stood in the way, through the functions of `pynvml`."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return (), None, f"NVML: {error}"
    try:
        driver = _text(_read(nvml, nvml.nvmlSystemGetDriverVersion))
        count = _read(nvml, nvml.nvmlDeviceGetCount)
        if count is None:
            return (), driver, "NVML can't count the GPUs"
        handles = [(index, _read(nvml, nvml.nvmlDeviceGetHandleByIndex, index)) for index in range(count)]
        gpus = [_gpu(nvml, index, handle) for index, handle in handles if handle is not None]
        lost = [str(index) for index, handle in handles if handle is None]
        problem = f"NVML can't open GPU {', '.join(lost)}" if lost else ""
        return _linked(nvml, gpus), driver, problem
    finally:
        _read(nvml, nvml.nvmlShutdown)


def detect_cpu(root: Path = Path("/")) -> CpuDevice:
    """`root` is where /proc and /sys lie; affinity is always this process's own."""
    sizes = meminfo(root)
    groups = Cgroups(root)
    total = least(sizes.get("MemTotal"), groups.memory_limit())
    available = least(sizes.get("MemAvailable"), groups.memory_left())
    return CpuDevice(
        name=_cpu_name(root),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        quota=groups.cpu_quota(),
        memory_total=total,
        memory_available=available,
    )


def _driver_library() -> str | None:
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists():
        return "libnvidia-ml.so.1"
    for directory in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib", "/usr/lib"):
        if Path(directory, "libnvidia-ml.so.1").exists():
            return "libnvidia-ml.so.1"
    return None


def _read(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, None for whatever it refuses: a missing permission, an old driver, a lost GPU."""
    try:
        return function(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError, AttributeError):
        return None


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    uuid = _text(_read(nvml, nvml.nvmlDeviceGetUUID, handle))
    memory = _read(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    bus = _bus_id(nvml, handle)
    return Gpu(
        uuid=uuid or f"index-{index}",
        index=index,
        name=_text(_read(nvml, nvml.nvmlDeviceGetName, handle)),
        memory_total=None if memory is None else int(memory.total),
        memory_free=None if memory is None else int(memory.free),
        links=_link_ends(nvml, handle),
        numa=_numa_node(bus),
    )


def _linked(nvml: Any, gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Links by the UUID of their other end. The NVSwitches of a machine are one fabric: what has a link to one reaches
    everything else that has.
    """
    by_bus: dict[str, str] = {}
    for gpu in gpus:
        handle = _read(nvml, nvml.nvmlDeviceGetHandleByIndex, gpu.index)
        bus = None if handle is None else _bus_id(nvml, handle)
        if bus:
            by_bus[bus] = gpu.uuid

    switched = {gpu.uuid for gpu in gpus if _SWITCH in (gpu.links or ())}

    def named(gpu: Gpu, ends: tuple[str, ...]) -> tuple[str, ...]:
        found = {by_bus[bus] for bus in ends if bus in by_bus}
        return tuple(sorted(found | (switched if gpu.uuid in switched else set()) - {gpu.uuid}))

    return tuple(
        gpu if gpu.links is None else msgspec.structs.replace(gpu, links=named(gpu, gpu.links)) for gpu in gpus
    )


def _bus_id(nvml: Any, handle: Any) -> str | None:
    info = _read(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    text = None if info is None else _text(info.busId)
    return text.lower() if text else None


def _link_ends(nvml: Any, handle: Any) -> tuple[str, ...] | None:
    """PCI bus ids, or _SWITCH, at the other ends of the active links."""
    ends: list[str] = []
    answered = False
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 0)):
        active = _read(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if active is None:
            break
        answered = True
        if active:
            ends.append(_link_end(nvml, handle, link) or "")
    return tuple(filter(None, ends)) if answered else None


def _link_end(nvml: Any, handle: Any, link: int) -> str | None:
    if _read(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return _SWITCH
    info = _read(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
    bus = None if info is None else _text(info.busId)
    return bus.lower() if bus else None


def _numa_node(bus: str | None) -> int | None:
    if bus is None:
        return None
    domain, _, rest = bus.partition(":")
    node = number(Path(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node"))
    return node if node is not None and node >= 0 else None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.split(b"\0")[0].decode(errors="replace") or None
    return str(value) if value else None


def _cpu_name(root: Path) -> str | None:
    for line in lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip() or None
    return None
