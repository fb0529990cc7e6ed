"""The machine that a box runs on. The cpu device and the host are one memory, whatever the plan calls its parts."""

from __future__ import annotations

from typing import NamedTuple

from dynamo_box.snapshot import BoxSnapshot, DeviceFigures

HOST = "host"
"""Key of the machine where devices and disks stand beside it."""
HOST_KINDS = ("cpu", "host")
"""Kinds of devices that are the machine's own memory."""


class Host(NamedTuple):
    """`name` is the processor's, empty if no worker runs on it; `planned` are bytes by purpose, of all parts together;
    `ids` are the devices that it consists of.
    """

    name: str
    total: int | None
    planned: dict[str, int]
    figures: DeviceFigures | None
    ids: tuple[str, ...]


def host_of(snapshot: BoxSnapshot) -> Host | None:
    """None if nothing is known of it."""
    parts = [device for device in snapshot.devices if device.kind in HOST_KINDS]
    figures = snapshot.host or next((part.figures for part in parts if part.figures), None)
    sizes = (snapshot.host_memory_bytes, *(part.memory_bytes for part in parts))
    total = next((size for size in sizes if size is not None), None)
    if figures in (None, DeviceFigures()) and total is None and not parts:
        return None
    planned: dict[str, int] = {}
    for part in parts:
        for purpose, size in part.planned_bytes.items():
            planned[purpose] = planned.get(purpose, 0) + size
    name = next((part.name for part in parts if part.kind == "cpu"), "")
    return Host(name, total, planned, figures, tuple(part.id for part in parts))
