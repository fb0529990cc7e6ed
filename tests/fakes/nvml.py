"""NVML as `pynvml` shows it, for a made-up machine. It raises the real package's errors for whatever was not
given, refuses every call outside of init and shutdown, and takes no handle but its own: what the real library
refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass(eq=False)
class FakeGpu:
    """A field that is None can't be read; `lost` is a GPU that fell off the bus; `links` are PCI bus ids."""

    uuid: str | None
    name: str | bytes | None = "NVIDIA Fake 80GB"
    total: int | None = 80 << 30
    free: int = 79 << 30
    bus: str | None = None
    links: tuple[str | None, ...] | None = None
    lost: bool = False


@dataclass
class FakeNvml:
    gpus: list[FakeGpu]
    driver: str | None = "580.65.06"
    init_error: int | None = None
    count_error: int | None = None
    open: bool = False
    shutdowns: int = 0
    NVMLError: Any = pynvml.NVMLError
    NVML_NVLINK_MAX_LINKS: int = 18

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open = True

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

    def _own(self, handle: object) -> FakeGpu:
        self._must_be_open()
        if not isinstance(handle, FakeGpu) or handle not in self.gpus:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return handle

    def _given(self, value: Any) -> Any:
        self._must_be_open()
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _must_be_open(self) -> None:
        if not self.open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
