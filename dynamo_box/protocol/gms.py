"""GPU Memory Service: engine -> gms over its socket, and gms <-> supervisor over the keeper socket that it inherits.

Frames as everywhere; a message that carries file descriptors says how many in `descriptors`, and they travel by
SCM_RIGHTS with its first byte (see `descriptors.py`). Bytes of weights never travel: they are in shared mappings.

A layout is a named set of allocations with entries (names, dtypes, shapes) that lie in them. Its epochs are numbered;
epoch n+1 is built beside n and replaces it at the commit. One connection holds one lock on one layout at most, and the
end of the connection gives it back.

    writer: Acquire → Granted(rw) · Allocate… → Allocated with descriptors · Put… → Done · Commit → Granted(ro)
    reader: Acquire → Granted(ro) · Describe → Manifest pages · Export… → Exported with descriptors
    either: while it waits for a lock, Queued once a second before the answer
"""

from __future__ import annotations

from typing import Literal

import msgspec

Lock = Literal["rw", "ro", "rw_or_ro"]
Place = Literal["device", "host", "disk"]

MAX_DESCRIPTORS = 64
"""With one message; Linux takes 253."""
MAX_LAYOUT_NAME = 200
MAX_ENTRIES_A_PAGE = 4096

# engine -> gms


class Acquire(msgspec.Struct, frozen=True, tag="acquire"):
    """Ask for a lock, waiting for at most `timeout_s`. First message of a connection, and again after Release.

    `owner` is for people (a process of the box); `content` identifies what the layout's bytes are: with rw_or_ro an
    epoch of other content counts as none. `expect_hash` (with ro): the caller can use that layout only. `make_room`
    (with rw, rw_or_ro): give up the committed epoch before the new one is built, if nobody reads it.
    """

    version: int
    owner: str
    layout: str
    lock: Lock
    content: str = ""
    expect_hash: str = ""
    timeout_s: float = 0.0
    make_room: bool = False


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Writer only; all of `sizes` or none. Sizes are rounded up to the granularity."""

    sizes: tuple[int, ...]


class Free(msgspec.Struct, frozen=True, tag="free"):
    """Writer only: take back allocations of the epoch under construction."""

    ids: tuple[int, ...]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor: `offset` bytes into an allocation. `dtype` is the engine's word for it, `stride` counts items."""

    name: str
    allocation: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


class Put(msgspec.Struct, frozen=True, tag="put"):
    """Writer only: a page of entries, at most MAX_ENTRIES_A_PAGE."""

    entries: tuple[Entry, ...]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Writer only, after it has unmapped everything: the epoch is sealed and replaces the one before. Answered, once
    the supervisor keeps it too, by Granted(ro).
    """


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """The manifest from entry number `start` on; answered by one Manifest."""

    start: int = 0


class Export(msgspec.Struct, frozen=True, tag="export"):
    """Descriptors of allocations, at most MAX_DESCRIPTORS at a time: read-only ones for a reader."""

    ids: tuple[int, ...]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Give the lock back; an uncommitted epoch is gone with it. Answered by Done."""


EngineMessage = Acquire | Allocate | Free | Put | Commit | Describe | Export | Release

# gms -> engine


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """Not yet: `ahead` others wait before this one, and `holder` is in the way."""

    ahead: int
    holder: str


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """`lock` is rw or ro. `epoch` is the one under construction (rw) or the committed one (ro)."""

    lock: Literal["rw", "ro"]
    epoch: int
    layout_hash: str = ""
    bytes: int = 0
    granularity: int = 0


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    id: int
    size: int


class Allocated(msgspec.Struct, frozen=True, tag="allocated"):
    allocations: tuple[Allocation, ...]
    descriptors: int = 0


class Manifest(msgspec.Struct, frozen=True, tag="manifest"):
    """`allocations` come with every page."""

    allocations: tuple[Allocation, ...]
    entries: tuple[Entry, ...]
    more: bool


class Exported(msgspec.Struct, frozen=True, tag="exported"):
    ids: tuple[int, ...]
    descriptors: int = 0


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


ErrorCode = Literal[
    "bad_request",
    "version",
    "timeout",
    "too_many_waiters",
    "stale",
    "asleep",
    "out_of_memory",
    "still_mapped",
    "not_allowed",
    "unknown_layout",
    "failed",
]


class GmsError(msgspec.Struct, frozen=True, tag="error"):
    """`stale`: the committed layout is another than expected. `asleep`: its bytes are not on the device."""

    code: ErrorCode
    text: str


ServerMessage = Queued | Granted | Allocated | Manifest | Exported | Done | GmsError

# gms -> supervisor, over the keeper socket: descriptors that outlive the service


class EpochRecord(msgspec.Struct, frozen=True):
    """All that a successor must know of a committed epoch. `allocations` in the order of the descriptors; for place
    disk there are none, and `snapshot` names the directory.
    """

    layout: str
    epoch: int
    layout_hash: str
    content: str
    place: Place
    allocations: tuple[Allocation, ...]
    entries: tuple[Entry, ...]
    snapshot: str = ""


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Hold these descriptors. An epoch of more than MAX_DESCRIPTORS allocations comes in several Keeps of one
    `number`, the last with more=False; only then it replaces what was kept for the same layout (whose descriptors
    are closed before Kept is sent).
    """

    number: int
    record: EpochRecord
    more: bool = False
    descriptors: int = 0


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Close what is kept for a layout; answered by Kept once that is done."""

    number: int
    layout: str


KeeperRequest = Keep | Forget

# supervisor -> gms, over the keeper socket


class Kept(msgspec.Struct, frozen=True, tag="kept"):
    """Answer to a Keep (its last part) or a Forget. `error`: it could not; nothing has changed."""

    number: int
    error: str = ""


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """To a new life of the service, before anything else: what its predecessor had committed; several for an epoch of
    many allocations, as in Keep.
    """

    record: EpochRecord
    more: bool = False
    descriptors: int = 0


class Adopted(msgspec.Struct, frozen=True, tag="adopted"):
    """No further Adopt comes. The service listens from here on."""


KeeperReply = Kept | Adopt | Adopted

engine_decoder = msgspec.msgpack.Decoder(EngineMessage)
server_decoder = msgspec.msgpack.Decoder(ServerMessage)
keeper_request_decoder = msgspec.msgpack.Decoder(KeeperRequest)
keeper_reply_decoder = msgspec.msgpack.Decoder(KeeperReply)

KEEPER_FD_VARIABLE = "DYNBOX_KEEPER_FD"
