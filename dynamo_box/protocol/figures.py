"""What children report of themselves, at most four times a second. They go into the snapshot as they are.

Counters only grow within one life of a process; gauges say "now"; a figure that can't be read is None, never 0.
"""

from __future__ import annotations

import msgspec


class Quantiles(msgspec.Struct, frozen=True):
    """Seconds over a sliding window of recent requests; None when the window is empty."""

    p50: float | None = None
    p99: float | None = None


class WorkerFigures(msgspec.Struct, frozen=True, tag="worker"):
    """`kv_blocks_used` are held by sequences; `kv_blocks_cached` are held by none and kept for reuse only."""

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


class Candidate(msgspec.Struct, frozen=True):
    """One worker as the router weighed it, in blocks; `cost` is what the lowest of wins."""

    worker: str
    overlap_blocks: int
    prefill_blocks: float
    decode_blocks: int
    cost: float


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


class RouterFigures(msgspec.Struct, frozen=True, tag="router"):
    """`indexed_blocks` counts (worker, block) pairs; `decisions` are the most recent, oldest first."""

    mode: str = "kv"
    workers: tuple[str, ...] = ()
    indexed_blocks: int = 0
    active_requests: int = 0
    routed: int = 0
    resyncs: int = 0
    expired_leases: int = 0
    hit_rate: float | None = None
    decisions: tuple[Decision, ...] = ()


class RequestFigures(msgspec.Struct, frozen=True):
    """A live request. `phase` is waking (its model sleeps), queued, routing, prefill or decode; `started` is Unix
    time.
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


Figures = WorkerFigures | RouterFigures | FrontendFigures | GmsFigures
