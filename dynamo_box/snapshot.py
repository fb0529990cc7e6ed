"""The box at one moment: the one value that feeds `ps`, `--json` and all that shows it. The supervisor builds it."""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.figures import Figures


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


class ModelInfo(msgspec.Struct, frozen=True):
    """`state` is starting, ready or unavailable."""

    name: str
    state: str
    path: str = ""
    workers_ready: int = 0
    workers_total: int = 0


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


class DeviceInfo(msgspec.Struct, frozen=True):
    """Planned bytes by purpose; a device's live figures come with its driver, None where they can't be read."""

    id: str
    name: str
    kind: str
    memory_bytes: int | None
    planned_bytes: dict[str, int] = {}
    used_bytes: int | None = None


class EventInfo(msgspec.Struct, frozen=True):
    """`seq` only grows; `at` is Unix time; `level` is info, warning or error."""

    seq: int
    at: float
    level: str
    process: str | None
    text: str


class BoxSnapshot(msgspec.Struct, frozen=True):
    """`events` are the most recent, oldest first (at most 200)."""

    box: BoxInfo
    models: tuple[ModelInfo, ...]
    processes: tuple[ProcessInfo, ...]
    devices: tuple[DeviceInfo, ...] = ()
    events: tuple[EventInfo, ...] = ()
    at: float = 0.0
