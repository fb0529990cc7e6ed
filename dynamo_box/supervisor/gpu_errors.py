"""What has gone wrong on a GPU, in words: Xids as they come, ECC errors and bad memory as the driver counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KEPT_XIDS = 4
MAX_EVENTS = 16
"""A reading takes at most this many; the rest waits for the next."""


class Unusable(Exception):
    """Nothing can be read of a GPU now; the text says why."""


class GpuErrors:
    """Of one GPU. `ask` calls a function of NVML and gives None for what it refuses; it raises Unusable."""

    def __init__(self, nvml: Any, ask: Callable[..., Any]) -> None:
        self._nvml = nvml
        self._ask = ask
        self._events: Any = None
        self._counted: tuple[str, ...] = ()
        self._xids: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """All that is known; Xids since the supervisor started, the most recent last."""
        return self._counted + self._xids

    def watch(self, handle: Any) -> None:
        """Hear of Xid errors from now on. Not every GPU tells, nor does every container let it."""
        nvml = self._nvml
        if self._events is None:
            self._events = self._ask(nvml.nvmlEventSetCreate)
        if self._events is not None:
            self._ask(nvml.nvmlDeviceRegisterEvents, handle, nvml.nvmlEventTypeXidCriticalError, self._events)

    def take_events(self) -> None:
        """Those that have come since; doesn't wait."""
        for _ in range(MAX_EVENTS):
            event = None if self._events is None else self._ask(self._nvml.nvmlEventSetWait_v2, self._events, 0)
            if event is None:
                return
            if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                word = f"Xid {event.eventData}"
                self._xids = (*(each for each in self._xids if each != word), word)[-KEPT_XIDS:]

    def count(self, handle: Any) -> None:
        """Look at the driver's counters; a GPU without ECC has none."""
        nvml, ask = self._nvml, self._ask
        uncorrected = ask(
            nvml.nvmlDeviceGetTotalEccErrors, handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        _, rows, row_pending, row_failed = ask(nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
        pages = sum(
            len(ask(nvml.nvmlDeviceGetRetiredPages, handle, cause) or ())
            for cause in (
                nvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
                nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
            )
        )
        pages_pending = ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
        found = {
            f"{uncorrected} uncorrected ECC": uncorrected,
            f"{rows} remapped rows": rows,
            f"{pages} retired pages": pages,
            "row remapping failed": row_failed,
            "memory repair waits for a GPU reset": row_pending or pages_pending,
        }
        self._counted = tuple(word for word, is_there in found.items() if is_there)

    def forget_events(self) -> None:
        """NVML was opened anew: what it gave out before is void."""
        self._events = None

    def close(self) -> None:
        if self._events is not None:
            self._ask(self._nvml.nvmlEventSetFree, self._events)
            self._events = None
