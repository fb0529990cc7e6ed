"""What children report of themselves, at most four times a second. They go into the snapshot as they are.

Counters only grow within one life of a process; gauges say "now"; a figure that can't be read is None, never 0.
"""

from __future__ import annotations

import msgspec

from dynamo_box.protocol.spec import Disagg


class Quantiles(msgspec.Struct, frozen=True):
    """Seconds over a sliding window of recent requests; None when the window is empty."""

    p50: float | None = None
    p99: float | None = None


class TierUse(msgspec.Struct, frozen=True):
    """Prompt tokens that a worker `matched` in one tier, of those `loaded` into its pool, `failed` (gone, late or
    damaged: computed instead) and `wasted` (matched but not loaded, since computing was faster or the request ended).
    `bytes` and `seconds` are those of the copies that succeeded.
    """

    matched: int = 0
    loaded: int = 0
    failed: int = 0
    wasted: int = 0
    bytes: int = 0
    seconds: float = 0.0


class WorkerTiers(msgspec.Struct, frozen=True):
    """A worker's dealings with the KV tiers, in blocks where nothing else is said.

    `connected` is "" or why the tiers are off here. `offloaded` went to the host tier, `known` were there already;
    `dropped` never went, by reason (queue_full, evicted, store_full, store_gone, copy_failed); `filtered` were kept out
    by their priority; `unset` were allowed for want of one; `terminated` counts requests whose offload stopped, by
    reason (priority, length_mismatch).
    """

    connected: str = "not yet"
    queued: int = 0
    pinned: int = 0
    offloaded: int = 0
    offloaded_bytes: int = 0
    offload_seconds: float = 0.0
    known: int = 0
    dropped: dict[str, int] = {}
    filtered: int = 0
    unset: int = 0
    terminated: dict[str, int] = {}
    min_priority: int = 0
    host: TierUse = TierUse()
    disk: TierUse = TierUse()
    loads: int = 0
    recomputes: int = 0
    """Decisions to load, and to compute although something was found."""


class WorkerFigures(msgspec.Struct, frozen=True, tag="worker"):
    """`kv_blocks_used` are held by sequences; `kv_blocks_cached` are held by none and kept for reuse only. A prompt in
    two legs is in `prompt_tokens` and `cached_tokens` of its prefill worker alone.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    errors: int = 0
    steps: int = 0
    tokens_per_s: float = 0.0
    tiers: WorkerTiers | None = None
    """None for a worker without KV tiers."""
    busy_s: float = 0.0
    """Seconds in which it computed, in its whole life."""
    computed_prompt_tokens: int = 0
    """Prompt tokens that were computed here, in whatever leg."""
    role: str = ""
    """What it serves as now: prefill, decode, aggregated; "" before it serves."""
    handed_over: int = 0
    """Prefill legs that ended with their KV held for another worker."""
    taken_over: int = 0
    """Decode legs that went on without computing any of their prompt."""
    handover_seconds: float = 0.0
    """From the first token of prefill legs until their KV was held, in total."""
    transfers_failed: int = 0


class Candidate(msgspec.Struct, frozen=True):
    """One worker as the router weighed it, in blocks; `cost` is what the lowest of wins. `host_blocks` and
    `disk_blocks` follow the `overlap_blocks` in its own pool and would be loaded from the box's tiers.
    """

    worker: str
    overlap_blocks: int
    prefill_blocks: float
    decode_blocks: int
    cost: float
    host_blocks: int = 0
    disk_blocks: int = 0


class Decision(msgspec.Struct, frozen=True):
    """Why a request went where it went. `at` is Unix time; `reason` is one line for a person."""

    request_id: str
    model: str
    at: float
    mode: str
    winner: str
    reason: str
    prompt_blocks: int
    candidates: tuple[Candidate, ...]
    policy: str = ""
    policy_reason: str = ""
    """Why it goes in two legs, or in one; "" where the model's workers have one role."""
    prefill: str = ""
    """The prefill worker of a request in two legs; `winner` and `reason` are then about the decode leg."""
    prefill_reason: str = ""
    prefill_candidates: tuple[Candidate, ...] = ()


class RouterFigures(msgspec.Struct, frozen=True, tag="router"):
    """`indexed_blocks` counts (worker, block) pairs, `host_blocks` and `disk_blocks` those of the box's tiers;
    `decisions` are the most recent, oldest first.
    """

    mode: str = "kv"
    workers: tuple[str, ...] = ()
    indexed_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    tiers_connected: bool = False
    active_requests: int = 0
    routed: int = 0
    resyncs: int = 0
    expired_leases: int = 0
    hit_rate: float | None = None
    decisions: tuple[Decision, ...] = ()
    disagg: str = ""
    """The disaggregation policy in force, with its thresholds if it has some: what its setting is set by."""
    disagg_settings: Disagg = Disagg()


class RequestFigures(msgspec.Struct, frozen=True):
    """A live request. `phase` is waking (its model sleeps), queued, routing, prefill, handover (its first token is
    there and its decode leg's is not) or decode; `started` is Unix time. A request in two legs has a `prefill_worker`,
    and goes on at `worker`.
    """

    request_id: str
    model: str
    phase: str
    worker: str | None
    started: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    priority: int = 0
    prefill_worker: str | None = None


class Latency(msgspec.Struct, frozen=True):
    """What clients saw: time to the first token, and between tokens."""

    ttft: Quantiles = Quantiles()
    itl: Quantiles = Quantiles()


class FrontendFigures(msgspec.Struct, frozen=True, tag="frontend"):
    """`live` holds at most the 256 oldest live requests; `active` counts them all. `by_worker` is the latency of recent
    requests by the worker that served them; `last_ended` is Unix time by model; `waking` has the requests that wait for
    their model to wake.
    """

    models: tuple[str, ...] = ()
    active: int = 0
    requests: int = 0
    errors: int = 0
    disconnected: int = 0
    output_tokens: int = 0
    tokens_per_s: float = 0.0
    ttft: Quantiles = Quantiles()
    itl: Quantiles = Quantiles()
    live: tuple[RequestFigures, ...] = ()
    by_worker: dict[str, Latency] = {}
    last_ended: dict[str, float] = {}
    waking: dict[str, int] = {}


class LockHolder(msgspec.Struct, frozen=True):
    """A process that has, or waits for, a lock on a layout. `since` is Unix time; `lock` is rw, ro or rw_or_ro."""

    owner: str
    pid: int
    lock: str
    since: float


class LayoutEvent(msgspec.Struct, frozen=True):
    """`at` is Unix time."""

    at: float
    text: str


class LayoutFigures(msgspec.Struct, frozen=True):
    """`state` is empty, writing or committed (writing: whether or not an epoch is committed beside it).

    `device_bytes` lie on the device (an epoch under construction counts), `host_bytes` and `disk_bytes` where it
    sleeps. `moving` names the place that it is on its way to. `history` is the most recent 32, oldest first.
    """

    name: str
    state: str
    place: str
    epoch: int
    layout_hash: str
    bytes: int
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    allocations: int = 0
    entries: int = 0
    moving: str = ""
    writer: LockHolder | None = None
    readers: tuple[LockHolder, ...] = ()
    waiters: tuple[LockHolder, ...] = ()
    history: tuple[LayoutEvent, ...] = ()


class GmsFigures(msgspec.Struct, frozen=True, tag="gms"):
    """One service. `requests` counts messages of engines; `refused` those that were answered with an error."""

    device: str
    capacity_bytes: int
    device_bytes: int = 0
    host_capacity_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    requests: int = 0
    refused: int = 0
    layouts: tuple[LayoutFigures, ...] = ()


class KvLayoutFigures(msgspec.Struct, frozen=True):
    """One KV layout in the tiers, in blocks. `host_free` slots hold nothing; `host_leased` and `host_writing` can't be
    evicted now. `owners` are the workers attached.
    """

    name: str
    fingerprint: str
    kv_dtype: str
    block_size: int
    block_bytes: int
    owners: tuple[str, ...] = ()
    host_slots: int = 0
    host_blocks: int = 0
    host_free: int = 0
    host_leased: int = 0
    host_writing: int = 0
    disk_blocks: int = 0


class TierFigures(msgspec.Struct, frozen=True):
    """One tier over all layouts. `state` is on, off (not asked for), or suspended (it comes back by itself). `reason`
    says why it is suspended, or smaller than asked for. `hits` of `lookups` blocks asked for were found here; `in_*`
    and `out_*` count what came into the tier and what was read out of it; `failed` were there and didn't pass their
    check; `dropped` never came in, by reason.
    """

    state: str
    reason: str = ""
    capacity_bytes: int = 0
    used_bytes: int = 0
    blocks: int = 0
    lookups: int = 0
    hits: int = 0
    in_blocks: int = 0
    in_bytes: int = 0
    in_seconds: float = 0.0
    out_blocks: int = 0
    out_bytes: int = 0
    out_seconds: float = 0.0
    evicted: int = 0
    failed: int = 0
    dropped: dict[str, int] = {}
    queued: int = 0


class KvStoreFigures(msgspec.Struct, frozen=True, tag="kvstore"):
    """`indexing` layouts are still being read from disk. `metadata_bytes` is what the store's tables take, estimated
    from their number; `leases` are held now, `reclaimed` were given back by the death of their holder. `simulated`:
    bytes are counted and not there, neither in host memory nor on disk.
    """

    host: TierFigures
    disk: TierFigures
    layouts: tuple[KvLayoutFigures, ...] = ()
    directory: str = ""
    admission: str = "always"
    indexing: int = 0
    indexed_in_s: float | None = None
    leases: int = 0
    reclaimed: int = 0
    connections: int = 0
    requests: int = 0
    refused: int = 0
    metadata_bytes: int = 0
    simulated: bool = False


Figures = WorkerFigures | RouterFigures | FrontendFigures | GmsFigures | KvStoreFigures
