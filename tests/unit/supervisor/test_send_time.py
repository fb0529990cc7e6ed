"""When a watcher gets its next snapshot."""

from __future__ import annotations

from dynamo_box.supervisor.control_server import MAX_WATCH_HZ, MIN_WATCH_HZ, send_time, watch_rate


def test_what_comes_after_a_pause_is_sent_at_once() -> None:
    assert send_time(10.1, 12.3, 4.0) == 12.3
    assert send_time(float("-inf"), 12.3, 4.0) == 12.3


def test_steady_changes_are_sent_at_the_multiples_of_the_interval() -> None:
    sent_at, times = 10.1, []
    for _ in range(8):
        sent_at = send_time(sent_at, sent_at + 0.02, 4.0) + 0.004
        times.append(round(sent_at - 0.004, 3))
    assert times == [10.5, 10.75, 11.0, 11.25, 11.5, 11.75, 12.0, 12.25]


def test_watchers_of_one_rate_fall_in_step() -> None:
    assert {send_time(10.0 + late / 100, 10.13, 4.0) for late in range(5, 13)} == {10.5}
    assert send_time(10.0, 10.13, 4.0) == 10.25


def test_no_rate_that_is_asked_for_stops_the_clock() -> None:
    asked = (2.0, 0.0, -1.0, 1e9, float("inf"), float("nan"))
    assert [watch_rate(hz) for hz in asked] == [2.0, MIN_WATCH_HZ, MIN_WATCH_HZ, *[MAX_WATCH_HZ] * 3]
