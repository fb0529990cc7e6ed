"""Names of the memory files, by which readers of /proc know them: `dynbox:<run key>:<place>:<device>:<layout>`."""

from __future__ import annotations

from typing import NamedTuple

MAX_NAME_BYTES = 249
"""What memfd_create takes."""

_PREFIX = "dynbox"
_PLACES = ("device", "host")


class MemfdName(NamedTuple):
    run_key: str
    place: str
    device: str
    layout: str


def memfd_name(run_key: str, place: str, device: str, layout: str) -> str:
    """The layout comes last, so it may hold anything but NUL.

    Raises:
        ValueError: a part can't be told apart from the others, or all of it is too long for the kernel.
    """
    name = ":".join((_PREFIX, run_key, place, device, layout))
    if parse_memfd_name(name) != (run_key, place, device, layout):
        raise ValueError(f"{name!r} can't be the name of a memory file")
    return name


def parse_memfd_name(text: str) -> MemfdName | None:
    """None: not one of ours."""
    parts = text.split(":", 4)
    if len(parts) != 5 or "\0" in text or len(text.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        return None
    prefix, run_key, place, device, layout = parts
    if prefix != _PREFIX or place not in _PLACES or not (run_key and device and layout):
        return None
    return MemfdName(run_key, place, device, layout)
