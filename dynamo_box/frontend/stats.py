"""What the frontend knows of its requests: live ones, totals, and quantiles over recent ones."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable

from dynamo_box import __version__
from dynamo_box.metrics import FrontendMetrics
from dynamo_box.protocol.figures import FrontendFigures, Latency, Quantiles, RequestFigures
from dynamo_box.protocol.residency import Residency

WINDOW = 1024
WORKER_WINDOW = 256
BY_WORKER_EVERY_S = 1.0
"""Quantiles of 64 workers take a millisecond to work out, so that is done less often than reports are due."""
MAX_LIVE_REPORTED = 256
CLIENT_GONE = 499
WAKING = "waking"
"""The phase of a request whose model sleeps."""


class RequestStats:
    """One request from its arrival to its end. Times are monotonic seconds, but `started` is Unix time."""

    def __init__(
        self, totals: Stats, request_id: str, model: str, endpoint: str, *, streamed: bool, priority: int = 0
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.endpoint = endpoint
        self.streamed = streamed
        self.priority = priority
        self.began = time.monotonic()
        self.started = time.time()
        self.phase = "queued"
        self.worker: str | None = None
        self.prefill_worker: str | None = None
        """Of a placement in two legs; `worker` is then the one that goes on."""
        self.legs = ""
        """How it went where a model has workers for one leg alone: one_leg, two_legs or fell_back."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.first_token: float | None = None
        self.last_token = 0.0
        self._totals = totals
        self._at: str | None = None
        self._observe_itl = totals.metrics.itl.labels(model).observe
        self._recent = totals.unplaced

    def placed(self, worker: str, prefill_worker: str | None = None, *, policy: str = "") -> None:
        """It goes to this worker, perhaps by way of a prefill worker; latencies count as theirs from now on."""
        self.worker, self.prefill_worker, self.phase = worker, prefill_worker, "prefill"
        self._at = prefill_worker or worker
        self._recent = self._totals.recent_of(self._at)
        if policy and not self.legs:
            self.legs = "one_leg"

    def handing_over(self) -> None:
        """Its worker is to go on with what the prefill worker has computed."""
        assert self.worker is not None
        self._at = self.worker
        self._recent = self._totals.recent_of(self._at)

    def taken_over_by(self, worker: str) -> None:
        """Another one than the worker that was to go on."""
        self.worker, self.phase = worker, "handover"
        self.handing_over()

    def fell_back(self) -> None:
        """What was to be handed over is computed again."""
        self.legs = "fell_back"

    def unplaced(self) -> None:
        """Its worker took nothing of it on: it is as new."""
        self.worker = self.prefill_worker = self._at = None
        self.phase = "queued"
        self._recent = self._totals.unplaced

    def token(self, count: int, now: float) -> None:
        """Note `count` tokens of one step."""
        self.output_tokens += count
        totals = self._totals
        totals.output_tokens += count
        if self.first_token is None:
            self.first_token = now
            totals.note_ttft(self.model, now - self.began)
            self._recent.ttft.append(now - self.began)
        else:
            gap = now - self.last_token
            totals.itl.append(gap)
            self._recent.itl.append(gap)
            self._observe_itl(gap)
        if self.phase != "decode":
            self._turn_to_decode(now)
        self.last_token = now

    def _turn_to_decode(self, now: float) -> None:
        if self._at != self.worker:
            self.phase = "handover"
            return
        if self.phase == "handover" and self.first_token is not None:
            self.legs = "two_legs"
            self._totals.metrics.handover.labels(self.model).observe(now - self.first_token)
        self.phase = "decode"

    @property
    def on_worker(self) -> str | None:
        """The worker that has it now."""
        return self._at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.began

    def figures(self) -> RequestFigures:
        return RequestFigures(
            request_id=self.request_id,
            model=self.model,
            phase=self.phase,
            worker=self.worker,
            started=self.started,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            priority=self.priority,
            prefill_worker=self.prefill_worker,
        )


class _Recent:
    """Latencies of one worker's recent requests, in seconds."""

    __slots__ = ("itl", "ttft")

    def __init__(self) -> None:
        self.ttft: deque[float] = deque(maxlen=WORKER_WINDOW)
        self.itl: deque[float] = deque(maxlen=WORKER_WINDOW)

    def latency(self) -> Latency:
        return Latency(ttft=_quantiles(self.ttft), itl=_quantiles(self.itl))


class Stats:
    def __init__(self) -> None:
        self.metrics = FrontendMetrics(__version__)
        self.output_tokens = 0
        self.itl: deque[float] = deque(maxlen=WINDOW)
        self._ttft: deque[float] = deque(maxlen=WINDOW)
        self._live: dict[RequestStats, None] = {}
        self._requests = self._errors = self._disconnected = 0
        self._rate_tokens = 0
        self._rate_at = time.monotonic()
        self.unplaced = _Recent()
        self._recent: dict[str, _Recent] = {}
        self._by_worker: dict[str, Latency] = {}
        self._by_worker_at = float("-inf")
        self._last_ended: dict[str, float] = {}

    def begin(self, request: RequestStats) -> None:
        self._live[request] = None

    def end(self, request: RequestStats, status: int) -> None:
        del self._live[request]
        metrics, model = self.metrics, request.model
        self._last_ended[model] = time.time()
        duration_s = time.monotonic() - request.began
        self._count(request.model, request.endpoint, status, streamed=request.streamed)
        metrics.duration.labels(model).observe(duration_s)
        if request.prompt_tokens:
            metrics.prompt_lengths.labels(model).observe(request.prompt_tokens)
            metrics.output_lengths.labels(model).observe(request.output_tokens)
            metrics.cached_lengths.labels(model).observe(request.cached_tokens)
            metrics.output_tokens.labels(model).inc(request.output_tokens)
        if request.worker is not None:
            metrics.worker_requests.labels(model, request.worker).inc()
            metrics.worker_duration.labels(model, request.worker).observe(duration_s)
            if status >= 500:
                metrics.worker_errors.labels(model, request.worker).inc()

        if request.legs and status != CLIENT_GONE:
            metrics.legs.labels(model, "failed" if status >= 400 else request.legs).inc()

    def refused(self, model: str, endpoint: str, status: int, *, streamed: bool) -> None:
        """A request that was not admitted; `model` is one that is served, or "" (labels must stay few)."""
        self._count(model, endpoint, status, streamed=streamed)

    def _count(self, model: str, endpoint: str, status: int, *, streamed: bool) -> None:
        self._requests += 1
        kind = "stream" if streamed else "unary"
        self.metrics.requests.labels(model, endpoint, kind, str(status)).inc()
        if status == CLIENT_GONE:
            self._disconnected += 1
            self.metrics.disconnected.labels(model).inc()
        elif status >= 400:
            self._errors += 1
        if status == 503:
            self.metrics.rejections.labels(model).inc()

    def note_ttft(self, model: str, seconds: float) -> None:
        self._ttft.append(seconds)
        self.metrics.ttft.labels(model).observe(seconds)

    def refresh_gauges(
        self, models: Iterable[str], workers: Iterable[tuple[str, str]], residencies: tuple[Residency, ...] = ()
    ) -> None:
        """Gauges that are cheaper counted when asked than kept all the time; `workers` are (model, worker)."""
        live = list(self._live)
        for model in models:
            of_model = [request for request in live if request.model == model]
            self.metrics.active.labels(model).set(len(of_model))
            self.metrics.inflight.labels(model).set(sum(each.worker is not None for each in of_model))
            self.metrics.waking.labels(model).set(sum(each.phase == WAKING for each in of_model))
            self.metrics.queued.labels(model).set(sum(each.first_token is None for each in of_model))
        on_worker = Counter((request.model, request.on_worker) for request in live if request.on_worker is not None)
        self.metrics.worker_inflight.clear()  # a worker that is gone has no last value
        for model, worker in {*workers, *on_worker}:
            self.metrics.worker_inflight.labels(model, worker).set(on_worker[model, worker])
        self.metrics.residencies = residencies

    def recent_of(self, worker: str) -> _Recent:
        return self._recent.setdefault(worker, _Recent())

    def _latencies(self, workers: Collection[str], now: float) -> dict[str, Latency]:
        """By worker, for those that are there or still have a request; the others are forgotten."""
        if now >= self._by_worker_at + BY_WORKER_EVERY_S:
            self._by_worker_at = now
            wanted = {*workers, *(each for live in self._live for each in (live.worker, live.prefill_worker))}
            self._recent = {name: recent for name, recent in self._recent.items() if name in wanted}
            self._by_worker = {name: recent.latency() for name, recent in self._recent.items()}
        return self._by_worker

    def figures(
        self, models: tuple[str, ...], workers: Collection[str], waking: dict[str, int] | None = None
    ) -> FrontendFigures:
        """`models` and `workers` are those that there are now; `waking` counts who waits for a model to wake. Tokens a
        second since the last call.
        """
        now = time.monotonic()
        elapsed = now - self._rate_at
        rate = (self.output_tokens - self._rate_tokens) / elapsed if elapsed > 0 else 0.0
        self._rate_tokens, self._rate_at = self.output_tokens, now
        live = list(self._live)[:MAX_LIVE_REPORTED]
        return FrontendFigures(
            models=models,
            active=len(self._live),
            requests=self._requests,
            errors=self._errors,
            disconnected=self._disconnected,
            output_tokens=self.output_tokens,
            tokens_per_s=round(rate, 1),
            ttft=_quantiles(self._ttft),
            itl=_quantiles(self.itl),
            live=tuple(request.figures() for request in live),
            by_worker=self._latencies(workers, now),
            last_ended=dict(self._last_ended),
            waking=waking or {},
        )


def _quantiles(values: deque[float]) -> Quantiles:
    if not values:
        return Quantiles()
    ordered = sorted(values)
    return Quantiles(p50=ordered[len(ordered) // 2], p99=ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])
