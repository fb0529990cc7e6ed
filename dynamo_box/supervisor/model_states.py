"""The states of a model, and the legal ways between them. Pure.

starting ─► awake ─► falling_asleep ─► asleep ─► waking ─► awake
              ▲            │              ▲         │
              └────────────┴ (it couldn't)└─────────┘ (no room, or it couldn't)

`falling_asleep` may also begin at `starting`: a model that proved itself and has no room to stay awake.
"""

from __future__ import annotations

import enum

from dynamo_box.supervisor.states import IllegalTransition


class ModelState(enum.StrEnum):
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    ModelState.STARTING: frozenset({ModelState.AWAKE, ModelState.FALLING_ASLEEP}),
    ModelState.AWAKE: frozenset({ModelState.FALLING_ASLEEP}),
    ModelState.FALLING_ASLEEP: frozenset({ModelState.ASLEEP, ModelState.AWAKE}),
    ModelState.ASLEEP: frozenset({ModelState.WAKING}),
    ModelState.WAKING: frozenset({ModelState.AWAKE, ModelState.ASLEEP}),
}


def check(old: ModelState, new: ModelState) -> ModelState:
    """`new`, if there is a way to it.

    Raises:
        IllegalTransition: there is none.
    """
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"model: {old} -> {new}")
    return new
