"""Spans of time on the command line."""

from __future__ import annotations

import typer

LONGEST_S = 7 * 86400.0
"""A week: longer than anything here takes, and within what the system's clocks and polls accept."""


def seconds(value: float | None) -> float | None:
    """Check an option's value; `nan` and `inf` are numbers too, and no time to wait.

    Raises:
        BadParameter: it is not between 0 and a week.
    """
    if value is None or 0 <= value <= LONGEST_S:
        return value
    raise typer.BadParameter(f"{value:g} is not a number of seconds from 0 to {LONGEST_S:.0f}")
