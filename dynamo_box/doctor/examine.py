"""Run checks side by side, each in a thread of its own and with a deadline.

Anything that is looked at may hang (a dead network mount, a wedged driver), and a thread that hangs in the kernel can't
be stopped. So the threads are daemons: one that is late is reported as a failure and left behind, and the command ends
without it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from dynamo_box.doctor.finding import Finding, failed
from dynamo_box.doctor.machine import Machine

DEADLINE_S = 1.8


class Patience:
    """How long a check may go without a sign of life; a long one that gets on calls `renew`."""

    def __init__(self, seconds: float = DEADLINE_S) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self.seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Check:
    """`name` stands in for the names of findings that never came. One that measures is `quiet`: it runs by itself, when
    all others are done.
    """

    area: str
    name: str
    look: Callable[[Machine], Sequence[Finding]]
    patience: Patience = field(default_factory=Patience)
    quiet: bool = False


def examine(checks: Sequence[Check], machine: Machine) -> tuple[Finding, ...]:
    """What all of them find, in the order of `checks`. Takes as long as the slowest, or its deadline."""
    rounds = [[check for check in checks if not check.quiet], *([check] for check in checks if check.quiet)]
    found: dict[str, Sequence[Finding]] = {}
    for together in rounds:
        found.update(_side_by_side(together, machine))
    return tuple(msgspec.structs.replace(each, area=check.area) for check in checks for each in found[check.name])


def _side_by_side(checks: Iterable[Check], machine: Machine) -> dict[str, Sequence[Finding]]:
    """Findings by the check's name."""
    pending = {check.name: check for check in checks}
    results: queue.SimpleQueue[tuple[str, Sequence[Finding]]] = queue.SimpleQueue()
    for check in pending.values():
        check.patience.renew()
        threading.Thread(
            target=lambda check=check: results.put((check.name, _guarded(check, machine))), name=check.name, daemon=True
        ).start()
    found: dict[str, Sequence[Finding]] = {}
    while pending:
        try:
            name, findings = results.get(timeout=max(min(check.patience.left_s for check in pending.values()), 0.001))
        except queue.Empty:
            for check in [check for check in pending.values() if check.patience.left_s <= 0]:
                del pending[check.name]
                found[check.name] = [_late(check)]
            continue
        if pending.pop(name, None) is not None:
            found[name] = findings
    return found


def _guarded(check: Check, machine: Machine) -> Sequence[Finding]:
    try:
        return check.look(machine)
    except Exception as error:  # noqa: BLE001 - whatever a broken machine makes a check raise is its finding
        return [
            failed(check.name, f"{type(error).__name__}: {error}", "this check itself failed; others are unaffected")
        ]


def _late(check: Check) -> Finding:
    return failed(
        check.name,
        f"no answer within {check.patience.seconds:g} s",
        "what it looks at hangs (a dead network mount, a wedged driver) or the machine is overloaded",
    )
