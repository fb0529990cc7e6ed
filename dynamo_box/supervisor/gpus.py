"""What GPUs say of themselves, through the functions of `pynvml`.

Each figure is read by itself and None where the driver refuses it. A GPU that is lost and a driver that is dead say so
in `errors`; a driver that comes back (after a reset, say) is read again. Calls may take tens of milliseconds and a
sick driver seconds, so none of this belongs on an event loop.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dynamo_box.snapshot import DeviceFigures
from dynamo_box.supervisor.gpu_errors import GpuErrors, Unusable

ERRORS_EVERY = 10
"""Readings: counts of errors change rarely and are slow to get."""

_THROTTLES = {
    0x004: "power cap",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}
"""Bits of nvmlClocksEventReasons that slow a GPU down against its user's will."""

_SLOWDOWN = 0x008
"""Set along with the hardware's thermal slowdown and power brake, and alone by what has no bit of its own."""


class GpuReader:
    """`devices` are UUIDs, or `index-N` for a GPU without one. One thread at a time; `close` it on the same one."""

    def __init__(self, nvml: Any, devices: Iterable[str]) -> None:
        self._nvml = nvml
        self._driver_gone = (nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        self._gpu_gone = {
            nvml.NVML_ERROR_GPU_IS_LOST: "lost: it has fallen off the bus",
            nvml.NVML_ERROR_RESET_REQUIRED: "unusable until it is reset",
        }
        self._handles: dict[str, Any] = {}
        self._errors = {device: GpuErrors(nvml, self._ask) for device in devices}
        self._is_open = False
        self._readings = 0

    def read(self, box_pids: Collection[int]) -> dict[str, DeviceFigures]:
        """Figures by device; `box_pids` are the processes of this box."""
        if not self._is_open:
            try:
                self._nvml.nvmlInit()
            except self._nvml.NVMLError as error:
                return dict.fromkeys(self._errors, DeviceFigures(errors=(f"NVML: {error}",)))
            self._is_open = True
            self._handles.clear()
            for errors in self._errors.values():
                errors.forget_events()
        count_errors = self._readings % ERRORS_EVERY == 0
        self._readings += 1
        return {device: self._read_device(device, box_pids, count_errors=count_errors) for device in self._errors}

    def close(self) -> None:
        """Idempotent."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(Unusable):  # a dead driver holds nothing
                for errors in self._errors.values():
                    errors.close()
                self._ask(self._nvml.nvmlShutdown)

    def _read_device(self, device: str, box_pids: Collection[int], *, count_errors: bool) -> DeviceFigures:
        errors = self._errors[device]
        try:
            handle = self._handles.get(device)
            if handle is None:
                handle = self._handles[device] = self._handle(device)
                errors.watch(handle)
            errors.take_events()
            if count_errors:
                errors.count(handle)
            return self._figures(handle, errors.words, box_pids)
        except Unusable as error:
            self._handles.pop(device, None)
            return DeviceFigures(errors=(str(error), *errors.words))

    def _handle(self, device: str) -> Any:
        kind, _, index = device.partition("-")
        try:
            if kind == "index" and index.isdecimal():
                return self._nvml.nvmlDeviceGetHandleByIndex(int(index))
            return self._nvml.nvmlDeviceGetHandleByUUID(device)
        except self._nvml.NVMLError as error:
            raise self._unusable(error) from error

    def _figures(self, handle: Any, errors: tuple[str, ...], box_pids: Collection[int]) -> DeviceFigures:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit_mw = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        box, other = attribute(self._held_bytes(handle), box_pids)
        return DeviceFigures(
            used_bytes=None if memory is None else int(memory.used),
            box_bytes=box,
            other_bytes=other,
            utilisation=None if busy is None else busy.gpu / 100,
            power_w=None if power_mw is None else power_mw / 1000,
            power_limit_w=None if limit_mw is None else limit_mw / 1000,
            temperature_c=None if temperature is None else float(temperature),
            throttled=throttles(self._clock_reasons(handle)),
            errors=errors,
        )

    def _clock_reasons(self, handle: Any) -> int:
        """As drivers since 535 call it, or before."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            function = getattr(self._nvml, name, None)
            reasons = None if function is None else self._ask(function, handle)
            if reasons is not None:
                return int(reasons)
        return 0

    def _held_bytes(self, handle: Any) -> dict[int, int | None] | None:
        """Memory by process; a process that computes and draws is in both of the driver's lists."""
        lists = [
            self._ask(function, handle)
            for function in (
                self._nvml.nvmlDeviceGetComputeRunningProcesses,
                self._nvml.nvmlDeviceGetGraphicsRunningProcesses,
            )
        ]
        known = [processes for processes in lists if processes is not None]
        held: dict[int, int | None] = {}
        for each in itertools.chain.from_iterable(known):
            held[each.pid] = held.get(each.pid) if each.usedGpuMemory is None else each.usedGpuMemory
        return held if known else None

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What NVML answers, None for what it refuses.

        Raises:
            Unusable: it's the GPU, or the driver as a whole.
        """
        nvml = self._nvml
        try:
            return function(*arguments)
        except nvml.NVMLError as error:
            if error.value in self._gpu_gone or error.value in self._driver_gone:
                raise self._unusable(error) from error
            return None
        except nvml.NVMLLibraryMismatchError:
            return None

    def _unusable(self, error: Any) -> Unusable:
        if error.value in self._gpu_gone:
            return Unusable(self._gpu_gone[error.value])
        if error.value in self._driver_gone:
            self._is_open = False  # before the next reading it is opened anew: the driver may have come back
        return Unusable(f"NVML: {error}")


def throttles(reasons: int) -> tuple[str, ...]:
    """Why clocks are lower than they could be, in words; idling is no reason."""
    words = tuple(word for bit, word in _THROTTLES.items() if reasons & bit)
    if reasons & _SLOWDOWN and not reasons & 0x0C0:
        words += ("hardware slowdown",)
    return words


def attribute(held: dict[int, int | None] | None, box_pids: Collection[int]) -> tuple[int | None, int | None]:
    """Bytes held by the box and by other processes, None for a sum that can't be known.

    The driver may name processes of another pid namespace, which nobody here can tell apart, and processes whose
    memory it doesn't know. Those are in neither sum, and a sum that has nothing else is None.
    """
    if held is None:
        return None, None
    known = {pid: used for pid, used in held.items() if used is not None and os.path.exists(f"/proc/{pid}")}
    box = sum(used for pid, used in known.items() if pid in box_pids)
    other = sum(known.values()) - box
    if len(known) < len(held):
        return box or None, other or None
    return box, other
