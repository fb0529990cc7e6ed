"""Who sleeps so that another can wake."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.plan.awake import BUSY_TURN_S, TURN_S, Needs, Room, Standing, Step, make_room

CAPACITY = {"cpu": 100}


def model(name: str, size: int = 60, weights: int = 30, **changes: Any) -> Standing:
    defaults: dict[str, Any] = {"state": "awake", "used_s": 10.0, "awake_s": 100.0}
    return Standing(name, Needs({"cpu": size}, {"cpu": weights}), **{**defaults, **changes})


WANTED = model("wanted", state="asleep", place="host")


def test_what_fits_needs_nobody_to_sleep() -> None:
    assert make_room(WANTED, [model("a", 40)], CAPACITY) == Room()


def test_the_least_recently_used_idle_one_goes_first_and_no_more_than_needed() -> None:
    others = [model("fresh", 30, used_s=1.0), model("stale", 30, used_s=50.0), model("older", 30, used_s=20.0)]
    room = make_room(WANTED, others, CAPACITY)
    assert [step.model for step in room.steps] == ["stale", "older"]


def test_a_small_one_is_spared_if_a_larger_one_alone_makes_the_room() -> None:
    others = [model("small", 5, used_s=50.0), model("large", 60, used_s=20.0)]
    assert [step.model for step in make_room(WANTED, others, CAPACITY).steps] == ["large"]


def test_idle_ones_go_before_busy_ones() -> None:
    others = [model("busy", 40, busy=True, awake_s=1000.0), model("idle", 40, used_s=0.6)]
    assert [step.model for step in make_room(WANTED, others, CAPACITY).steps] == ["idle"]


def test_a_busy_one_takes_turns_when_no_other_is_there() -> None:
    room = make_room(WANTED, [model("busy", busy=True)], CAPACITY)
    assert room.steps == (Step("busy", "host", "takes turns with wanted"),)


def test_whoever_has_just_woken_keeps_its_turn() -> None:
    room = make_room(WANTED, [model("busy", busy=True, awake_s=BUSY_TURN_S - 0.5)], CAPACITY)
    assert room.steps == () and room.wait_s is not None and 0.4 < room.wait_s < 0.6
    room = make_room(WANTED, [model("idle", awake_s=TURN_S / 2)], CAPACITY)
    assert room.wait_s is not None and not room.missing


def test_min_awake_is_kept() -> None:
    room = make_room(WANTED, [model("a", awake_s=20.0, min_awake_s=60.0)], CAPACITY)
    assert room.wait_s == 40.0


def test_pinned_models_stay_and_the_reason_names_them() -> None:
    room = make_room(WANTED, [model("king", pin=True)], CAPACITY)
    assert room.steps == () and room.wait_s is None
    assert "king (pinned)" in room.missing and "20 B missing" in room.missing


def test_a_model_larger_than_the_device_never_makes_others_sleep() -> None:
    giant = model("giant", 500, state="asleep", place="disk")
    room = make_room(giant, [model("a")], CAPACITY)
    assert room.steps == () and "giant needs 500 B on cpu" in room.missing


def test_no_turn_is_waited_for_that_could_not_help() -> None:
    giant = model("giant", 500, state="asleep", place="disk")
    room = make_room(giant, [model("a", awake_s=0.0)], CAPACITY)
    assert room.wait_s is None and room.missing


def test_weights_that_sleep_on_the_device_move_off_it_when_nothing_else_helps() -> None:
    sleeper = model("sleeper", 80, weights=50, state="asleep", place="device", keep="device")
    room = make_room(WANTED, [sleeper], CAPACITY)
    assert room.steps == (Step("sleeper", "host", "its weights make room for wanted"),)


def test_keep_device_leaves_the_weights_if_there_is_room_for_them() -> None:
    one = model("one", 70, weights=30, keep="device")
    assert make_room(WANTED, [one], CAPACITY).steps == (Step("one", "device", "makes room for wanted"),)


def test_a_model_on_its_way_is_waited_for() -> None:
    assert make_room(WANTED, [model("a", state="moving")], CAPACITY).wait_s is not None


def test_devices_that_the_model_does_not_use_are_left_alone() -> None:
    elsewhere = Standing("gpu", Needs({"GPU-1": 90}, {"GPU-1": 50}), "awake", awake_s=100.0, used_s=9.0)
    room = make_room(WANTED, [elsewhere, model("a", 50)], {"cpu": 100, "GPU-1": 100})
    assert [step.model for step in room.steps] == ["a"]


standings = st.builds(
    model,
    name=st.sampled_from("abcdef"),
    size=st.integers(1, 120),
    weights=st.integers(0, 1),
    state=st.sampled_from(["awake", "asleep", "moving"]),
    place=st.sampled_from(["device", "host", "disk"]),
    keep=st.sampled_from(["device", "host", "disk"]),
    pin=st.booleans(),
    busy=st.booleans(),
    used_s=st.floats(0, 100),
    awake_s=st.floats(0, 100),
    min_awake_s=st.floats(0, 50),
)


@given(st.lists(standings, max_size=6, unique_by=lambda one: one.name), st.integers(1, 150))
def test_whatever_the_models_a_decision_makes_room_or_says_why_not(others: list[Standing], size: int) -> None:
    wanted = model("wanted", size, state="asleep", place="host")
    room = make_room(wanted, others, CAPACITY)
    assert sum((bool(room.steps), room.wait_s is not None, bool(room.missing))) <= 1
    held = {
        one.name: 0 if one.state == "asleep" and one.place != "device"
        else one.needs.weights["cpu"] if one.state == "asleep" else one.needs.awake["cpu"]
        for one in others
    }  # fmt: skip
    fits_already = sum(held.values()) + size <= 100
    assert fits_already == (room == Room())
    by_name = {one.name: one for one in others}
    for step in room.steps:
        one = by_name[step.model]
        assert not one.pin and one.state != "moving"
        held[step.model] = one.needs.weights["cpu"] if step.to == "device" else 0
    if room.steps:
        assert sum(held.values()) + size <= 100
