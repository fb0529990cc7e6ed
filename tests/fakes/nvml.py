"""NVML as `pynvml` shows it, for a made-up machine. It raises the real package's errors for whatever was not
given, refuses every call outside of init and shutdown, and takes no handle but its own: what the real library
refuses.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass(eq=False)
class FakeGpu:
    """A field that is None can't be read; `lost` is a GPU that fell off the bus; `links` are PCI bus ids, those in
    `switches` of NVSwitches. `compute` and `graphics` are bytes by pid, `retired_pages` addresses by cause; `xids` are
    events that nobody has taken yet.
    """

    uuid: str | None
    name: str | bytes | None = "NVIDIA Fake 80GB"
    total: int | None = 80 << 30
    free: int = 79 << 30
    bus: str | None = None
    links: tuple[str | None, ...] | None = None
    switches: tuple[str, ...] = ()
    lost: bool = False
    reset_required: bool = False
    utilisation: int | None = None
    power_mw: int | None = None
    power_limit_mw: int | None = None
    temperature: int | None = None
    clock_reasons: int | None = None
    compute: dict[int, int | None] | None = field(default_factory=dict)
    graphics: dict[int, int | None] | None = field(default_factory=dict)
    uncorrected_ecc: int | None = None
    remapped_rows: tuple[int, int, int, int] | None = None
    retired_pages: dict[int, list[int]] | None = None
    retirement_pending: int | None = None
    tells_events: bool = True
    xids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class FakeEventSet:
    gpus: list[FakeGpu] = field(default_factory=list)
    freed: bool = False


@dataclass
class FakeNvml:
    gpus: list[FakeGpu]
    driver: str | None = "580.65.06"
    init_error: int | None = None
    count_error: int | None = None
    open: bool = False
    shutdowns: int = 0
    inits: int = 0
    has_event_reasons: bool = True
    lists_processes: bool = True
    """False for a driver that is older than the struct in which pynvml wants its lists."""
    answers: threading.Event = field(default_factory=threading.Event)
    """Cleared: every call hangs."""
    event_sets: list[FakeEventSet] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        """The real package's constants and exceptions; none of its functions."""
        if name.startswith("NVML") or name == "nvmlEventTypeXidCriticalError":
            return getattr(pynvml, name)
        raise AttributeError(f"this fake has no {name}")

    def nvmlInit(self) -> None:
        self.answers.wait()
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open = True
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self._must_be_open()
        self.open = False
        self.shutdowns += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._given(self.driver)

    def nvmlDeviceGetCount(self) -> int:
        self._must_be_open()
        if self.count_error is not None:
            raise pynvml.NVMLError(self.count_error)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        self._must_be_open()
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if self.gpus[index].lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        self._must_be_open()
        found = next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        if found.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return found

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:
        return self._given(self._own(handle).uuid)

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str | bytes:
        return self._given(self._own(handle).name)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> SimpleNamespace:
        total = self._given(self._own(handle).total)
        return SimpleNamespace(total=total, free=handle.free, used=total - handle.free)

    def nvmlDeviceGetPciInfo(self, handle: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(busId=self._given(self._own(handle).bus))

    def nvmlDeviceGetNvLinkState(self, handle: FakeGpu, link: int) -> int:
        links = self._given(self._own(handle).links)
        if link >= len(links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(links[link] is not None)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: FakeGpu, link: int) -> SimpleNamespace:
        links = self._given(self._own(handle).links)
        return SimpleNamespace(busId=self._given(links[link]))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: FakeGpu, link: int) -> int:
        gpu = self._own(handle)
        end = self._given(self._given(gpu.links)[link])
        return pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if end in gpu.switches else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._given(self._own(handle).utilisation), memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: FakeGpu) -> int:
        return self._given(self._own(handle).power_mw)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: FakeGpu) -> int:
        return self._given(self._own(handle).power_limit_mw)

    def nvmlDeviceGetTemperature(self, handle: FakeGpu, sensor: int) -> int:
        gpu = self._own(handle)
        if sensor != pynvml.NVML_TEMPERATURE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._given(gpu.temperature)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeGpu) -> int:
        if not self.has_event_reasons:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return self._given(self._own(handle).clock_reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: FakeGpu) -> int:
        return self._given(self._own(handle).clock_reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> list[SimpleNamespace]:
        return self._processes(self._own(handle).compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeGpu) -> list[SimpleNamespace]:
        return self._processes(self._own(handle).graphics)

    def _processes(self, held: dict[int, int | None] | None) -> list[SimpleNamespace]:
        if not self.lists_processes:
            raise pynvml.NVMLLibraryMismatchError("pyNVML version does not match the NVML lib version")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._given(held).items()]

    def nvmlDeviceGetTotalEccErrors(self, handle: FakeGpu, kind: int, counter: int) -> int:
        gpu = self._own(handle)
        if (kind, counter) != (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._given(gpu.uncorrected_ecc)

    def nvmlDeviceGetRemappedRows(self, handle: FakeGpu) -> tuple[int, int, int, int]:
        return self._given(self._own(handle).remapped_rows)

    def nvmlDeviceGetRetiredPages(self, handle: FakeGpu, cause: int) -> list[int]:
        return self._given(self._own(handle).retired_pages).get(cause, [])

    def nvmlDeviceGetRetiredPagesPendingStatus(self, handle: FakeGpu) -> int:
        return self._given(self._own(handle).retirement_pending)

    def nvmlEventSetCreate(self) -> FakeEventSet:
        self._must_be_open()
        self.event_sets.append(FakeEventSet())
        return self.event_sets[-1]

    def nvmlDeviceRegisterEvents(self, handle: FakeGpu, kinds: int, events: FakeEventSet) -> None:
        gpu = self._own(handle)
        if not gpu.tells_events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if kinds != pynvml.nvmlEventTypeXidCriticalError or events.freed:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        events.gpus.append(gpu)

    def nvmlEventSetWait_v2(self, events: FakeEventSet, timeout_ms: int) -> SimpleNamespace:
        self._must_be_open()
        if events.freed:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        for gpu in events.gpus:
            if gpu.xids:
                kind = pynvml.nvmlEventTypeXidCriticalError
                return SimpleNamespace(device=gpu, eventType=kind, eventData=gpu.xids.pop(0))
        raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)

    def nvmlEventSetFree(self, events: FakeEventSet) -> None:
        self._must_be_open()
        if events.freed:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        events.freed = True

    def _own(self, handle: object) -> FakeGpu:
        self._must_be_open()
        if not isinstance(handle, FakeGpu) or handle not in self.gpus:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if handle.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if handle.reset_required:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_RESET_REQUIRED)
        return handle

    def _given(self, value: Any) -> Any:
        self._must_be_open()
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _must_be_open(self) -> None:
        self.answers.wait()
        if not self.open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
