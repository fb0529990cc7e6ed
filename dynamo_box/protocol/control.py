"""CLI and TUI -> supervisor, over control.sock. One request, one answer; a subscription goes on until it is closed.

The answer to a request carries its `id`. `Down` and `Restart` answer when they are done; until then Talk lines and
snapshots may come. The bodies of snapshots travel as `msgspec.Raw`, so that this package need not know them.
"""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.residency import Residency


class GetSnapshot(msgspec.Struct, frozen=True, tag="get"):
    id: int


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Snapshots when something changed, at most `hz` a second (capped at 4), the first at once."""

    id: int
    hz: float = 4.0


class Down(msgspec.Struct, frozen=True, tag="down"):
    """Drain until `drain_s`, stop in reverse order, exit. Answered by Stopped before the supervisor exits."""

    id: int
    drain_s: float


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """Drain and restart one process; answered when it is ready again, or with an Error."""

    id: int
    process: str
    drain_s: float = 30.0


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Let one worker finish what it runs, until `drain_s`, and stop it; it stays stopped until a restart. Answered
    when nothing of it is left.
    """

    id: int
    process: str
    drain_s: float = 30.0


class SleepModel(msgspec.Struct, frozen=True, tag="sleep"):
    """Let a model's workers finish, until `drain_s` (`force`: cancel what runs), and take its weights `to` a place
    (None: the profile's). `hold`: requests don't wake it. Answered by ModelSlept.
    """

    id: int
    model: str
    to: Place | None = None
    force: bool = False
    hold: bool = False
    drain_s: float = 30.0


class WakeModel(msgspec.Struct, frozen=True, tag="wake"):
    """Answered by ModelWoken once the model serves."""

    id: int
    model: str


class SetRole(msgspec.Struct, frozen=True, tag="role"):
    """Let a worker finish what it runs, until `drain_s`, and have it serve as prefill, decode or aggregated from then
    on, without a restart. Answered by Done.
    """

    id: int
    process: str
    role: str
    drain_s: float = 30.0


class Scale(msgspec.Struct, frozen=True, tag="scale"):
    """Have `count` workers of a model in a role: start more, or let the last ones finish, until `drain_s`, and stop
    them. Answered by Done when they are ready or gone.
    """

    id: int
    model: str
    role: str
    count: int
    drain_s: float = 30.0


class SetOption(msgspec.Struct, frozen=True, tag="set"):
    """Pass a setting to a live child (router `mode`, mock `fault`)."""

    id: int
    process: str
    key: str
    value: str


class CancelRequest(msgspec.Struct, frozen=True, tag="cancel"):
    id: int
    request_id: str


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """First and only request on the socket that a new supervisor inherits from `dynbox up`: carry out this plan
    (`dynamo_box.plan.types.Plan`). Answered by SnapshotReply after SnapshotReply, then Done (the box is ready) or Error
    (nothing is left running). The end of the stream before that aborts the start.
    """

    id: int
    plan: msgspec.Raw


ControlRequest = (
    GetSnapshot
    | Watch
    | Down
    | Restart
    | Drain
    | SleepModel
    | WakeModel
    | SetRole
    | Scale
    | SetOption
    | CancelRequest
    | Launch
)


class SnapshotReply(msgspec.Struct, frozen=True, tag="snapshot"):
    id: int
    snapshot: msgspec.Raw


class Done(msgspec.Struct, frozen=True, tag="done"):
    id: int
    text: str = ""


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """What the box gave back: processes ended, how many needed KILL, resident bytes they held, survivors (none, one
    hopes).
    """

    id: int
    processes: int
    killed: int
    freed_bytes: int
    survivors: tuple[int, ...] = ()


class Error(msgspec.Struct, frozen=True, tag="error"):
    """`code` is the exit code that fits; `details` are further lines, such as the last ones that a process wrote."""

    id: int
    code: int
    what: str
    remedy: str = ""
    details: tuple[str, ...] = ()


class Freed(msgspec.Struct, frozen=True):
    """What a device gave back, by measurement, beside what it should have; `holders` still have some of it."""

    device: str
    expected_bytes: int
    freed_bytes: int
    holders: tuple[str, ...] = ()

    @property
    def fell_short(self) -> bool:
        return bool(self.holders)


class ModelSlept(msgspec.Struct, frozen=True, tag="slept"):
    """`text` for people. `already`: it slept, and nothing was done."""

    id: int
    residency: Residency
    freed: tuple[Freed, ...] = ()
    already: bool = False
    text: str = ""


class ModelWoken(msgspec.Struct, frozen=True, tag="woken"):
    """`residency.cold` says whether it took a cold start, `residency.note` why."""

    id: int
    residency: Residency
    already: bool = False
    text: str = ""


ControlReply = SnapshotReply | Done | Stopped | ModelSlept | ModelWoken | Error

request_decoder = msgspec.msgpack.Decoder(ControlRequest)
reply_decoder = msgspec.msgpack.Decoder(ControlReply)
