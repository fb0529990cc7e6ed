"""What the frontend tells of its requests."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest

from dynamo_box.frontend import stats as module
from dynamo_box.frontend.stats import WORKER_WINDOW, RequestStats, Stats
from dynamo_box.protocol.figures import FrontendFigures, Latency
from dynamo_box.protocol.route import Placed

WORKERS = ("w0", "w1")


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> Stats:
    """Works out latencies by worker in each report."""
    monkeypatch.setattr(module, "BY_WORKER_EVERY_S", 0.0)
    return Stats()


def begin(stats: Stats, worker: str | None = None, *, model: str = "m", priority: int = 0) -> RequestStats:
    request = RequestStats(stats, "id", model, "completions", streamed=True, priority=priority)
    stats.begin(request)
    if worker is not None:
        request.placed(worker)
    return request


def report(stats: Stats, workers: tuple[str, ...] = WORKERS) -> FrontendFigures:
    return stats.figures(("m",), workers)


def test_a_live_request_with_its_priority(stats: Stats) -> None:
    request = begin(stats, priority=7)
    (live,) = report(stats).live
    assert (live.phase, live.worker, live.priority) == ("queued", None, 7)
    request.placed("w0")
    (live,) = report(stats).live
    assert (live.phase, live.worker) == ("prefill", "w0")


def test_latencies_belong_to_the_worker_that_served(stats: Stats) -> None:
    fast, slow = begin(stats, "w0"), begin(stats, "w1")
    fast.token(1, fast.began + 0.1)
    slow.token(1, slow.began + 0.5)
    for step in range(1, 4):
        fast.token(1, fast.began + 0.1 + step * 0.01)
    figures = report(stats)
    assert set(figures.by_worker) == set(WORKERS)
    assert figures.by_worker["w0"].ttft.p50 == pytest.approx(0.1)
    assert figures.by_worker["w0"].itl.p99 == pytest.approx(0.01)
    assert figures.by_worker["w1"].ttft.p50 == pytest.approx(0.5)
    assert figures.by_worker["w1"].itl.p50 is None
    assert figures.ttft.p99 == pytest.approx(0.5)


def test_a_request_that_goes_to_a_second_worker_counts_there(stats: Stats) -> None:
    request = begin(stats, "w0")
    request.placed("w1")
    request.token(1, request.began + 0.2)
    assert report(stats).by_worker["w0"] == Latency()
    assert report(stats).by_worker["w1"].ttft.p50 == pytest.approx(0.2)


def test_windows_are_bounded(stats: Stats) -> None:
    request = begin(stats, "w0")
    now = request.began
    for step in range(2 * WORKER_WINDOW + 1):
        now += 1.0 if step < WORKER_WINDOW else 0.5
        request.token(1, now)
    itl = report(stats).by_worker["w0"].itl
    assert (itl.p50, itl.p99) == (pytest.approx(0.5), pytest.approx(0.5))


def test_workers_that_are_gone_are_forgotten_after_their_last_request(stats: Stats) -> None:
    request = begin(stats, "w0")
    request.token(1, request.began + 0.1)
    assert set(report(stats, ("w1",)).by_worker) == {"w0"}, "it drains"
    stats.end(request, 200)
    assert report(stats, ("w1",)).by_worker == {}
    begin(stats, "w0")
    assert report(stats).by_worker == {"w0": Latency()}, "its successor starts afresh"


def test_latencies_by_worker_are_worked_out_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    stats = Stats()
    assert report(stats).by_worker == {}
    request = begin(stats, "w0")
    request.token(1, request.began + 0.1)
    now += 0.9
    assert report(stats).by_worker == {}
    now += 0.1
    assert report(stats).by_worker["w0"].ttft.p50 == pytest.approx(0.1)


def test_when_the_last_request_of_a_model_ended(stats: Stats) -> None:
    assert report(stats).last_ended == {}
    before = time.time()
    stats.end(begin(stats, model="m"), 200)
    stats.end(begin(stats, model="other"), 500)
    begin(stats, model="third")
    ended = report(stats).last_ended
    assert set(ended) == {"m", "other"}
    assert all(before <= at <= time.time() for at in ended.values())


def test_a_worker_that_is_gone_holds_no_requests(stats: Stats) -> None:
    def held() -> dict[str, float]:
        (metric,) = stats.metrics.worker_inflight.collect()
        return {sample.labels["worker"]: sample.value for sample in metric.samples}

    request = begin(stats, "w0")
    stats.refresh_gauges(["m"], [("m", "w0"), ("m", "w1")])
    assert held() == {"w0": 1, "w1": 0}
    stats.refresh_gauges(["m"], [("m", "w1")])
    assert held() == {"w0": 1, "w1": 0}, "it drains"
    stats.end(request, 200)
    stats.refresh_gauges(["m"], [("m", "w1")])
    assert held() == {"w1": 0}


def test_the_routers_hit_rate_counts_what_is_loaded_as_well(stats: Stats) -> None:
    for placed in (Placed(1, "w0", 2, "", host_blocks=3, disk_blocks=1), Placed(2, "w0", 0, "")):
        stats.metrics.note_placement("m", placed, prompt_blocks=8, hashing_ms=0.1, round_trip_ms=0.2)
    assert b'dynamo_component_router_kv_hit_rate{model="m"} 0.375' in generate_latest(stats.metrics.registry)
