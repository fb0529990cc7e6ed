"""What one snapshot can't say: how figures went over time. Bounded, and rebuilt by feeding snapshots in order.

Everything comes from differences of counters between snapshots. A counter that falls, or a new pid, is a new life of
its process, which counts from zero. A clock that was set back starts the history over.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from dynamo_box.protocol.figures import FrontendFigures, KvStoreFigures, RequestFigures, WorkerFigures, WorkerTiers
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui.lately import Lately

BUCKET_S = 5.0
KEPT_BUCKETS = 180
RATE_S = 2.0
"""A rate is taken over the last RATE_S to 2 * RATE_S; over half of RATE_S at least."""


class Flow(enum.StrEnum):
    """Ways of KV between the tiers. What is loaded from disk goes two of them: disk→host, then host→device."""

    OFFLOAD = "device→host"
    ONBOARD = "host→device"
    WRITE = "host→disk"
    READ = "disk→host"


@dataclass
class Bucket:
    """What one worker did in the BUCKET_S seconds from `number * BUCKET_S` (Unix time) on. Of the cached tokens,
    `host_tokens` and `disk_tokens` were loaded from the box's tiers.
    """

    number: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that were cached; None when there was no prompt.

        An engine may count a prompt in one bucket and what was cached of it in the next: more than all is all.
        """
        return min(self.cached_tokens / self.prompt_tokens, 1.0) if self.prompt_tokens else None


class _Counters(NamedTuple):
    pid: int | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests: int
    host_tokens: int
    disk_tokens: int


class _Pace(NamedTuple):
    """An amount at `at`, and RATE_S or more before (the same if there was no earlier moment)."""

    at: float
    amount: int
    earlier_at: float
    earlier_amount: int

    def moved_to(self, at: float, amount: int) -> _Pace:
        return _Pace(at, amount, self.at, self.amount) if at - self.at >= RATE_S else self

    def rate(self, at: float, amount: int) -> float | None:
        """A second; None until it has been watched long enough."""
        span = at - self.earlier_at
        return None if span < RATE_S / 2 else max(amount - self.earlier_amount, 0) / span


_NOTHING = WorkerTiers()


@dataclass
class History:
    """`workers` maps the name of a worker to its buckets, oldest first; quiet buckets are absent. `newest` is the
    number of the bucket that is being filled.
    """

    workers: dict[str, deque[Bucket]] = field(default_factory=dict)
    newest: int = 0
    lately: Lately = field(default_factory=Lately)
    _at: float = 0.0
    _since: float = 0.0
    _last: dict[str, _Counters] = field(default_factory=dict)
    _requests: dict[str, _Pace] = field(default_factory=dict)
    _moved: dict[str, tuple[int | None, dict[Flow, int]]] = field(default_factory=dict)
    _flows: dict[Flow, int] = field(default_factory=dict)
    _flow_paces: dict[Flow, _Pace] = field(default_factory=dict)
    _flow_buckets: deque[tuple[int, dict[Flow, int]]] = field(default_factory=lambda: deque(maxlen=KEPT_BUCKETS))

    def feed(self, snapshot: BoxSnapshot) -> None:
        """Take in the next snapshot; one whose time is no number has no place in it."""
        if not math.isfinite(snapshot.at):
            return
        number = math.floor(snapshot.at / BUCKET_S)
        if number < self.newest or not self.newest:
            self.workers.clear()
            self._last.clear()
            self._requests.clear()
            self._moved.clear()
            self._flows.clear()
            self._flow_paces.clear()
            self._flow_buckets.clear()
            self.lately.clear()
            self._since = snapshot.at
        if snapshot.at < self._at:
            self.lately.clear()
        self.newest, self._at = number, snapshot.at
        self.lately.feed(snapshot)
        present = set()
        live: tuple[RequestFigures, ...] = ()
        for process in snapshot.processes:
            present.add(process.name)
            if isinstance(process.figures, WorkerFigures):
                self._feed_worker(process, process.figures)
                if (tiers := process.figures.tiers) is not None:
                    back = tiers.host.bytes + tiers.disk.bytes
                    self._feed_flows(process, {Flow.OFFLOAD: tiers.offloaded_bytes, Flow.ONBOARD: back})
            elif isinstance(process.figures, KvStoreFigures):
                disk = process.figures.disk
                self._feed_flows(process, {Flow.WRITE: disk.in_bytes, Flow.READ: disk.out_bytes})
            elif isinstance(process.figures, FrontendFigures):
                live += process.figures.live
        self._feed_requests(live)
        for flow, count in self._flows.items():
            pace = self._flow_paces.get(flow) or _Pace(self._at, count, self._at, count)
            self._flow_paces[flow] = pace.moved_to(self._at, count)
        self._forget(present)

    @property
    def watched_s(self) -> float:
        """How far back it goes."""
        return self._at - self._since

    def recent(self, worker: str, count: int) -> list[Bucket | None]:
        """The last `count` buckets of a worker, oldest first, the one that is being filled at the end; None for a
        quiet one.
        """
        buckets: list[Bucket | None] = [None] * count
        first = self.newest - count + 1
        for bucket in reversed(self.workers.get(worker, ())):
            if bucket.number < first:
                break
            buckets[bucket.number - first] = bucket
        return buckets

    def token_rate(self, request: RequestFigures) -> float | None:
        """Output tokens a second of a request of the newest snapshot, lately; None until it has been watched."""
        pace = self._requests.get(request.request_id)
        return None if pace is None else pace.rate(self._at, request.output_tokens)

    def flow_rate(self, flow: Flow) -> float | None:
        """Bytes a second, lately; None until it has been watched, and in a box without tiers."""
        pace = self._flow_paces.get(flow)
        return None if pace is None else pace.rate(self._at, self._flows[flow])

    def recent_flow(self, flow: Flow, count: int) -> list[int]:
        """Bytes in the last `count` buckets, oldest first, the one that is being filled at the end."""
        found = [0] * count
        first = self.newest - count + 1
        for number, moved in reversed(self._flow_buckets):
            if number < first:
                break
            found[number - first] = moved.get(flow, 0)
        return found

    def _feed_worker(self, process: ProcessInfo, figures: WorkerFigures) -> None:
        name = process.name
        tiers = figures.tiers or _NOTHING
        now = _Counters(
            process.pid, figures.prompt_tokens, figures.cached_tokens, figures.output_tokens, figures.requests,
            tiers.host.loaded, tiers.disk.loaded,
        )  # fmt: skip
        last = self._last.get(name)
        if now == last:
            return
        self._last[name] = now
        if last is None:
            self.workers.setdefault(name, deque(maxlen=KEPT_BUCKETS))
            return
        if now.pid != last.pid or any(new < old for new, old in zip(now[1:5], last[1:5], strict=True)):
            last = _Counters(now.pid, 0, 0, 0, 0, 0, 0)
        if now == last:
            return
        buckets = self.workers.setdefault(name, deque(maxlen=KEPT_BUCKETS))
        if not buckets or buckets[-1].number != self.newest:
            buckets.append(Bucket(self.newest))
        bucket = buckets[-1]
        bucket.prompt_tokens += now.prompt_tokens - last.prompt_tokens
        bucket.cached_tokens += now.cached_tokens - last.cached_tokens
        bucket.output_tokens += now.output_tokens - last.output_tokens
        bucket.requests += now.requests - last.requests
        bucket.host_tokens += max(now.host_tokens - last.host_tokens, 0)
        bucket.disk_tokens += max(now.disk_tokens - last.disk_tokens, 0)

    def _feed_flows(self, process: ProcessInfo, now: dict[Flow, int]) -> None:
        pid, last = self._moved.get(process.name, (process.pid, now))
        self._moved[process.name] = (process.pid, now)
        new_life = pid != process.pid or any(count < last[flow] for flow, count in now.items())
        for flow, count in now.items():
            more = count if new_life else count - last[flow]
            self._flows[flow] = self._flows.get(flow, 0) + more
            if not more:
                continue
            if not self._flow_buckets or self._flow_buckets[-1][0] != self.newest:
                self._flow_buckets.append((self.newest, {}))
            moved = self._flow_buckets[-1][1]
            moved[flow] = moved.get(flow, 0) + more

    def _feed_requests(self, live: tuple[RequestFigures, ...]) -> None:
        """Requests are watched from their first token on, for as long as they live."""
        before, at = self._requests, self._at
        self._requests = {}
        for request in live:
            if not request.output_tokens:
                continue
            tokens = request.output_tokens
            pace = before.get(request.request_id) or _Pace(at, tokens, at, tokens)
            self._requests[request.request_id] = pace.moved_to(at, tokens)

    def _forget(self, present: set[str]) -> None:
        """Workers that are gone stay until their last bucket is too old to be shown."""
        for name in self._last.keys() - present:
            del self._last[name]
        for name in self._moved.keys() - present:
            del self._moved[name]
        for name in self.workers.keys() - present:
            buckets = self.workers[name]
            if not buckets or buckets[-1].number <= self.newest - KEPT_BUCKETS:
                del self.workers[name]
