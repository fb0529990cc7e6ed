"""The box at one moment: the one value that feeds `ps`, `--json` and all that shows it. The supervisor builds it."""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.figures import Figures
from dynamo_box.protocol.residency import Residency


class BoxInfo(msgspec.Struct, frozen=True):
    """`endpoint` is `http://HOST:PORT`, without a path; `plan_digest` identifies profile and plan."""

    state: str
    profile: str
    endpoint: str
    pid: int
    uptime_s: float
    run_id: str = ""
    run_dir: str = ""
    logs_dir: str = ""
    plan_digest: str = ""
    cause: str = ""


class Targets(msgspec.Struct, frozen=True):
    """What the profile wants of a model, in seconds: at most this time to the first token and between two, for 99 of a
    hundred. None where it doesn't say.
    """

    ttft_s: float | None = None
    itl_s: float | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """`state` is starting, ready, unavailable, or what its `residency` says beyond that (falling_asleep, asleep,
    waking). `idle_s` is the time since its last request ended: 0 while one runs, None if there has been none.
    """

    name: str
    state: str
    path: str = ""
    workers_ready: int = 0
    workers_total: int = 0
    idle_s: float | None = None
    residency: Residency | None = None
    targets: Targets = Targets()


class Progress(msgspec.Struct, frozen=True):
    done: int | None = None
    total: int | None = None
    unit: str = ""


class ProcessInfo(msgspec.Struct, frozen=True):
    """`pid` is the program's own, None when it isn't running. `cause` says why it last failed."""

    name: str
    kind: str
    model: str | None
    role: str | None
    state: str
    phase: str
    pid: int | None
    restarts: int
    device: str | None
    rss_bytes: int | None
    uptime_s: float | None = None
    progress: Progress | None = None
    cause: str = ""
    guard_pid: int | None = None
    info: dict[str, str] = {}
    figures: Figures | None = None


class DeviceFigures(msgspec.Struct, frozen=True):
    """What a device says of itself, read once a second; None (or nothing in a tuple) is what it doesn't say.

    `used_bytes` is all memory in use on it, `box_bytes` the part that this box's processes hold and `other_bytes` the
    part that other processes do, by the driver's or the kernel's own count; what is in use beyond both is unattributed.
    `utilisation` is a share (0 to 1) of the last second. `throttled` and `errors` are words for people, such as
    "power cap" and "2 uncorrected ECC".
    """

    used_bytes: int | None = None
    box_bytes: int | None = None
    other_bytes: int | None = None
    utilisation: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class DeviceInfo(msgspec.Struct, frozen=True):
    """Planned bytes by purpose, and what the device says now; `figures` is None for one that has no driver. `note` is
    what is amiss with what runs there, for people.
    """

    id: str
    name: str
    kind: str
    memory_bytes: int | None
    planned_bytes: dict[str, int] = {}
    figures: DeviceFigures | None = None
    note: str = ""


class DiskInfo(msgspec.Struct, frozen=True):
    """A file system that the box writes to. `purpose` says what of ours lies there, such as "models, logs"; `box_bytes`
    is how much that is.
    """

    path: str
    purpose: str
    total_bytes: int
    free_bytes: int
    box_bytes: int | None = None


class EventInfo(msgspec.Struct, frozen=True):
    """`seq` only grows; `at` is Unix time; `level` is info, warning or error."""

    seq: int
    at: float
    level: str
    process: str | None
    text: str


class BoxSnapshot(msgspec.Struct, frozen=True):
    """`events` are the most recent, oldest first (at most 200). `host` is the machine itself, whether or
    not a worker runs on the device `cpu`; `at` is Unix time.
    """

    box: BoxInfo
    models: tuple[ModelInfo, ...]
    processes: tuple[ProcessInfo, ...]
    devices: tuple[DeviceInfo, ...] = ()
    events: tuple[EventInfo, ...] = ()
    at: float = 0.0
    host: DeviceFigures | None = None
    host_memory_bytes: int | None = None
    disks: tuple[DiskInfo, ...] = ()

    @property
    def simulated(self) -> bool:
        """Whether there are devices that only a model stands for: speeds are modelled, and answers are no model's."""
        return any(device.kind == "simulated" for device in self.devices)
