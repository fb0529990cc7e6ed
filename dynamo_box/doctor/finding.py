"""One line of the report, and what a list of them amounts to."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec


class Status(enum.StrEnum):
    """SKIP: there was nothing to look at, or no permission."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Finding(msgspec.Struct, frozen=True):
    """What was found. Of a warning or a failure `why` says in a few words what it does to a box, and `command` is what
    mends it, to be typed as it stands; empty where no command does. `fixable`: `dynbox doctor --fix` does.
    """

    name: str
    status: Status
    found: str
    why: str = ""
    command: str = ""
    fixable: bool = False
    area: str = ""


FIX = "dynbox doctor --fix"


def passed(name: str, found: str) -> Finding:
    return Finding(name, Status.PASS, found)


def skipped(name: str, found: str) -> Finding:
    return Finding(name, Status.SKIP, found)


def warned(name: str, found: str, why: str, command: str = "") -> Finding:
    return Finding(name, Status.WARN, found, why, command)


def failed(name: str, found: str, why: str, command: str = "") -> Finding:
    return Finding(name, Status.FAIL, found, why, command)


def fixable(name: str, found: str, why: str) -> Finding:
    """A warning of something that is ours to mend."""
    return Finding(name, Status.WARN, found, why, FIX, fixable=True)


def overall(findings: Iterable[Finding]) -> Status:
    """The worst of them; what was skipped doesn't count."""
    statuses = {finding.status for finding in findings}
    return next((status for status in (Status.FAIL, Status.WARN) if status in statuses), Status.PASS)
