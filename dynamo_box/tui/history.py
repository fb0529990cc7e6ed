"""What one snapshot can't say: how figures went over time. Bounded, and rebuilt by feeding snapshots in order.

Everything comes from differences of counters between snapshots; a counter that falls belongs to a new life of its
process and starts over.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot

BUCKET_S = 5.0
KEPT_BUCKETS = 180


@dataclass
class Bucket:
    """What one worker did in the BUCKET_S seconds from `number * BUCKET_S` (Unix time) on."""

    number: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that were cached; None when there was no prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


@dataclass
class _Counters:
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests: int


@dataclass
class History:
    """`workers` maps the name of a worker to its buckets, oldest first; quiet buckets are absent."""

    workers: dict[str, deque[Bucket]] = field(default_factory=dict)
    newest: int = 0
    _last: dict[str, _Counters] = field(default_factory=dict)

    def feed(self, snapshot: BoxSnapshot) -> None:
        """Take in the next snapshot."""
        self.newest = math.floor(snapshot.at / BUCKET_S)
        present = set()
        for process in snapshot.processes:
            figures = process.figures
            if isinstance(figures, WorkerFigures):
                present.add(process.name)
                self._feed_worker(process.name, figures)
        for name in self.workers.keys() - present:
            if not self.workers[name] or self.workers[name][-1].number < self.newest - KEPT_BUCKETS:
                del self.workers[name]
        for name in self._last.keys() - present:
            del self._last[name]

    def _feed_worker(self, name: str, figures: WorkerFigures) -> None:
        now = _Counters(figures.prompt_tokens, figures.cached_tokens, figures.output_tokens, figures.requests)
        last = self._last.get(name)
        self._last[name] = now
        if last is None:
            self.workers.setdefault(name, deque(maxlen=KEPT_BUCKETS))
            return
        if now.prompt_tokens < last.prompt_tokens or now.requests < last.requests:
            last = _Counters(0, 0, 0, 0)
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
