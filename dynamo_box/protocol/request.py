"""What passes over a worker's socket: requests from the frontend, and the router's event subscription.

A peer says Hello first. Stream ids are chosen by the frontend and are unique within its connection. The worker sends
one Step a connection and engine step, whatever the number of sequences that moved. Token ids travel as little-endian
u32 (`pack_tokens`), which is also what the block hash is taken over.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error", "prefilled"]
"""`prefilled` ends a prefill leg: the KV of its prompt is held for another worker, which goes on."""

Leg = Literal["whole", "prefill", "decode"]


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Little-endian u32.

    Raises:
        OverflowError: an id below 0 or above 2**32 - 1.
    """
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`.

    Raises:
        ValueError: not a multiple of four bytes.
    """
    tokens = array("I")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """`peer` is frontend or router; versions must be equal."""

    peer: str
    version: int


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Temperature 0 is greedy. `stop_token_ids` end a sequence as its end-of-sequence token does, unless `ignore_eos`
    (then neither does). Nothing stops before `min_tokens`. A seed makes a request repeatable whatever runs beside it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


class PriorityRange(msgspec.Struct, frozen=True, array_like=True):
    """Tokens from `start` up to but without `end` have KV of this `priority` (0 to 100)."""

    start: int
    end: int
    priority: int


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """The KV of a prompt on its way from the worker that computed it to one that goes on. `key` (16 bytes) names the
    hold on it in the KV tiers, which ends when it is claimed or has expired. It covers the first `tokens` tokens: all
    full blocks by their digests, and the partial last one, if there is one, under the digest `partial`.
    """

    key: bytes
    tokens: int
    partial: bytes = b""


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """`isolation` is the 32-byte key of the block hash (see `dynamo_box.kv.hashing`); `annotations` are the client's
    `nvext.annotations`, passed through to the engine. `kv_priority` (0 to 100) is what the request's KV is worth to the
    tiers, None where nobody said; `kv_priorities` say it for parts of the prompt and go before it.
    """

    id: int
    request_id: str
    tokens: bytes
    sampling: Sampling
    isolation: bytes
    priority: int = 0
    annotations: tuple[str, ...] = ()
    kv_priority: int | None = None
    kv_priorities: tuple[PriorityRange, ...] = ()
    leg: Leg = "whole"
    """`prefill`: compute the prompt, say its first token as soon as it is there, put the prompt's KV where others can
    load it, and end with "prefilled" and a `transfer` (or, if it could not be put there, with neither it nor an error:
    only `error` text says why). A first token that ends the request ends it as usual. `decode`: go on from `transfer`;
    `tokens` are the prompt and that first token."""
    transfer: Transfer | None = None
    transfer_ttl_s: float = 30.0
    """How long what a prefill leg has put there is held for somebody to claim it."""
    must_transfer: bool = False
    """A decode leg that can't load all of `transfer` fails instead of computing what is missing."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The sequence ends with finish reason "cancelled"; a Step says so. Unknown ids are ignored (it may have ended)."""

    id: int


class GiveUp(msgspec.Struct, frozen=True, tag="give_up"):
    """Nobody will go on from the Transfer of this key: what is held for it may be let go of. Any worker of the model
    can do that, whoever computed the prompt. Unknown keys are ignored (it may have been claimed).
    """

    key: bytes


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Send the whole index (KvDump pages), then events from there on. Sent again it starts over, after a gap."""


PeerMessage = Hello | Generate | Cancel | GiveUp | Subscribe


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence.

    With `finish` == "stop" by a token, that token is the last of `tokens`: counted in usage, not shown as text.
    `cached_tokens` (prompt tokens whose KV was reused) is set in the first Delta with a token.
    `error` says why when `finish` == "error"; `rejected` marks an error that is the request's own fault (HTTP 400).
    """

    id: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str = ""
    rejected: bool = False
    transfer: Transfer | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    deltas: list[Delta]


class KvStored(msgspec.Struct, frozen=True, tag="stored"):
    """Blocks now readable in `tier` (g1, g2, g3): consecutive blocks of one chain, `parent` before the first of them.

    Hashes are the first 8 bytes of the block digest as a big-endian unsigned integer.
    """

    event_id: int
    hashes: tuple[int, ...]
    parent: int | None
    tier: str = "g1"


class KvRemoved(msgspec.Struct, frozen=True, tag="removed"):
    event_id: int
    hashes: tuple[int, ...]
    tier: str = "g1"


class KvCleared(msgspec.Struct, frozen=True, tag="cleared"):
    event_id: int
    tier: str = "g1"


KvEvent = KvStored | KvRemoved | KvCleared


class KvDump(msgspec.Struct, frozen=True, tag="dump"):
    """A page of the index as it stood before event `next_event_id`; events from that id on follow the last page
    (`more` is False). A router forgets what it knew of this worker at the page with `first`.
    """

    next_event_id: int
    hashes: tuple[int, ...]
    first: bool
    more: bool
    tier: str = "g1"


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Sent to subscribers when it changes, at most every 50 ms."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The connection is not wanted (version, peer); the worker closes it next."""

    reason: str


WorkerMessage = Step | KvStored | KvRemoved | KvCleared | KvDump | Load | Refused

peer_decoder = msgspec.msgpack.Decoder(PeerMessage)
worker_decoder = msgspec.msgpack.Decoder(WorkerMessage)
