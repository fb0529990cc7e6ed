"""What the frontend knows of its requests: live ones, totals, and quantiles over recent ones."""

from __future__ import annotations

import time
from collections import deque

from dynamo_box import __version__
from dynamo_box.metrics import FrontendMetrics
from dynamo_box.protocol.figures import FrontendFigures, Quantiles, RequestFigures

WINDOW = 2048
MAX_LIVE_REPORTED = 256


class RequestStats:
    """One request from admission to its end. Times are monotonic seconds."""

    def __init__(self, stats: Stats, request_id: str, model: str, endpoint: str, streamed: bool) -> None:
        self._stats = stats
        self.request_id = request_id
        self.model = model
        self.endpoint = endpoint
        self.streamed = streamed
        self.began = time.monotonic()
        self.started_at = time.time()
        self.phase = "queued"
        self.worker: str | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.first_token: float | None = None
        self.last_token: float | None = None

    def token(self, count: int) -> None:
        """Note `count` tokens of one step."""
        now = time.monotonic()
        self.output_tokens += count
        stats = self._stats
        stats.output_tokens += count
        if self.last_token is None:
            self.first_token = now
            self.phase = "decode"
            stats.note_ttft(self.model, now - self.began)
        else:
            stats.note_itl(self.model, now - self.last_token)
        self.last_token = now

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.began

    def figures(self) -> RequestFigures:
        return RequestFigures(
            request_id=self.request_id,
            model=self.model,
            phase=self.phase,
            worker=self.worker,
            started=self.started_at,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
        )


class Stats:
    def __init__(self) -> None:
        self.metrics = FrontendMetrics(__version__)
        self.live: dict[str, RequestStats] = {}
        self.output_tokens = 0
        self._requests = self._errors = self._disconnected = 0
        self._ttft: deque[float] = deque(maxlen=WINDOW)
        self._itl: deque[float] = deque(maxlen=WINDOW)
        self._rate_tokens = 0
        self._rate_at = time.monotonic()

    def begin(self, request_id: str, model: str, endpoint: str, streamed: bool) -> RequestStats:
        request = RequestStats(self, request_id, model, endpoint, streamed)
        self.live[request_id] = request
        self.metrics.active.labels(model).inc()
        return request

    def end(self, request: RequestStats, status: int) -> None:
        del self.live[request.request_id]
        metrics, model = self.metrics, request.model
        kind = "stream" if request.streamed else "unary"
        self._requests += 1
        self._errors += status >= 400 and status != 499
        if status == 499:
            self._disconnected += 1
            metrics.disconnected.labels(model).inc()
        elif status == 503:
            metrics.rejections.labels(model).inc()
        metrics.active.labels(model).dec()
        metrics.requests.labels(model, request.endpoint, kind, str(status)).inc()
        metrics.duration.labels(model).observe(time.monotonic() - request.began)
        if request.prompt_tokens:
            metrics.input_tokens.labels(model).observe(request.prompt_tokens)
            metrics.output_tokens_hist.labels(model).observe(request.output_tokens)
            metrics.cached_tokens.labels(model).observe(request.cached_tokens)
            metrics.output_tokens.labels(model).inc(request.output_tokens)

    def note_ttft(self, model: str, seconds: float) -> None:
        self._ttft.append(seconds)
        self.metrics.ttft.labels(model).observe(seconds)

    def note_itl(self, model: str, seconds: float) -> None:
        self._itl.append(seconds)
        self.metrics.itl.labels(model).observe(seconds)

    def refresh_gauges(self, models: tuple[str, ...]) -> None:
        """Gauges that are cheaper counted when asked than kept at every step."""
        for model in models:
            live = [request for request in self.live.values() if request.model == model]
            self.metrics.inflight.labels(model).set(sum(request.worker is not None for request in live))
            self.metrics.queued.labels(model).set(sum(request.first_token is None for request in live))

    def figures(self, models: tuple[str, ...]) -> FrontendFigures:
        """Tokens a second since the last call."""
        now = time.monotonic()
        elapsed = now - self._rate_at
        rate = (self.output_tokens - self._rate_tokens) / elapsed if elapsed > 0 else 0.0
        self._rate_tokens, self._rate_at = self.output_tokens, now
        live = list(self.live.values())[:MAX_LIVE_REPORTED]
        return FrontendFigures(
            models=models,
            active=len(self.live),
            requests=self._requests,
            errors=self._errors,
            disconnected=self._disconnected,
            output_tokens=self.output_tokens,
            tokens_per_s=round(rate, 1),
            ttft=_quantiles(self._ttft),
            itl=_quantiles(self._itl),
            live=tuple(request.figures() for request in live),
        )


def _quantiles(values: deque[float]) -> Quantiles:
    if not values:
        return Quantiles()
    ordered = sorted(values)
    return Quantiles(p50=ordered[len(ordered) // 2], p99=ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])
