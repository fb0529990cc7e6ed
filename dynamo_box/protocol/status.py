"""Child <-> supervisor, over the one socket a child inherits.

Up: Starting* (phase, progress) → Ready → Report / Note … ; or Failed and an exit.
Down: Start once, first; then Command with a number that Answer carries back; Drain and Stop.
The end of the stream means that the other side is gone: a child then shuts down.
"""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.figures import Figures
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


ChildMessage = Starting | Ready | Report | Note | Failed | Draining | Answer

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


ParentMessage = Start | Drain | Stop | Set | CancelRequest

child_decoder = msgspec.msgpack.Decoder(ChildMessage)
parent_decoder = msgspec.msgpack.Decoder(ParentMessage)
