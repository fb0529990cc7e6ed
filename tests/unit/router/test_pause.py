from __future__ import annotations

from dynamo_box.router.link import FIRST_PAUSE_S, LONGEST_PAUSE_S, STABLE_S, Pause


def test_no_pause_first_then_longer_ones_up_to_a_limit() -> None:
    pause, now, taken = Pause(), 0.0, []
    for _ in range(10):
        taken.append(pause.next(now))
        now += taken[-1]
    assert taken[:4] == [0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert taken[-1] == LONGEST_PAUSE_S
    assert pause.next(now + STABLE_S + 1.0) == 0.0
