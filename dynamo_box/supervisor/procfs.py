"""What /proc says of processes. Whatever can't be read (gone, another user's) is None or left out, never an
error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dynamo_box.supervisor.guard import descendants

PAGE = os.sysconf("SC_PAGE_SIZE")


def pids() -> Iterator[int]:
    """All processes that are visible from here."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            yield int(entry)


def environment_variable(pid: int, name: str) -> str | None:
    """A variable as it was when the process was executed. Zombies have none."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    key = os.fsencode(name) + b"="
    for entry in data.split(b"\0"):
        if entry.startswith(key):
            return os.fsdecode(entry[len(key) :])
    return None


def resident_bytes(root: int) -> int | None:
    """Resident bytes of a process and all its descendants; None when it is gone."""
    own = _resident(root)
    if own is None:
        return None
    return own + sum(_resident(pid) or 0 for pid in descendants(root))


def _resident(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return None
    return int(fields[1]) * PAGE
