"""Weights that lie in layouts: which there are, where their bytes are, and who maps them. Pure.

A layout holds the weights of the model that is called as it is, once for all processes of a device; what workers say
of their weights is then what they map of it, and no memory beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynamo_box.protocol.figures import GmsFigures, LayoutFigures
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui.text import one_line

GMS = "gms"
"""The kind of the processes that hold layouts."""


@dataclass(frozen=True)
class Held:
    """A layout, and the service that holds it on its device."""

    service: ProcessInfo
    device: str
    layout: LayoutFigures

    @property
    def key(self) -> str:
        """Tells it from those of other devices."""
        return f"{self.service.name} {self.layout.name}"

    @property
    def is_there(self) -> bool:
        """Whether it holds a model's weights, wherever; an empty one says nothing about what its workers hold."""
        layout = self.layout
        return layout.state != "empty" or any(max(each, 0) for each in bytes_by_place(layout).values())


def services(snapshot: BoxSnapshot) -> list[ProcessInfo]:
    return [process for process in snapshot.processes if process.kind == GMS or isinstance(process.figures, GmsFigures)]


def held(snapshot: BoxSnapshot) -> list[Held]:
    """Every layout of every service that says what it holds."""
    return [
        Held(process, process.figures.device, layout)
        for process in snapshot.processes
        if isinstance(process.figures, GmsFigures)
        for layout in process.figures.layouts
    ]


def of_model(snapshot: BoxSnapshot, model: str) -> list[Held]:
    """A model's layouts, one for each device that it is or was on."""
    return [each for each in held(snapshot) if each.layout.name == model]


def bytes_by_place(layout: LayoutFigures) -> dict[str, int]:
    return {"device": layout.device_bytes, "host": layout.host_bytes, "disk": layout.disk_bytes}


def size(found: Iterable[Held]) -> int | None:
    """Bytes of the weights themselves, wherever they lie; None without any."""
    sizes = [each.layout.bytes for each in found if each.is_there]
    return sum(sizes) if sizes else None


def whereabouts(place: str) -> str:
    """A place of weights in words."""
    return {"device": "on the device", "host": "in host memory", "disk": "on disk"}.get(place, f"at {one_line(place)}")
