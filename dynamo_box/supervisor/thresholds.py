"""When a figure becomes an event: it has crossed a limit, or has come back. Pure.

A crossing counts when the figure is beyond its limit and hasn't been clear of it, by a margin, for a while; a return
when it is clear and hasn't been beyond for longer. So a figure that hovers makes one event, not many and not none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import DeviceFigures, DeviceInfo, DiskInfo
from dynamo_box.wording import size

BEYOND_FOR_S = 3.0
CLEAR_FOR_S = 15.0
ERRORS_PAUSE_S = 60.0
"""Between two events about the errors of one device, whose counts may grow all the time."""

DEVICE_FULL, DEVICE_FREE = 0.95, 0.92
HOST_LOW, HOST_FINE = 0.05, 0.08
DISK_LOW, DISK_FINE = 0.05, 0.06
DISK_LOW_BYTES, DISK_FINE_BYTES = 2 << 30, 3 << 30
POOL_FULL, POOL_FINE = 0.90, 0.75
"""A pool is full when the next prompt doesn't fit any more, which is sooner than at its last block."""
HOT_C, COOL_C = 90.0, 85.0

HARMLESS_THROTTLES = frozenset({"power cap", "sync boost"})
"""A GPU at work normally runs into its power cap."""


@dataclass(frozen=True)
class Reading:
    """One figure against its limit. Neither `beyond` nor `clear` means that it lies in the margin between.

    `crossed` and `returned` say so to people; `process` is whom it is about, if anybody.
    """

    key: str
    beyond: bool
    clear: bool
    crossed: str
    returned: str
    process: str | None = None


@dataclass(frozen=True)
class Crossing:
    """An event to be: `level` is warning or info."""

    level: str
    process: str | None
    text: str


@dataclass
class _Limit:
    """`since` is when the figure went to where it has to stay for a while to count."""

    is_crossed: bool = False
    since: float | None = None


class Thresholds:
    """What has been crossed so far, for the figures that there are now; those that are gone are forgotten."""

    def __init__(self) -> None:
        self._limits: dict[str, _Limit] = {}
        self._errors: dict[str, tuple[frozenset[str], float]] = {}

    def judge(self, readings: Iterable[Reading], now: float) -> list[Crossing]:
        """Crossings since the last call; `now` is any clock's seconds."""
        crossings = []
        before, self._limits = self._limits, {}
        for reading in readings:
            limit = self._limits[reading.key] = before.get(reading.key) or _Limit()
            goes, stays = (reading.clear, reading.beyond) if limit.is_crossed else (reading.beyond, reading.clear)
            if stays:
                limit.since = None
            if not goes:
                continue
            if limit.since is None:
                limit.since = now
            if now - limit.since >= (CLEAR_FOR_S if limit.is_crossed else BEYOND_FOR_S):
                limit.is_crossed, limit.since = not limit.is_crossed, None
                text = reading.crossed if limit.is_crossed else reading.returned
                crossings.append(Crossing("warning" if limit.is_crossed else "info", reading.process, text))
        return crossings

    def judge_errors(self, devices: Iterable[DeviceInfo], now: float) -> list[Crossing]:
        """Errors that weren't there when last told of. One that is gone again may be told of again."""
        crossings = []
        before, self._errors = self._errors, {}
        for device in devices:
            if device.figures is None:
                continue
            told, told_at = before.get(device.id, (frozenset[str](), float("-inf")))
            errors = device.figures.errors
            new = [error for error in errors if error not in told]
            if new and now - told_at >= ERRORS_PAUSE_S:
                crossings.append(Crossing("warning", None, f"{device.id}: {', '.join(new)}"))
                self._errors[device.id] = (frozenset(errors), now)
            else:
                self._errors[device.id] = (told & frozenset(errors), told_at)
        return crossings


def device_readings(devices: Sequence[DeviceInfo]) -> Iterator[Reading]:
    """Memory, heat and throttling of accelerators; the cpu's memory is the host's."""
    for device in devices:
        figures = device.figures
        if figures is None or device.kind != "cuda":
            continue
        if figures.used_bytes is not None and device.memory_bytes:
            share = figures.used_bytes / device.memory_bytes
            yield Reading(
                f"memory of {device.id}",
                beyond=share >= DEVICE_FULL,
                clear=share < DEVICE_FREE,
                crossed=f"{device.id}: memory is {share:.0%} full",
                returned=f"{device.id}: memory is {share:.0%} full again",
            )
        if figures.temperature_c is not None:
            yield Reading(
                f"temperature of {device.id}",
                beyond=figures.temperature_c >= HOT_C,
                clear=figures.temperature_c < COOL_C,
                crossed=f"{device.id}: {figures.temperature_c:.0f} °C",
                returned=f"{device.id}: down to {figures.temperature_c:.0f} °C",
            )
        if figures == DeviceFigures(errors=figures.errors):
            continue  # it says nothing any more, so nothing of its clocks either
        reasons = [reason for reason in figures.throttled if reason not in HARMLESS_THROTTLES]
        yield Reading(
            f"clocks of {device.id}",
            beyond=bool(reasons),
            clear=not reasons,
            crossed=f"{device.id}: throttled: {', '.join(reasons)}",
            returned=f"{device.id}: no longer throttled",
        )


def host_readings(memory_bytes: int | None, available_bytes: int | None) -> Iterator[Reading]:
    """`available_bytes` is the kernel's: what can be had without swapping."""
    if memory_bytes and available_bytes is not None:
        share = available_bytes / memory_bytes
        yield Reading(
            "host memory",
            beyond=share < HOST_LOW,
            clear=share > HOST_FINE,
            crossed=f"host memory runs out: {size(available_bytes)} of {size(memory_bytes)} available",
            returned=f"host memory: {size(available_bytes)} available again",
        )


def disk_readings(disks: Iterable[DiskInfo]) -> Iterator[Reading]:
    for disk in disks:
        if disk.total_bytes <= 0:
            continue
        share = disk.free_bytes / disk.total_bytes
        yield Reading(
            f"disk {disk.path}",
            beyond=share < DISK_LOW or disk.free_bytes < DISK_LOW_BYTES,
            clear=share > DISK_FINE and disk.free_bytes > DISK_FINE_BYTES,
            crossed=f"disk {disk.path} ({disk.purpose}) runs full: {size(disk.free_bytes)} free",
            returned=f"disk {disk.path} ({disk.purpose}): {size(disk.free_bytes)} free again",
        )


def pool_readings(workers: Iterable[tuple[str, WorkerFigures]]) -> Iterator[Reading]:
    """KV pools that are full while requests wait; a full pool that nobody waits for is good use of it."""
    for name, figures in workers:
        if figures.kv_blocks_total <= 0:
            continue
        share = figures.kv_blocks_used / figures.kv_blocks_total
        yield Reading(
            f"KV pool of {name}",
            beyond=share >= POOL_FULL and figures.waiting > 0,
            clear=share < POOL_FINE or figures.waiting == 0,
            crossed=f"KV pool {share:.0%} used, {figures.waiting} requests wait",
            returned=f"KV pool {share:.0%} used, {figures.waiting} requests wait",
            process=name,
        )
