"""Child <-> supervisor, over the one socket a child inherits.

Up: Starting* (phase, progress) → Ready → Report / Note … ; or Failed and an exit.
Down: Start once, first; then Command with a number that Answer carries back; Drain and Stop.
The end of the stream means that the other side is gone: a child then shuts down.
"""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.figures import Figures, KvStoreFigures, WorkerTiers
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.residency import Act, Residency
from dynamo_box.protocol.spec import ChildSpec

# up


class Starting(msgspec.Struct, frozen=True, tag="starting"):
    """A step of the start. Each one moves the start deadline, so report only real progress.

    `done` of `total` in `unit` ("bytes", "tokens", …) where the phase has an extent.
    """

    phase: str
    done: int | None = None
    total: int | None = None
    unit: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child serves. `info` is shown to people (versions, sizes)."""

    info: dict[str, str] = {}


class Report(msgspec.Struct, frozen=True, tag="report"):
    figures: Figures


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something for the event list; `level` is info, warning or error."""

    level: str
    text: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The child can't serve and is about to exit. `permanent`: a restart would fail in the same way."""

    cause: str
    remedy: str = ""
    permanent: bool = False


class Draining(msgspec.Struct, frozen=True, tag="draining"):
    """Answer to Drain, repeated as `in_flight` falls; at 0 the child exits by itself."""

    in_flight: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The result of a Command; `error` is empty when it worked."""

    id: int
    error: str = ""
    text: str = ""


class Slept(msgspec.Struct, frozen=True, tag="slept"):
    """Worker: the result of Sleep. With an `error` it serves on as before.

    `kv_bytes` and `weights_bytes` are what was resident and mapped before, and is given back or unmapped now.
    """

    id: int
    error: str = ""
    unfinished: int = 0
    kv_bytes: int = 0
    weights_bytes: int = 0
    phases: dict[str, float] = {}


class Woken(msgspec.Struct, frozen=True, tag="woken"):
    """Worker: the result of Wake; it is registered again. With an `error` it is still asleep, and of no use if that is
    `broken`: start it anew. `phases` are seconds, in order: attach, remap, populate, kv, canary, register.
    """

    id: int
    error: str = ""
    broken: bool = False
    phases: dict[str, float] = {}


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """gms: the result of Move. With an `error` the layout is where it was, unless `lost`: then it is gone
    (a damaged snapshot), and a worker has to load the model from its source. `no_room`: what it lacks is memory, of
    which there may be more later. `holders` are processes in the way.
    """

    id: int
    error: str = ""
    lost: bool = False
    bytes: int = 0
    phases: dict[str, float] = {}
    holders: tuple[str, ...] = ()
    no_room: bool = False


class Asked(msgspec.Struct, frozen=True, tag="asked"):
    """Frontend: a client wants this of a model; `Told` answers. `on_demand`: a request waits for the model to wake;
    the answer may be left out of account, since Residencies tell too.
    """

    id: int
    act: Act
    model: str
    to: Place | None = None
    force: bool = False
    hold: bool = False
    drain_s: float = 30.0
    on_demand: bool = False


ChildMessage = Starting | Ready | Report | Note | Failed | Draining | Answer | Slept | Woken | Moved | Asked

# down


class Start(msgspec.Struct, frozen=True, tag="start"):
    spec: ChildSpec


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new, finish what runs until `deadline_s` from now, then exit 0."""

    deadline_s: float


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Exit 0 now; what runs gets an error."""


class Set(msgspec.Struct, frozen=True, tag="set"):
    """Change one setting of a live child (router `mode`, mock `fault`). Unknown keys are answered with an error."""

    id: int
    key: str
    value: str


class CancelRequest(msgspec.Struct, frozen=True, tag="cancel"):
    id: int
    request_id: str


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Worker: take nothing new, withdraw, finish what runs until `drain_s` from now (`force`: cancel it now with the
    error `why`), then give back the KV pool and unmap the weights. Answered by Slept; with requests left at the
    deadline it serves on.
    """

    id: int
    drain_s: float
    force: bool = False
    why: str = ""


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Worker: map the weights again, take memory for KV, answer the canary as before, announce. Answered by Woken."""

    id: int
    deadline_s: float


class Move(msgspec.Struct, frozen=True, tag="move"):
    """gms: bring a committed layout that nobody reads to another place. Answered by Moved."""

    id: int
    layout: str
    place: Place


class SetRole(msgspec.Struct, frozen=True, tag="role"):
    """Worker: take nothing new, withdraw, finish what runs until `drain_s` from now, then serve as `role` (prefill,
    decode, aggregated). Answered by Answer; with requests left at the deadline it serves on as before.
    """

    id: int
    role: str
    drain_s: float


class Residencies(msgspec.Struct, frozen=True, tag="residencies"):
    """Frontend: where every model is, whenever that has changed, and once at the start."""

    models: tuple[Residency, ...]


class Tiers(msgspec.Struct, frozen=True, tag="tiers"):
    """Frontend: what the KV tiers did, for its metrics; once a second if anything changed. `workers` by name."""

    store: KvStoreFigures | None
    workers: dict[str, WorkerTiers]
    models: dict[str, str]
    """The model of each worker."""


class Told(msgspec.Struct, frozen=True, tag="told"):
    """Frontend: how an Asked ended. `code` is an exit code (0: done), `text` for people, `remedy` what to do."""

    id: int
    code: int
    text: str
    remedy: str = ""
    residency: Residency | None = None


ParentMessage = Start | Drain | Stop | Set | CancelRequest | Sleep | Wake | SetRole | Move | Residencies | Tiers | Told

child_decoder = msgspec.msgpack.Decoder(ChildMessage)
parent_decoder = msgspec.msgpack.Decoder(ParentMessage)
