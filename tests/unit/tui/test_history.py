"""Figures over time, from counters in snapshots."""

from __future__ import annotations

from typing import Any

from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.protocol.figures import (
    FrontendFigures,
    KvStoreFigures,
    RequestFigures,
    TierFigures,
    TierUse,
    WorkerFigures,
    WorkerTiers,
)
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui.history import BUCKET_S, KEPT_BUCKETS, Bucket, Flow, History

START = 1_000_000 * BUCKET_S


def process(
    name: str, figures: WorkerFigures | FrontendFigures | KvStoreFigures | None, pid: int | None = 7
) -> ProcessInfo:
    return ProcessInfo(name, "worker", "m", "aggregated", "ready", "", pid, 0, None, None, figures=figures)


def at(seconds: float, *processes: ProcessInfo) -> BoxSnapshot:
    return replace(snapshots.empty(), processes=processes, at=START + seconds)


def worker(prompt: int, cached: int = 0, requests: int = 0, pid: int = 7, name: str = "w") -> ProcessInfo:
    return process(name, WorkerFigures(prompt_tokens=prompt, cached_tokens=cached, requests=requests), pid)


def fed(*moments: BoxSnapshot) -> History:
    history = History()
    for moment in moments:
        history.feed(moment)
    return history


def tokens(history: History) -> list[tuple[int, int]]:
    """(bucket from the start, prompt tokens) of the worker w."""
    return [(bucket.number - 1_000_000, bucket.prompt_tokens) for bucket in history.workers["w"]]


def test_what_a_worker_did_before_it_was_first_seen_is_not_counted() -> None:
    assert tokens(fed(at(0, worker(500)))) == []
    assert tokens(fed(at(0, worker(500)), at(1, worker(560)))) == [(0, 60)]


def test_differences_fall_into_the_bucket_of_their_snapshot_and_quiet_buckets_are_absent() -> None:
    history = fed(*(at(seconds, worker(prompt)) for seconds, prompt in ((0, 0), (1, 10), (4, 30), (6, 31), (21, 40))))
    assert tokens(history) == [(0, 30), (1, 1), (4, 9)]
    recent = history.recent("w", 4)
    assert [bucket and bucket.prompt_tokens for bucket in recent] == [1, None, None, 9]
    assert history.recent("nobody", 2) == [None, None]


def test_a_new_life_counts_from_zero_even_if_it_has_done_more_already() -> None:
    assert tokens(fed(at(0, worker(500)), at(1, worker(20)))) == [(0, 20)]
    assert tokens(fed(at(0, worker(5)), at(1, worker(20, pid=8)))) == [(0, 20)]


def test_a_life_between_two_others_of_the_same_process_is_not_lost() -> None:
    gone = process("w", None, pid=None)
    assert tokens(fed(at(0, worker(500)), at(1, gone), at(2, worker(20, pid=8)))) == [(0, 20)]


def test_a_hit_rate_is_never_more_than_all() -> None:
    assert Bucket(1).hit_rate is None
    assert Bucket(1, prompt_tokens=10, cached_tokens=5).hit_rate == 0.5
    assert Bucket(1, prompt_tokens=10, cached_tokens=15).hit_rate == 1.0


def test_a_clock_that_was_set_back_starts_over() -> None:
    history = fed(at(100, worker(0)), at(101, worker(50)), at(3, worker(60)), at(4, worker(70)))
    assert tokens(history) == [(0, 10)]


def test_history_is_bounded_and_forgets_who_is_long_gone() -> None:
    history = History()
    for number in range(KEPT_BUCKETS + 20):
        history.feed(at(number * BUCKET_S, worker(number), worker(number, name="other")))
    assert len(history.workers["w"]) == KEPT_BUCKETS
    history.feed(at((KEPT_BUCKETS + 21) * BUCKET_S, worker(1000)))
    assert "other" in history.workers
    history.feed(at(3 * KEPT_BUCKETS * BUCKET_S, worker(1000)))
    assert set(history.workers) == {"w"}


def request(output: int, name: str = "r", **given: Any) -> RequestFigures:
    return RequestFigures(name, "m", "decode", "w", START, 10, 0, output, **given)


def served(seconds: float, *live: RequestFigures) -> BoxSnapshot:
    return at(seconds, process("frontend", FrontendFigures(live=live)))


def test_the_rate_of_a_request_needs_two_looks_at_it_some_time_apart() -> None:
    assert fed(served(0, request(5))).token_rate(request(5)) is None
    assert fed(served(0, request(5)), served(0.25, request(10))).token_rate(request(10)) is None
    assert fed(served(0, request(5)), served(2, request(45))).token_rate(request(45)) == 20.0
    assert fed(served(0, request(5))).token_rate(request(5, "unheard of")) is None


def test_the_wait_for_the_first_token_is_no_part_of_a_rate() -> None:
    history = fed(served(0, request(0)), served(50, request(1)), served(52, request(21)))
    assert history.token_rate(request(21)) == 10.0


def test_a_request_that_stalls_comes_down_to_zero() -> None:
    history = fed(*(served(number, request(min(number, 10) + 1)) for number in range(20)))
    assert history.token_rate(request(11)) == 0.0


def test_requests_that_ended_are_forgotten() -> None:
    history = fed(served(0, request(5)), served(1), served(2, request(9)))
    assert history.token_rate(request(9)) is None


def offloading(stored: int, host: int = 0, disk: int = 0, pid: int = 7, name: str = "w") -> ProcessInfo:
    """A worker that has moved so many bytes to the host tier, and so many back from either."""
    tiers = WorkerTiers(offloaded_bytes=stored, host=TierUse(bytes=host), disk=TierUse(bytes=disk))
    return process(name, WorkerFigures(tiers=tiers), pid)


def store(written: int, read: int, pid: int = 9) -> ProcessInfo:
    disk = TierFigures("on", in_bytes=written, out_bytes=read)
    return process("kvstore", KvStoreFigures(TierFigures("on"), disk), pid)


def test_flows_are_summed_over_workers_and_named_by_their_direction() -> None:
    history = fed(
        at(0, offloading(100, 10, 1), offloading(0, name="v"), store(7, 5)),
        at(2, offloading(300, 20, 3), offloading(40, name="v"), store(27, 9)),
    )
    rates = {flow: history.flow_rate(flow) for flow in Flow}
    assert rates == {Flow.OFFLOAD: 120.0, Flow.ONBOARD: 6.0, Flow.WRITE: 10.0, Flow.READ: 2.0}


def test_a_flow_has_no_rate_before_it_has_been_watched_and_none_where_there_are_no_tiers() -> None:
    assert fed(at(0, offloading(100))).flow_rate(Flow.OFFLOAD) is None
    assert fed(at(0, offloading(100)), at(0.5, offloading(200))).flow_rate(Flow.OFFLOAD) is None
    assert fed(at(0, worker(1)), at(5, worker(100))).flow_rate(Flow.OFFLOAD) is None


def test_a_flow_that_stalls_comes_down_to_zero() -> None:
    history = fed(*(at(number, offloading(min(number, 5) * 100)) for number in range(12)))
    assert history.flow_rate(Flow.OFFLOAD) == 0.0
    assert history.recent_flow(Flow.OFFLOAD, 4) == [0, 400, 100, 0]
    assert history.recent_flow(Flow.READ, 2) == [0, 0]


def test_a_new_life_of_worker_or_store_moves_bytes_from_zero() -> None:
    history = fed(at(0, offloading(500), store(900, 0)), at(2, offloading(40, pid=8), store(20, 0)))
    assert history.flow_rate(Flow.OFFLOAD) == 20.0
    assert history.flow_rate(Flow.WRITE) == 10.0
    gone = process("w", None, pid=None)
    assert fed(at(0, offloading(500)), at(1, gone), at(2, offloading(40, pid=8))).flow_rate(Flow.OFFLOAD) == 20.0


def test_flows_start_over_with_the_clock_and_are_bounded() -> None:
    history = fed(*(at(number * BUCKET_S, offloading(number)) for number in range(KEPT_BUCKETS + 20)))
    assert history.recent_flow(Flow.OFFLOAD, KEPT_BUCKETS + 50)[:50] == [0] * 50
    assert sum(history.recent_flow(Flow.OFFLOAD, KEPT_BUCKETS + 50)) == KEPT_BUCKETS
    history.feed(at(3, offloading(5)))
    assert history.flow_rate(Flow.OFFLOAD) is None
    assert history.recent_flow(Flow.OFFLOAD, 3) == [0, 0, 0]


def loading(prompt: int, host: int, disk: int) -> ProcessInfo:
    tiers = WorkerTiers(host=TierUse(loaded=host), disk=TierUse(loaded=disk))
    return process("w", WorkerFigures(prompt_tokens=prompt, tiers=tiers))


def test_tokens_from_the_tiers_fall_into_buckets_as_others_do() -> None:
    history = fed(at(0, loading(100, 50, 20)), at(1, loading(300, 130, 30)), at(6, loading(400, 130, 90)))
    assert [(bucket.host_tokens, bucket.disk_tokens) for bucket in history.workers["w"]] == [(80, 10), (0, 60)]


def test_a_worker_that_loses_its_tiers_has_not_begun_a_new_life() -> None:
    history = fed(at(0, loading(100, 50, 20)), at(1, worker(110)))
    assert tokens(history) == [(0, 10)]
    assert (history.workers["w"][0].host_tokens, history.workers["w"][0].disk_tokens) == (0, 0)
