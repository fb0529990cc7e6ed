"""Where a model's weights are, and how they got there. The supervisor is the one writer; snapshot, frontend and people
read it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Act = Literal["sleep", "wake"]
ModelState = Literal["starting", "awake", "falling_asleep", "asleep", "waking", "unavailable"]
"""falling_asleep: takes nothing new, finishes what runs, then lets go. unavailable: awake by intent, but no worker
serves (one crashed and is on its way back, or was given up).
"""


class Residency(msgspec.Struct, frozen=True):
    """One model. `place` of its weights: device, host, disk, or "" for none (its workers are stopped, or starting).

    `since` is Unix time of the last change of `state`. `phase` is what a transition is doing now. `held`: only a
    person wakes it. `engine_sleeps` False: its engine can't sleep, so sleep stops its workers and wake starts them.
    `wake_phases` and `sleep_phases` are seconds by phase of the last one, in order; "total" is from the request to the
    end. `cold`: the last wake was a cold start, and `note` says why. `slept_s` sums all completed sleeps.
    """

    model: str
    state: ModelState = "starting"
    place: Literal["device", "host", "disk", ""] = ""
    since: float = 0.0
    phase: str = ""
    held: bool = False
    engine_sleeps: bool = True
    keep: Literal["device", "host", "disk"] = "host"
    pin: bool = False
    idle_ttl_s: float | None = None
    min_awake_s: float = 0.0
    weights_bytes: int | None = None
    sleeps: int = 0
    wakes: int = 0
    cold_wakes: int = 0
    slept_s: float = 0.0
    sleep_phases: dict[str, float] = {}
    wake_phases: dict[str, float] = {}
    cold: bool = False
    note: str = ""
