"""NVML with what only `doctor` asks: modes, lanes, peers and processes. As strict as the fake that it extends."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
from fakes.nvml import FakeGpu, FakeNvml


@dataclass(eq=False)
class DoctorGpu(FakeGpu):
    """`mig` is current and pending; `users` are bytes (or None) by pid. None: the driver refuses to say."""

    mig: tuple[int, int] | None = None
    compute_mode: int | None = 0
    lanes: int | None = 16
    lanes_possible: int | None = 16
    users: dict[int, int | None] | None = field(default_factory=dict)
    graphics: dict[int, int | None] | None = None
    blocked_peers: tuple[str, ...] = ()


@dataclass
class DoctorNvml(FakeNvml):
    ancestor: int | None = 10

    def nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:
        return list(self._given(self._doctor(handle).mig))

    def nvmlDeviceGetComputeMode(self, handle: FakeGpu) -> int:
        return int(self._given(self._doctor(handle).compute_mode))

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: FakeGpu) -> int:
        return int(self._given(self._doctor(handle).lanes))

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: FakeGpu) -> int:
        return int(self._given(self._doctor(handle).lanes_possible))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> list[SimpleNamespace]:
        return self._processes(self._doctor(handle).users)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeGpu) -> list[SimpleNamespace]:
        return self._processes(self._doctor(handle).graphics)

    def nvmlDeviceGetP2PStatus(self, one: FakeGpu, other: FakeGpu, index: int) -> int:
        first, second = self._doctor(one), self._doctor(other)
        if index != 0 or first is second:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        blocked = second.uuid in first.blocked_peers
        return pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED if blocked else pynvml.NVML_P2P_STATUS_OK

    def nvmlDeviceGetTopologyCommonAncestor(self, one: FakeGpu, other: FakeGpu) -> int:
        self._doctor(one)
        self._doctor(other)
        return int(self._given(self.ancestor))

    def _doctor(self, handle: FakeGpu) -> DoctorGpu:
        gpu = self._own(handle)
        assert isinstance(gpu, DoctorGpu)
        return gpu
