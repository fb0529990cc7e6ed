"""Load what the tiers have, or compute it: the faster one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.kv.onboard import Choice, Rates, choose

MIB = 1024 * 1024
SIZE = 16


def chosen(tiers: str, host: float | None, disk: float | None, prefill: float | None) -> Choice:
    return choose(tiers, block_bytes=MIB, block_size=SIZE, rates=Rates({"2": host, "3": disk}, prefill))


def test_what_is_faster_to_load_is_loaded() -> None:
    choice = chosen("2222", 1000 * MIB, None, 160)
    assert choice == Choice(4, "loading takes 4.0 ms, computing 400.0 ms")


def test_what_is_faster_to_compute_is_computed() -> None:
    choice = chosen("3333", None, 2 * MIB, 160)
    assert choice == Choice(0, "computing 4 of 4 blocks is faster than loading them")


def test_a_slow_tier_behind_a_fast_one_is_cut_off() -> None:
    choice = chosen("222333", 1000 * MIB, 2 * MIB, 160)
    assert choice == Choice(3, "computing 3 of 6 blocks is faster than loading them")


def test_a_slow_block_is_worth_it_for_what_follows() -> None:
    """What is loaded is a prefix: a slow block before many fast ones goes with them, and one before few doesn't."""
    assert chosen("3" + "2" * 10, 1000 * MIB, 2 * MIB, 160).blocks == 11
    assert chosen("3" + "2" * 3, 1000 * MIB, 2 * MIB, 160).blocks == 0


@pytest.mark.parametrize("prefill", [None, 0.0])
def test_unmeasured_everything_is_loaded(prefill: float | None) -> None:
    assert chosen("2233", 1.0, 1.0, prefill) == Choice(4, "the prefill rate has not been measured yet")
    assert chosen("2233", None, None, 1e9).blocks == 4, "the first loads are the measurement"
    assert chosen("2233", 1.0, None, 1e9).blocks == 0, "but not behind what is known to be slow"


def test_a_tier_that_gave_nothing_is_not_waited_for() -> None:
    assert chosen("22", 0.0, None, 1.0).blocks == 0
    assert chosen("232", 100 * MIB, 0.0, 160).blocks == 1


def test_nothing_found() -> None:
    assert chosen("", 1.0, 1.0, None) == Choice(0, "nothing was found")
    assert chosen("", 1.0, 1.0, 100.0).blocks == 0


def test_among_equals_the_longest() -> None:
    assert chosen("2222", 16 * MIB, None, SIZE * 16).blocks == 4


@given(
    tiers=st.text("23", max_size=30),
    host=st.none() | st.floats(1e3, 1e12),
    disk=st.none() | st.floats(1e3, 1e12),
    prefill=st.floats(1.0, 1e6),
)
def test_no_other_cut_is_faster(tiers: str, host: float | None, disk: float | None, prefill: float) -> None:
    speeds = {"2": host, "3": disk}

    def seconds(cut: int) -> float:
        loading = sum(MIB / speed if (speed := speeds[tier]) else 0.0 for tier in tiers[:cut])
        return loading + (len(tiers) - cut) * SIZE / prefill

    choice = chosen(tiers, host, disk, prefill)
    best = min(seconds(cut) for cut in range(len(tiers) + 1))
    assert seconds(choice.blocks) <= best * (1 + 1e-9) + 1e-12
    assert choice.reason
