"""KV tiers: worker <-> kvstore over its socket. Bytes of KV never travel: they are in a mapping that both have.

Frames as everywhere; the answer to Attach carries one descriptor, the arena's (see `descriptors.py`). A connection
belongs to one KV layout, and everything it holds (slots it writes, leases) ends with it.

    attach: Attach → Attached with the arena
    store:  Reserve → Reserved (slots) · copy into them · Commit → Committed, or Abandon
    pass:   Hold → Held: keep blocks for another worker, which claims them in its Find
    use:    Find → Found (a lease on what is there) · Load → Loaded (disk to slots) · copy out of them · Release

A block is identified by its 16-byte digest (see `dynamo_box.kv.hashing`), which stands for the whole prefix and all
that keeps KV apart. The arena of a layout is one memory file:

    [headers: slots × HEADER_BYTES, padded to SLOT_ALIGNMENT][slot 0][slot 1] …      each slot `slot_bytes` long

In a rehearsal (`KvLayout.modelled`) it ends after the headers: all goes on as with blocks that have bytes.

The store writes a slot's header (`pack_header`) when the block in it is committed and wipes it before the slot is given
to another; a reader compares it before and after its copy and takes nothing that it doubts. All calls are batches; at
most MAX_BATCH blocks each.
"""

from __future__ import annotations

import struct
import zlib
from hashlib import blake2b
from typing import Literal

import msgspec

Tier = Literal["g2", "g3"]
"""g2: host memory; g3: disk. (g1 is the engine's own pool.)"""

HEADER_BYTES = 64
SLOT_ALIGNMENT = 4096
MAX_BATCH = 16_384
"""A longer prompt is not handed over in one hold, nor looked up beyond: 262,144 tokens in blocks of 16."""
MAX_LAYOUTS = 64
MAX_CONNECTIONS = 1024
MAX_HOLDS = 4096
LONGEST_HOLD_S = 600.0
DIGEST_BYTES = 16
LOWEST_PRIORITY, HIGHEST_PRIORITY = 0, 100
MODELLED = "modelled"
"""The `shape` of a layout for rehearsals: its blocks count as `block_bytes` each, and nothing is in them."""
UNSET_PRIORITY_COUNTS_AS = 35
"""For eviction only; the retention priority that TensorRT-LLM gives what nobody set."""

_HEADER = struct.Struct("<8sQ16s16sbxxxI")
_MAGIC = b"DYNBOXKV"


class KvLayout(msgspec.Struct, frozen=True, array_like=True):
    """What blocks must have in common to lie in one arena: bytes of one are bytes of all.

    `shape` is the engine's word for what is inside a block, such as "layers=30,kv=2,tokens=16,heads=3,dim=64".
    """

    fingerprint: str
    kv_dtype: str
    block_size: int
    block_bytes: int
    shape: str

    @property
    def name(self) -> str:
        """32 hex digits: equal only for equal layouts. Also the name of its directory on disk."""
        return blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    @property
    def modelled(self) -> bool:
        return self.shape == MODELLED

    @property
    def slot_bytes(self) -> int:
        """What a slot counts against a tier's capacity."""
        return -(-self.block_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def slot_stride(self) -> int:
        """From one slot of the arena to the next: nothing where there is nothing to lie in them."""
        return 0 if self.modelled else self.slot_bytes

    @property
    def bytes_in_slot(self) -> int:
        """Of a block, in the arena."""
        return 0 if self.modelled else self.block_bytes


class Block(msgspec.Struct, frozen=True, array_like=True):
    """A block as it is offered. `parent` is the digest before it, b"" for the first of a chain; `priority` is 0 to 100,
    None where nobody set one.
    """

    digest: bytes
    parent: bytes = b""
    priority: int | None = None


# worker -> kvstore


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """First message of a connection. `owner` is for people (a process of the box)."""

    version: int
    owner: str
    layout: KvLayout


class Reserve(msgspec.Struct, frozen=True, tag="reserve"):
    """Ask for a slot for each of `blocks`, in chain order."""

    id: int
    blocks: tuple[Block, ...]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The copies into `slots` are complete: they become visible, in this order."""

    id: int
    slots: tuple[int, ...]


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Give reserved `slots` back unwritten. Not answered."""

    slots: tuple[int, ...]


class Find(msgspec.Struct, frozen=True, tag="find"):
    """How much of the chain `digests` is there, from its start without a break; what is found is leased."""

    id: int
    digests: tuple[bytes, ...]
    claim: bytes = b""
    """The key of a hold: what it holds is leased to this connection with the rest, and the hold ends."""


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """Keep these blocks, all of them or none, for whoever claims them by `key` (16 bytes), at most for `ttl_s`. It
    outlives the connection. At most MAX_HOLDS at once.
    """

    id: int
    key: bytes
    digests: tuple[bytes, ...]
    ttl_s: float


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Bring `count` blocks of a lease, from its block `start` on, from disk into slots, and lease those."""

    id: int
    lease: int
    start: int
    count: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The lease is no longer needed. Not answered. Blocks by tier that were `loaded` into an engine's pool, `failed` a
    check there, or were leased and `wasted` (the engine went without).
    """

    lease: int
    loaded: dict[Tier, int] = {}
    failed: dict[Tier, int] = {}
    wasted: dict[Tier, int] = {}


class Distrust(msgspec.Struct, frozen=True, tag="distrust"):
    """These slots held something else than was found: forget what is said to be in them. Not answered."""

    slots: tuple[int, ...]


WorkerRequest = Attach | Reserve | Commit | Abandon | Find | Hold | Load | Release | Distrust

# kvstore -> worker


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """With the arena's descriptor. `slots` is 0 where the host tier has no room for a single block of this layout: then
    nothing can be stored or found. `slot_bytes` is the layout's `slot_stride`.
    """

    slots: int
    slot_bytes: int
    headers_bytes: int
    arena_bytes: int
    descriptors: int = 1


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The connection is of no use, now or (`permanent`) ever; the store closes it next."""

    reason: str
    permanent: bool = False


class Reserved(msgspec.Struct, frozen=True, tag="reserved"):
    """For each block: the slot to fill; KNOWN if a tier has it already (its priority was raised if need be, and it
    counts as used); BUSY if somebody else is writing it; FULL if nothing may be evicted for it.
    """

    id: int
    slots: tuple[int, ...]


KNOWN, BUSY, FULL = -1, -2, -3


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    """`generations` by slot; `lost` are slots that weren't this connection's to commit."""

    id: int
    generations: tuple[int, ...]
    lost: tuple[int, ...] = ()


class Found(msgspec.Struct, frozen=True, tag="found"):
    """`tiers` has one letter for each block found, in order: "2" (in a slot now) or "3" (on disk only). `slots` and
    `generations` are those of "2" blocks, -1 and 0 for the others; `priorities` are the blocks' own. `lease` is 0 if
    nothing was found.
    """

    id: int
    lease: int
    tiers: str
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    priorities: tuple[int | None, ...] = ()


class Held(msgspec.Struct, frozen=True, tag="held"):
    """`error` is "" or why nothing is held."""

    id: int
    error: str = ""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Slots and generations of the first blocks that were asked for, as far as all went well; `error` says why it
    stopped there. `took_s` is the disk's part.
    """

    id: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    took_s: float
    error: str = ""


StoreReply = Attached | Refused | Reserved | Committed | Found | Held | Loaded

request_decoder = msgspec.msgpack.Decoder(WorkerRequest)
reply_decoder = msgspec.msgpack.Decoder(StoreReply)


def arena_headers_bytes(slots: int) -> int:
    """Bytes before slot 0."""
    return -(-slots * HEADER_BYTES // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def pack_header(generation: int, digest: bytes, parent: bytes, priority: int | None) -> bytes:
    """HEADER_BYTES, closed by a CRC-32 of what is before it. `generation` is new each time a slot gets a block."""
    level = -1 if priority is None else priority
    body = _HEADER.pack(_MAGIC, generation, digest, parent.ljust(DIGEST_BYTES, b"\0"), level, 0)
    body = body[: _HEADER.size - 4]
    return (body + zlib.crc32(body).to_bytes(4, "little")).ljust(HEADER_BYTES, b"\0")


def header_names(header: bytes | memoryview, generation: int, digest: bytes) -> bool:
    """Whether a slot with this header holds that block, in that generation."""
    body, checksum = bytes(header[: _HEADER.size - 4]), bytes(header[_HEADER.size - 4 : _HEADER.size])
    if zlib.crc32(body).to_bytes(4, "little") != checksum:
        return False
    magic, held_generation, held_digest, *_ = _HEADER.unpack(body + checksum)
    return bool(magic == _MAGIC and held_generation == generation and held_digest == digest)
