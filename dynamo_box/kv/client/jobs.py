"""What passes between an engine and its `Tiers`: jobs go in, and each comes back as one result, whatever becomes of the
store.

    Offer  → Offered    copy these blocks of the pool into the host tier; they must not change until Offered
    Seek   → Sought     how much of this chain do the tiers have? what is found is leased
    Fetch  → Fetched    copy what a lease holds into these blocks of the pool; they must not be touched until Fetched
    Keep   → Kept       hold what was offered before (in the same order) for another worker to claim
    Forgo  (no result)  give a lease back unused

A `Sought` with a lease is followed by one Fetch or one Forgo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dynamo_box.protocol.kv import Block


class Copier(Protocol):
    """The engine's part: bytes of pool blocks from and to slots of the arena. Called on the threads of `Tiers`, without
    the engine's knowledge; errors are counted and end the job. `slots` are writable (readable) views of one block's
    bytes each, in the order of `blocks`.
    """

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        """Pool to arena."""

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        """Arena to pool."""

    def prepare(self) -> bool:
        """Called while there is nothing to copy: a little work that makes later copies into the pool faster. False if
        there is none.
        """


@dataclass(frozen=True, slots=True)
class Offer:
    """`pool_blocks` are where the `blocks` lie. `key` is the caller's."""

    key: int
    pool_blocks: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    """`stored` went over, `known` were there; `dropped` by reason: store_full, store_busy, store_gone, copy_failed."""

    key: int
    stored: int = 0
    known: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Keep:
    """Goes behind the Offers before it. `hold` is the key by which it is claimed (16 bytes)."""

    key: int
    hold: bytes
    digests: tuple[bytes, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Kept:
    """`error` is "" or why nothing is held."""

    key: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Seek:
    """`claim` is the key of a hold that ends with this. Without digests that is all."""

    key: int
    digests: tuple[bytes, ...]
    claim: bytes = b""


@dataclass(frozen=True, slots=True)
class Sought:
    """`tiers` has a letter for each block found, "2" or "3", from the first digest on without a break; `lease` is 0 if
    it is empty. `priorities` are those that the blocks were stored with. `error` says why nothing could be asked.
    """

    key: int
    tiers: str = ""
    lease: int = 0
    priorities: tuple[int | None, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy `len(pool_blocks)` blocks of the lease, from its block `skip` on: the pool has those before by now. The rest
    of it is given back.
    """

    key: int
    lease: int
    pool_blocks: tuple[int, ...]
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """The first `count` blocks are in the pool and are right; those after them hold anything. `failed_tier` is where
    the next one was lost, "" if none was. Bytes and seconds by tier letter are those of the copies, for "3" with the
    disk's part.
    """

    key: int
    count: int
    failed_tier: str = ""
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Forgo:
    """`recomputed` by choice; otherwise the request ended first."""

    lease: int


Result = Offered | Kept | Sought | Fetched


class Source(Protocol):
    """Of blocks that are in the tiers: what an engine needs of `dynamo_box.kv.client.tiers.Tiers` to load them."""

    def seek(self, job: Seek) -> None: ...

    def fetch(self, job: Fetch) -> None: ...

    def forgo(self, job: Forgo) -> None: ...

    def rates(self) -> dict[str, float | None]: ...

    @property
    def status(self) -> str: ...
