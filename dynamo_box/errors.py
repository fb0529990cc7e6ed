"""Every error that a person may see, and the exit codes.

    BoxError                 what happened, why, and what to do
    ├── UsageError           wrong flag, profile or name                      exit 2
    │   └── ProfileError     problems in a profile, all at once               exit 2
    ├── PlanRefused          this hardware can't carry this profile           exit 2
    ├── NotRunning           no box, or no such process                       exit 3
    ├── TimedOut             a deadline passed                                exit 4
    └── (BoxError itself)    anything else that failed                        exit 1

`dynamo_box.cli` is the only place that turns these into stderr and an exit status.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    TIMED_OUT = 4
    INTERRUPTED = 130


class BoxError(Exception):
    """`what` is one sentence; `remedy`, if any, says what the reader can do; `details` are further lines."""

    exit_code = ExitCode.FAILED

    def __init__(self, what: str, *, remedy: str | None = None, details: tuple[str, ...] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.details = details


class UsageError(BoxError):
    exit_code = ExitCode.USAGE


class ProfileError(UsageError):
    """A profile that can't be used; `details` holds one `file:line:column: problem` line for each problem."""


class PlanRefused(BoxError):
    """Or: what runs on this hardware leaves no room for more."""

    exit_code = ExitCode.USAGE


class NotRunning(BoxError):
    exit_code = ExitCode.NOT_RUNNING


class TimedOut(BoxError):
    exit_code = ExitCode.TIMED_OUT
