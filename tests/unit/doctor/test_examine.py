"""Checks side by side: one that raises or hangs is a finding, and never the end of the others."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dynamo_box.doctor.examine import Check, Patience, examine
from dynamo_box.doctor.finding import Finding, Status, failed, overall, passed, skipped, warned
from dynamo_box.doctor.machine import Machine

SHORT_S = 0.05
DEADLINE_S = 60.0


def check(name: str, *findings: Finding) -> Check:
    return Check("area", name, lambda _machine: findings or [passed(name, "fine")])


def names(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def test_findings_come_in_the_order_of_the_checks_with_their_area(machine: Machine) -> None:
    first_may_end = threading.Event()

    def slow(_machine: Machine) -> list[Finding]:
        assert first_may_end.wait(DEADLINE_S)
        return [passed("slow", ""), passed("slow too", "")]

    def quick(_machine: Machine) -> list[Finding]:
        first_may_end.set()
        return [passed("quick", "")]

    found = examine([Check("one", "slow", slow, Patience(DEADLINE_S)), Check("two", "quick", quick)], machine)
    assert names(found) == ["slow", "slow too", "quick"]
    assert [finding.area for finding in found] == ["one", "one", "two"]


def test_a_check_that_raises_is_its_own_failure(machine: Machine) -> None:
    def broken(_machine: Machine) -> list[Finding]:
        raise ZeroDivisionError("by zero")

    found = examine([Check("area", "broken", broken), check("other")], machine)
    assert [finding.status for finding in found] == [Status.FAIL, Status.PASS]
    assert found[0].name == "broken"
    assert found[0].found == "ZeroDivisionError: by zero"


def test_a_check_that_hangs_is_reported_and_left_behind(machine: Machine) -> None:
    release = threading.Event()

    def hangs(_machine: Machine) -> list[Finding]:
        release.wait()
        return [passed("hangs", "too late")]

    try:
        found = examine([Check("area", "hangs", hangs, Patience(SHORT_S)), check("other")], machine)
    finally:
        release.set()
    assert [finding.status for finding in found] == [Status.FAIL, Status.PASS]
    assert found[0].found == "no answer within 0.05 s"


def test_a_long_check_that_gets_on_is_waited_for(machine: Machine) -> None:
    patience = Patience(2.0)
    steps = threading.Event()

    def long(_machine: Machine) -> list[Finding]:
        for _ in range(5):
            steps.wait(0.5)
            patience.renew()
        return [passed("long", "done")]

    assert examine([Check("area", "long", long, patience)], machine)[0].found == "done"


def test_a_quiet_check_runs_when_the_others_are_done(machine: Machine) -> None:
    order = []

    def measures(_machine: Machine) -> list[Finding]:
        order.append("measures")
        return []

    def other(_machine: Machine) -> list[Finding]:
        order.append("other")
        return []

    examine([Check("area", "measures", measures, quiet=True), Check("area", "other", other)], machine)
    assert order == ["other", "measures"]


def test_the_worst_counts_and_what_was_skipped_does_not() -> None:
    assert overall([]) is Status.PASS
    assert overall([skipped("a", ""), passed("b", "")]) is Status.PASS
    assert overall([warned("a", "", ""), passed("b", "")]) is Status.WARN
    assert overall([warned("a", "", ""), failed("b", "", "")]) is Status.FAIL
