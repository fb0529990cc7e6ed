"""Frontend <-> router: where should this request go?

A placement is a lease on load: it counts until Release, the end of the connection, or the lease's expiry. Lease ids are
chosen by the frontend and unique within its connection. After a router restart the frontend connects again and
announces what still runs with Adopt.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Place(msgspec.Struct, frozen=True, tag="place"):
    """`hashes` are the prompt's full blocks, in order (first 8 bytes each, big-endian).

    `pin` names the one worker to use; `exclude` names workers that this request has already lost.
    `overlap_weight` and `temperature` override the router's own for this request.
    """

    id: int
    request_id: str
    model: str
    hashes: tuple[int, ...]
    prompt_tokens: int
    pin: str | None = None
    exclude: tuple[str, ...] = ()
    overlap_weight: float | None = None
    temperature: float | None = None
    one_leg: bool = False
    """Don't split it in a prefill and a decode leg: it has been tried, or goes on from an answer begun elsewhere."""


class PrefillLeg(msgspec.Struct, frozen=True, array_like=True):
    """Where the prompt is computed; the fields as in Placed."""

    worker: str
    overlap_blocks: int
    reason: str
    host_blocks: int = 0
    disk_blocks: int = 0


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """`took_us`: microseconds the router spent on the request, of which `match_us` in the index. `overlap_blocks` of
    the prompt are in the worker's own pool, or soon; `host_blocks` and `disk_blocks` more it would load from the tiers.
    """

    id: int
    worker: str
    overlap_blocks: int
    reason: str
    took_us: float = 0.0
    match_us: float = 0.0
    host_blocks: int = 0
    disk_blocks: int = 0
    prefill: PrefillLeg | None = None
    """Compute the prompt there first, and go on at `worker`. None: `worker` does it all."""
    policy: str = ""
    """The disaggregation policy that was in force, "" where no worker of the model is there for one leg alone."""


class Unplaced(msgspec.Struct, frozen=True, tag="unplaced"):
    """`code`: unknown_model, no_workers (none now; one may come), pinned_worker_gone, bad_request."""

    id: int
    code: Literal["unknown_model", "no_workers", "pinned_worker_gone", "bad_request"]
    reason: str
    policy: str = ""
    """The disaggregation policy, where that is what it fails by."""


class Policy(msgspec.Struct, frozen=True, tag="policy"):
    """The disaggregation policy in force, for models that have workers for one leg alone. Sent to every frontend when
    it has connected, and when it is set to another.
    """

    name: str


class PrefillDone(msgspec.Struct, frozen=True, tag="prefill_done"):
    """The first token came: its prompt no longer counts as prefill load."""

    id: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The request ended, in whatever way."""

    id: int


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """These leases are still in use; sent for all live ones well within the lease's time to live."""

    ids: tuple[int, ...]


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """A request that was placed by an earlier router and still runs. `prefill` computes its prompt, "" where `worker`
    does, or that is done.
    """

    id: int
    request_id: str
    model: str
    worker: str
    hashes: tuple[int, ...]
    prompt_tokens: int
    prefill_done: bool
    prefill: str = ""


RouteRequest = Place | PrefillDone | Release | Renew | Adopt
RouteReply = Placed | Unplaced
RouterMessage = RouteReply | Policy

request_decoder = msgspec.msgpack.Decoder(RouteRequest)
router_decoder = msgspec.msgpack.Decoder(RouterMessage)
