"""Devices, host and disks as they were a moment ago: read in the background once a second, shown in every snapshot."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dynamo_box.plan.types import DevicePlan
from dynamo_box.snapshot import DeviceFigures, DiskInfo
from dynamo_box.supervisor.background import Background
from dynamo_box.supervisor.disks import DiskReader
from dynamo_box.supervisor.gpus import GpuReader
from dynamo_box.supervisor.guard import descendants
from dynamo_box.supervisor.host import HostReader, HostSample

SILENT_DRIVER = DeviceFigures(errors=("the driver doesn't answer",))


class DeviceSampler:
    """`changed` is called after each reading, `emit(level, text)` when one can't be done. `load_nvml` gives pynvml, and
    is called, in a thread, only if there are GPUs. `sizes`: see `DiskReader`.
    """

    def __init__(
        self,
        devices: Iterable[DevicePlan],
        directories: Mapping[str, Path],
        *,
        changed: Callable[[], None],
        emit: Callable[[str, str], None],
        load_nvml: Callable[[], Any],
        sizes: Mapping[str, Callable[[], int | None]] | None = None,
    ) -> None:
        self._emit = emit
        self._complaints: set[str] = set()
        self._kinds = {device.id: device.kind for device in devices}
        host, disks = HostReader(os.sched_getaffinity(0)), DiskReader(directories, sizes)
        gpus = _Gpus([device for device, kind in self._kinds.items() if kind == "cuda"], load_nvml)
        self._host = Background("host", lambda: host.read(box_pids()), changed=changed, failed=self._on_failure)
        self._disks = Background("disks", disks.read, changed=changed, failed=self._on_failure)
        self._gpus = Background("GPUs", gpus.read, changed=changed, failed=self._on_failure, finish=gpus.close)

    def tick(self) -> None:
        """Once a second."""
        self._host.ask()
        self._disks.ask()
        if "cuda" in self._kinds.values():
            self._gpus.ask()

    async def close(self) -> None:
        await asyncio.gather(*(readings.close() for readings in (self._host, self._disks, self._gpus)))

    def figures(self, device: str) -> DeviceFigures | None:
        """Of one of the plan's devices; None for one without a driver, and before the first reading."""
        match self._kinds[device]:
            case "cpu":
                return None if self.host is None else self.host.figures
            case "cuda" if self._gpus.is_stalled:
                return SILENT_DRIVER
            case "cuda":
                return (self._gpus.latest or {}).get(device)
            case _:
                return None

    @property
    def host(self) -> HostSample | None:
        return self._host.latest

    @property
    def disks(self) -> tuple[DiskInfo, ...]:
        return self._disks.latest or ()

    def _on_failure(self, name: str, error: Exception) -> None:
        """Nobody foresaw it; said once."""
        if name not in self._complaints:
            self._complaints.add(name)
            self._emit("warning", f"the figures of {name} can't be read: {type(error).__name__}: {error}")


class _Gpus:
    """The reader, made in the thread that uses it: importing pynvml takes a while."""

    def __init__(self, devices: list[str], load_nvml: Callable[[], Any]) -> None:
        self._devices = devices
        self._load_nvml = load_nvml
        self._reader: GpuReader | None = None

    def read(self) -> Mapping[str, DeviceFigures]:
        if self._reader is None:
            self._reader = GpuReader(self._load_nvml(), self._devices)
        return self._reader.read(frozenset(box_pids()))

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


def load_pynvml() -> Any:
    import pynvml

    return pynvml


def box_pids() -> list[int]:
    """The supervisor and everything below it."""
    own = os.getpid()
    return [own, *descendants(own)]
