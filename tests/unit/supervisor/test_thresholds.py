"""When a figure becomes an event, and that one which hovers doesn't become many."""

from __future__ import annotations

import msgspec
import pytest

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import DeviceFigures, DeviceInfo, DiskInfo
from dynamo_box.supervisor.thresholds import (
    BEYOND_FOR_S,
    CLEAR_FOR_S,
    ERRORS_PAUSE_S,
    Crossing,
    Reading,
    Thresholds,
    device_readings,
    disk_readings,
    host_readings,
    pool_readings,
)

GIB = 1 << 30
GPU = DeviceInfo("GPU-a", "NVIDIA Fake 80GB", "cuda", 100)


def gpu(**figures: object) -> DeviceInfo:
    return msgspec.structs.replace(GPU, figures=msgspec.convert(figures, DeviceFigures))


def level(value: int) -> Reading:
    """Beyond from 10 on, clear below 5."""
    return Reading("it", value >= 10, value < 5, f"up at {value}", f"down at {value}", "router")


def test_a_crossing_has_to_last_to_count() -> None:
    limits = Thresholds()
    assert limits.judge([level(10)], 0.0) == []
    assert limits.judge([level(4)], 1.0) == []
    assert limits.judge([level(11)], 2.0) == []
    assert limits.judge([level(12)], 2.0 + BEYOND_FOR_S) == [Crossing("warning", "router", "up at 12")]
    assert limits.judge([level(13)], 100.0) == [], "it is said once"


def test_the_way_back_is_longer_and_needs_a_margin() -> None:
    limits = Thresholds()
    limits.judge([level(10)], 0.0)
    limits.judge([level(10)], BEYOND_FOR_S)
    assert limits.judge([level(6)], 100.0) == []
    assert limits.judge([level(4)], 110.0) == []
    assert limits.judge([level(4)], 110.0 + CLEAR_FOR_S) == [Crossing("info", "router", "down at 4")]


def test_what_hovers_makes_one_event() -> None:
    limits = Thresholds()
    events = [event for second in range(600) for event in limits.judge([level(12 if second % 7 else 3)], float(second))]
    assert [event.text for event in events] == ["up at 12"]


def test_a_figure_that_hovers_at_its_limit_crosses_it_once() -> None:
    limits = Thresholds()
    hovering = [(float(now), 10 if now % 2 else 7) for now in range(60)]
    told = [(now, event.level) for now, value in hovering for event in limits.judge([level(value)], now)]
    assert told == [(5.0, "warning")], "beyond at 1, 3 and 5, and never clear"


def test_what_is_gone_is_forgotten() -> None:
    limits = Thresholds()
    limits.judge([level(10)], 0.0)
    assert limits.judge([level(10)], BEYOND_FOR_S)
    assert limits.judge([], 50.0) == []
    assert limits.judge([level(3)], 60.0) == [] == limits.judge([level(3)], 100.0), "it never heard of a crossing"


def test_new_errors_are_told_and_growing_counts_not_all_the_time() -> None:
    limits = Thresholds()
    assert limits.judge_errors([gpu(errors=[])], 0.0) == []
    told = limits.judge_errors([gpu(errors=["1 uncorrected ECC", "Xid 31"])], 1.0)
    assert told == [Crossing("warning", None, "GPU-a: 1 uncorrected ECC, Xid 31")]
    growing = [
        event
        for second in range(2, 100)
        for event in limits.judge_errors([gpu(errors=[f"{second} uncorrected ECC", "Xid 31"])], float(second))
    ]
    assert [event.text for event in growing] == [f"GPU-a: {1 + int(ERRORS_PAUSE_S)} uncorrected ECC"]


def test_an_error_that_was_gone_for_a_while_is_news_again() -> None:
    limits = Thresholds()
    limits.judge_errors([gpu(errors=["lost"])], 0.0)
    limits.judge_errors([gpu(errors=[])], 1.0)
    assert limits.judge_errors([gpu(errors=["lost"])], 2.0) == []
    assert len(limits.judge_errors([gpu(errors=["lost"])], ERRORS_PAUSE_S)) == 1


def judged(reading: Reading) -> str:
    return "beyond" if reading.beyond else "clear" if reading.clear else "between"


@pytest.mark.parametrize(("used", "verdict"), [(95, "beyond"), (93, "between"), (91, "clear")])
def test_memory_of_a_gpu(used: int, verdict: str) -> None:
    memory, clocks = device_readings([gpu(used_bytes=used)])
    assert (judged(memory), judged(clocks)) == (verdict, "clear")
    assert memory.crossed == f"GPU-a: memory is {used}% full"


@pytest.mark.parametrize(("reasons", "verdict"), [(["power cap"], "clear"), (["power cap", "power brake"], "beyond")])
def test_clocks_of_a_gpu(reasons: list[str], verdict: str) -> None:
    (clocks,) = device_readings([gpu(throttled=reasons)])
    assert judged(clocks) == verdict
    assert verdict == "clear" or clocks.crossed == "GPU-a: throttled: power brake"


@pytest.mark.parametrize(("celsius", "verdict"), [(90.0, "beyond"), (87.0, "between"), (70.0, "clear")])
def test_temperature_of_a_gpu(celsius: float, verdict: str) -> None:
    temperature, _ = device_readings([gpu(temperature_c=celsius)])
    assert judged(temperature) == verdict


def test_a_gpu_that_has_gone_is_not_said_to_have_recovered() -> None:
    limits = Thresholds()
    limits.judge(device_readings([gpu(throttled=["power brake"])]), 0.0)
    assert limits.judge(device_readings([gpu(throttled=["power brake"])]), BEYOND_FOR_S)
    gone = [limits.judge(device_readings([gpu(errors=["lost"])]), float(now)) for now in range(10, 60)]
    assert gone == [[]] * 50


def test_what_says_nothing_is_not_judged() -> None:
    cpu = DeviceInfo("cpu", "the cpu", "cpu", 100, figures=DeviceFigures(used_bytes=100))
    assert list(device_readings([GPU, cpu])) == []
    assert list(host_readings(None, 5)) == [] == list(host_readings(5, None))
    assert list(disk_readings([DiskInfo("/proc", "logs", 0, 0)])) == []
    assert list(pool_readings([("w", WorkerFigures(waiting=5))])) == []


@pytest.mark.parametrize(("available", "verdict"), [(4, "beyond"), (6, "between"), (9, "clear")])
def test_host_memory(available: int, verdict: str) -> None:
    (memory,) = host_readings(100 * GIB, available * GIB)
    assert judged(memory) == verdict
    assert memory.crossed == f"host memory runs out: {available}.0 GiB of 100 GiB available"


@pytest.mark.parametrize(
    ("total", "free", "verdict"),
    [(10, 1, "beyond"), (10, 5, "clear"), (1000, 49, "beyond"), (1000, 55, "between"), (1000, 61, "clear")],
)
def test_disks(total: int, free: int, verdict: str) -> None:
    (disk,) = disk_readings([DiskInfo("/", "logs", total * GIB, free * GIB)])
    assert judged(disk) == verdict


@pytest.mark.parametrize(("used", "waiting", "verdict"), [(91, 3, "beyond"), (96, 0, "clear"), (80, 3, "between")])
def test_kv_pools(used: int, waiting: int, verdict: str) -> None:
    (pool,) = pool_readings([("w", WorkerFigures(waiting=waiting, kv_blocks_total=100, kv_blocks_used=used))])
    assert (judged(pool), pool.process) == (verdict, "w")
