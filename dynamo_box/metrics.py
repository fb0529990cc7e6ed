"""Prometheus metrics under the names that Dynamo's dashboards know."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_MILLISECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 50, 100)
_MODEL = ("model",)


class FrontendMetrics:
    """One registry a frontend, so that tests can have several."""

    def __init__(self, version: str) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
            return Counter(f"dynamo_frontend_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"dynamo_frontend_{name}", text, _MODEL, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"dynamo_frontend_{name}", text, _MODEL, registry=registry, buckets=buckets)

        def overhead(name: str, text: str) -> Histogram:
            return Histogram(f"dynamo_router_overhead_{name}_ms", text, registry=registry, buckets=_MILLISECONDS)

        self.requests = counter("requests", "Requests ended", ("model", "endpoint", "request_type", "status"))
        self.active = gauge("active_requests", "Requests from admission to their end")
        self.inflight = gauge("inflight_requests", "Requests on a worker")
        self.queued = gauge("queued_requests", "Requests that wait for their first token")
        self.disconnected = counter("disconnected_clients", "Clients that left before the end")
        self.duration = histogram("request_duration_seconds", "From admission to the end", _SECONDS)
        self.ttft = histogram("time_to_first_token_seconds", "From admission to the first token", _SECONDS)
        self.itl = histogram("inter_token_latency_seconds", "Between steps of one sequence", _TOKEN_SECONDS)
        self.input_tokens = histogram("input_sequence_tokens", "Prompt tokens a request", _TOKENS)
        self.output_tokens_hist = histogram("output_sequence_tokens", "Generated tokens a request", _TOKENS)
        self.cached_tokens = histogram("cached_tokens", "Prompt tokens a request whose KV was reused", _TOKENS)
        self.output_tokens = counter("output_tokens", "Generated tokens")
        self.migrations = counter("model_migration", "Requests moved to another worker")
        self.rejections = counter("model_rejection", "Requests turned away for load")
        self.routing_total = overhead("total", "Router time a request")
        self.routing_match = overhead("indexer_find_matches", "Index look-up a request")
        self.routing_schedule = overhead("scheduling", "Choice among workers a request")
        self.routing_hash = overhead("block_hashing", "Tokenising and hashing a prompt")
        Gauge("dynbox_build_info", "1, with the version", ("version",), registry=registry).labels(version).set(1)
