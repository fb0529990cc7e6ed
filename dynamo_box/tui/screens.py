"""The seven screens, by key and name. A view is imported when it is first shown: each costs start time.

`logs` is no view: a hundred thousand lines are no part of a snapshot. It is a widget of its own
(`dynamo_box.tui.views.logs`), and its name stands here for the keys and the tabs.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

from dynamo_box.tui.model import View


class ScreenName(NamedTuple):
    key: str
    name: str
    summary: str


LOGS = "logs"

SCREENS = (
    ScreenName("1", "fleet", "processes: what they do, hold and deliver"),
    ScreenName("2", "routing", "where requests go, and why"),
    ScreenName("3", "memory", "who holds the bytes of each device, the host and the disks"),
    ScreenName("4", "requests", "what runs now, by request"),
    ScreenName("5", "models", "what is served, and by what"),
    ScreenName("6", LOGS, "what every process writes, merged by time"),
    ScreenName("7", "events", "starts, deaths, restarts"),
)


def by_name(wanted: str) -> ScreenName | None:
    """The screen of this name or key."""
    return next((each for each in SCREENS if wanted.casefold() in (each.name, each.key)), None)


@functools.cache
def view(name: str) -> View:
    """The view behind a screen other than `logs`."""
    found: View = importlib.import_module(f"dynamo_box.tui.views.{name}").VIEW
    return found
