"""The states of a process, the legal ways between them, and the decision whether to try again. Pure.

planned ─► starting ─► ready ─► draining ─► stopping ─► stopped
             │  ▲       │ ▲ ▲       │ ▲                     │
             ▼  │       ▼ │ └───────┤ └ (requests left)     ▼
           backoff ◄─ (failure)     ▼                    starting      (a person asked for a restart)
                │        │       asleep ─► waking ─► ready
                ▼        ▼          └──► stopped                       (it died asleep; waking starts it)
              starting  fatal ─► starting

A worker also drains to change its role: then it is ready again, or, if it died meanwhile, has failed like a ready one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dynamo_box.plan.types import RestartPolicy


class State(enum.StrEnum):
    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FATAL = "fatal"
    STOPPED = "stopped"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.STARTING, State.STOPPED}),
    State.STARTING: frozenset({State.READY, State.BACKOFF, State.FATAL, State.STOPPING, State.STOPPED}),
    State.READY: frozenset({State.DRAINING, State.STOPPING, State.BACKOFF, State.FATAL, State.STOPPED}),
    State.DRAINING: frozenset({State.STOPPING, State.STOPPED, State.READY, State.ASLEEP, State.BACKOFF, State.FATAL}),
    State.ASLEEP: frozenset({State.WAKING, State.STOPPING, State.STOPPED}),
    State.WAKING: frozenset({State.READY, State.ASLEEP, State.STOPPING, State.STOPPED}),
    State.STOPPING: frozenset({State.STOPPED}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPED}),
    State.FATAL: frozenset({State.STARTING, State.STOPPED}),
    State.STOPPED: frozenset({State.STARTING}),
}


class IllegalTransition(Exception):
    """A bug in the supervisor: nobody may move a process that way."""


def check(old: State, new: State) -> State:
    """`new`, if there is a way to it.

    Raises:
        IllegalTransition: there is none.
    """
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{old} -> {new}")
    return new


TRIES_WITHIN_START = 2
"""Before a process has been ready once, it may fail this often: `up` should answer soon, and most first
failures are for good; one more try gets over a passing one (a port in TIME_WAIT, memory that a neighbour is
just giving back).
"""


@dataclass(frozen=True)
class Retry:
    """Start again after `delay_s`; `failures` in a row so far."""

    delay_s: float
    failures: int


@dataclass(frozen=True)
class GiveUp:
    reason: str


def after_failure(
    policy: RestartPolicy, *, failures: int, ready_for_s: float | None, ever_ready: bool, permanent: bool
) -> Retry | GiveUp:
    """What to do when a process has ended without being asked to.

    `failures` in a row before this one; `ready_for_s`: how long it had been ready, None if it never got there
    in this life. The back-off is `first_s * factor ** (failures before)`, capped, and starts over after
    `stable_s` of ready.
    """
    if permanent:
        return GiveUp("a restart would fail in the same way")
    if ready_for_s is not None and ready_for_s >= policy.stable_s:
        failures = 0
    limit = policy.give_up_after if ever_ready else min(policy.give_up_after, TRIES_WITHIN_START)
    count = failures + 1
    if count >= limit:
        return GiveUp(f"failed {count} times in a row" if count > 1 else "failed")
    exponent = min(failures, 64)
    return Retry(min(policy.first_s * policy.factor**exponent, policy.longest_s), count)
