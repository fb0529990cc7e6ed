"""Names of memory files: `dynbox:<run key>:<place>:<device>:<layout>`, by which anybody who looks into /proc knows
whose bytes a descriptor or a mapping holds.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_NAME_BYTES = 249
"""What memfd_create takes."""
_PREFIX = "dynbox"
_PLACES = ("device", "host")


@dataclass(frozen=True)
class MemfdName:
    """`layout` is cut where the kernel would refuse the whole name."""

    run_key: str
    place: str
    device: str
    layout: str


def memfd_name(run_key: str, place: str, device: str, layout: str) -> str:
    """A colon within the device is written %3A; the layout is last and may hold any."""
    full = ":".join((_PREFIX, run_key, place, device.replace(":", "%3A"), layout))
    return full.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def parse_memfd_name(name: str) -> MemfdName | None:
    """None if it isn't one of ours. `name` is as given to memfd_create: without "/memfd:" and " (deleted)"."""
    parts = name.split(":", 4)
    if len(parts) != 5 or parts[0] != _PREFIX or parts[2] not in _PLACES:
        return None
    return MemfdName(parts[1], parts[2], parts[3].replace("%3A", ":"), parts[4])
