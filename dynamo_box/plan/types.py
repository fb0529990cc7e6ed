"""A plan: frozen data that the supervisor carries out as it stands, and that `dynbox up --dry-run` prints."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.spec import ChildSpec, ModelSpec
from dynamo_box.snapshot import Targets


class ByteItem(msgspec.Struct, frozen=True):
    """Bytes on one device (or "host") for one purpose, with the arithmetic as text: "30 layers × 2 × 3 heads × …"."""

    device: str
    purpose: str
    bytes: int
    arithmetic: str


class RestartPolicy(msgspec.Struct, frozen=True):
    """Back-off starts at `first_s`, grows by `factor` up to `longest_s`, and starts over after `stable_s` of ready.

    After `give_up_after` failures in a row the process is FATAL. A ready process that gives no sign of life for
    `silence_s` is frozen: it is killed, which counts as a failure.
    """

    first_s: float = 0.5
    factor: float = 2.0
    longest_s: float = 30.0
    stable_s: float = 60.0
    give_up_after: int = 5
    silence_s: float = 20.0


class ProcessPlan(msgspec.Struct, frozen=True):
    """One child of the supervisor.

    `program` is an argument list ("python" at its head stands for the interpreter of `venv`, None being the box's own).
    `device` is a device id of the plan ("cpu", or a GPU UUID; several joined by ","), None for a process without one.
    `start_deadline_s` is how long it may go without progress while it starts.
    """

    name: str
    kind: str
    program: tuple[str, ...]
    spec: ChildSpec
    model: str | None = None
    role: str | None = None
    device: str | None = None
    venv: str | None = None
    env: dict[str, str] = {}
    cores: tuple[int, ...] = ()
    threads: int = 1
    start_deadline_s: float = 60.0
    after: tuple[str, ...] = ()
    memory: tuple[ByteItem, ...] = ()


class DevicePlan(msgspec.Struct, frozen=True):
    """`kind` is cpu, cuda, simulated or host; `capacity_bytes` is what the plan may give away of it.

    "host" is the memory of interpreters, libraries and KV tiers, apart from what the cpu device holds.
    """

    id: str
    name: str
    kind: str
    memory_bytes: int | None
    capacity_bytes: int
    cores: int = 0
    """Of the cpu: how many threads can run at once. 0 where workers don't compute with threads of their own."""


class ModelPolicy(msgspec.Struct, frozen=True):
    """When a model sleeps, and where its weights go. `pin`: never by itself, nor for another's sake. `min_awake_s`: so
    long after waking it isn't put to sleep for another's sake or for want of requests. `gms` names the process that
    holds its weights, "" where its engine can't sleep: then sleep stops its workers, and wake starts them.
    """

    keep: Place = "host"
    idle_ttl_s: float | None = None
    pin: bool = False
    min_awake_s: float = 0.0
    gms: str = ""


class Following(msgspec.Struct, frozen=True):
    """Whether the box follows advice by itself. It looks every `look_every_s`; advice has to last for `lasting_s`, the
    last change has to be `settle_s` ago, and `reverse_s` if it is to be undone.
    """

    auto: bool = False
    look_every_s: float = 5.0
    lasting_s: float = 30.0
    settle_s: float = 60.0
    reverse_s: float = 300.0


class Plan(msgspec.Struct, frozen=True):
    """`processes` are in start order; stopping goes the other way round.

    `after` in a process names those that must be ready before it starts; all others start at once, in order, but for
    workers of models that are not `awake`: those are started one model after the other before the rest, prove
    themselves and sleep. `policies` has one for each model.
    """

    profile: str
    host: str
    port: int
    models: tuple[ModelSpec, ...]
    devices: tuple[DevicePlan, ...]
    processes: tuple[ProcessPlan, ...]
    restart: RestartPolicy = RestartPolicy()
    drain_s: float = 30.0
    warnings: tuple[str, ...] = ()
    policies: dict[str, ModelPolicy] = {}
    awake: tuple[str, ...] = ()
    origins: dict[str, str] = {}
    """Of the settings of KV tiers: the environment variable each came from, "profile", or "default"."""
    following: Following = Following()
    topology: str = ""
    """Which of the profile's topologies this is; "" where it has none."""
    passed_over: tuple[str, ...] = ()
    """Those before it, with what stood against each."""
    targets: dict[str, Targets] = {}
    """By model; those without any are left out."""

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def simulated(self) -> bool:
        return any(device.kind == "simulated" for device in self.devices)

    @property
    def digest(self) -> str:
        """16 hex digits that change whenever anything in the plan does."""
        return blake2b(msgspec.msgpack.encode(self), digest_size=8).hexdigest()

    @property
    def memory(self) -> tuple[ByteItem, ...]:
        return tuple(item for process in self.processes for item in process.memory)
