"""Prometheus metrics under the names that Dynamo's dashboards know.

`dynamo_component_*` is each worker as the frontend sees it. `dynbox_*` is what those dashboards don't know: where
models are, and who waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dynamo_box.protocol.residency import ModelState, Residency
from dynamo_box.protocol.route import Placed

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_MILLISECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 50, 100)
_MODEL = ("model",)
_WORKER = ("model", "worker")
_PLACES = ("device", "host", "disk")


class FrontendMetrics:
    """One registry a frontend, so that tests can have several."""

    def __init__(self, version: str) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
            return Counter(f"dynamo_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Gauge:
            return Gauge(f"dynamo_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _MODEL) -> Histogram:
            return Histogram(f"dynamo_{name}", text, labels, registry=registry, buckets=buckets)

        by_outcome = ("model", "endpoint", "request_type", "status")
        self.requests = counter("frontend_requests", "Requests ended", by_outcome)
        self.active = gauge("frontend_active_requests", "Requests from admission to their end")
        self.inflight = gauge("frontend_inflight_requests", "Requests on a worker")
        self.queued = gauge("frontend_queued_requests", "Requests that wait for their first token")
        self.disconnected = counter("frontend_disconnected_clients", "Clients that left before the end")
        self.duration = histogram("frontend_request_duration_seconds", "From admission to the end", _SECONDS)
        self.ttft = histogram("frontend_time_to_first_token_seconds", "From admission to it", _SECONDS)
        self.itl = histogram("frontend_inter_token_latency_seconds", "Between two steps", _TOKEN_SECONDS)
        self.prompt_lengths = histogram("frontend_input_sequence_tokens", "Prompt tokens a request", _TOKENS)
        self.output_lengths = histogram("frontend_output_sequence_tokens", "Generated tokens a request", _TOKENS)
        self.cached_lengths = histogram("frontend_cached_tokens", "Prompt tokens with KV reused", _TOKENS)
        self.output_tokens = counter("frontend_output_tokens", "Generated tokens")
        self.migrations = counter("frontend_model_migration", "Requests placed again on another worker")
        self.rejections = counter("frontend_model_rejection", "Requests turned away for load")

        self.simulated = Gauge(
            "dynbox_simulated", "1 if devices, speeds and KV of this box are simulated", registry=registry
        )
        self.residencies: tuple[Residency, ...] = ()
        """Where every model is, as the supervisor last said."""
        registry.register(_Residencies(self))
        self.waking = Gauge(
            "dynbox_frontend_waking_requests", "Requests that wait for their model to wake", _MODEL, registry=registry
        )
        self.wake_wait = Histogram(
            "dynbox_frontend_wake_wait_seconds",
            "How long requests waited for their model, which then woke",
            _MODEL,
            registry=registry,
            buckets=_SECONDS,
        )
        self.wake_refused = Counter(
            "dynbox_frontend_wake_refused",
            "Requests turned away since too many waited for their model",
            _MODEL,
            registry=registry,
        )

        self.recovery = Histogram(
            "dynbox_frontend_recovery_seconds",
            "From the loss of a worker, or of what it was to hand over, to the next token from another one",
            _MODEL,
            registry=registry,
            buckets=_SECONDS,
        )
        self.legs = Counter(
            "dynbox_disagg_requests",
            "Requests ended, of models with workers for one leg alone: one_leg, two_legs, fell_back or failed",
            ("model", "outcome"),
            registry=registry,
        )
        self.handover = Histogram(
            "dynbox_disagg_handover_seconds",
            "From the first token of a prefill leg to the first of its decode leg",
            _MODEL,
            registry=registry,
            buckets=_TOKEN_SECONDS,
        )

        self.worker_inflight = gauge("component_inflight_requests", "Requests on this worker", _WORKER)
        self.worker_requests = counter("component_requests", "Requests that ended on this worker", _WORKER)
        self.worker_errors = counter("component_errors", "Requests that failed on this worker", _WORKER)
        self.worker_duration = histogram(
            "component_request_duration_seconds", "From admission to the end", _SECONDS, _WORKER
        )
        self.hit_rate = gauge("component_router_kv_hit_rate", "Prompt blocks that the chosen workers had or could load")
        uptime = gauge("component_uptime_seconds", "Since this frontend started", ())
        started = time.monotonic()
        uptime.set_function(lambda: time.monotonic() - started)

        def overhead(name: str, text: str) -> Histogram:
            return histogram(f"router_overhead_{name}_ms", text, _MILLISECONDS, ())

        self._hashing = overhead("block_hashing", "Hashing a prompt's blocks")
        self._matching = overhead("indexer_find_matches", "Looking them up")
        self._scheduling = overhead("scheduling", "Choosing a worker")
        self._overhead = overhead("total", "Hashing, and asking the router until it answers")
        self._blocks: dict[str, tuple[int, int]] = {}
        Gauge("dynbox_build_info", "1, with the version", ("version",), registry=registry).labels(version).set(1)

    def note_placement(
        self, model: str, placed: Placed, *, prompt_blocks: int, hashing_ms: float, round_trip_ms: float
    ) -> None:
        self._hashing.observe(hashing_ms)
        self._matching.observe(placed.match_us / 1000)
        self._scheduling.observe(max(placed.took_us - placed.match_us, 0.0) / 1000)
        self._overhead.observe(hashing_ms + round_trip_ms)
        had, of = self._blocks.get(model, (0, 0))
        at = placed.prefill or placed  # whoever computes the prompt
        spared = at.overlap_blocks + at.host_blocks + at.disk_blocks
        had, of = had + spared, of + prompt_blocks
        self._blocks[model] = (had, of)
        if of:
            self.hit_rate.labels(model).set(had / of)


class _Residencies(Collector):
    """The supervisor's word on each model, in metrics; its counters and clocks are the supervisor's, not kept here."""

    def __init__(self, metrics: FrontendMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        models = self._metrics.residencies
        if not models:
            return
        yield _one_hot("state", "1 for the state that the model is in", get_args(ModelState), models)
        yield _one_hot("place", "1 for the place where the model's weights are", _PLACES, models)
        yield from _values(models, time.time())
        yield _phases("last_wake_seconds", "How long the last wake took, by phase", models, "wake_phases")
        yield _phases("last_sleep_seconds", "How long the last falling asleep took, by phase", models, "sleep_phases")


def _one_hot(field: str, text: str, values: Iterable[str], models: Iterable[Residency]) -> Metric:
    family = GaugeMetricFamily(f"dynbox_model_{field}", text, labels=("model", field))
    for value in values:
        for each in models:
            family.add_metric((each.model, value), getattr(each, field) == value)
    return family


def _values(models: tuple[Residency, ...], now: float) -> Iterator[Metric]:
    def counter(name: str, text: str, field: str) -> Metric:
        family = CounterMetricFamily(f"dynbox_model_{name}", text, labels=_MODEL)
        for each in models:
            family.add_metric((each.model,), getattr(each, field))
        return family

    yield counter("sleeps", "Completed sleeps", "sleeps")
    yield counter("wakes", "Completed wakes", "wakes")
    yield counter("cold_wakes", "Wakes that took a cold start", "cold_wakes")
    yield counter("slept_seconds", "Time asleep, of all completed sleeps", "slept_s")
    asleep = GaugeMetricFamily("dynbox_model_asleep_seconds", "Time asleep until now; 0 if it isn't", labels=_MODEL)
    weights = GaugeMetricFamily("dynbox_model_weights_bytes", "Size of the model's weights", labels=_MODEL)
    for each in models:
        asleep.add_metric((each.model,), max(now - each.since, 0.0) if each.state == "asleep" else 0.0)
        if each.weights_bytes is not None:
            weights.add_metric((each.model,), each.weights_bytes)
    yield asleep
    yield weights


def _phases(name: str, text: str, models: Iterable[Residency], field: str) -> Metric:
    family = GaugeMetricFamily(f"dynbox_model_{name}", text, labels=("model", "phase"))
    for each in models:
        for phase, seconds in getattr(each, field).items():
            family.add_metric((each.model, phase), seconds)
    return family
