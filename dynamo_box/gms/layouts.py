"""Which layouts there are, and what is told of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

from dynamo_box.gms.layout import Layout
from dynamo_box.gms.names import memfd_name
from dynamo_box.protocol import gms
from dynamo_box.protocol.figures import LayoutFigures
from dynamo_box.protocol.spec import GmsSpec

MAX_LAYOUTS = 64


class Layouts:
    """By name: those of the plan, or any if the plan names none. `alive(id)` tells whether a waiter still lives."""

    def __init__(self, spec: GmsSpec, alive: Callable[[int], bool]) -> None:
        self._spec = spec
        self._alive = alive
        self._layouts: dict[str, Layout] = {}

    def __iter__(self) -> Iterator[Layout]:
        return iter(self._layouts.values())

    def get(self, name: str) -> Layout | None:
        """As far as somebody has asked for it."""
        return self._layouts.get(name)

    def knows(self, name: str) -> bool:
        """It may be served. Where the plan names none, idle ones are forgotten to make room."""
        if name in self._layouts:
            return True
        if self._spec.layouts:
            return name in self._spec.layouts
        if len(name) > gms.MAX_LAYOUT_NAME:
            return False
        try:
            memfd_name("0" * 12, "device", self._spec.device, name)
        except ValueError:
            return False
        for idle in [one for one, layout in self._layouts.items() if layout.idle]:
            if len(self._layouts) >= MAX_LAYOUTS:
                del self._layouts[idle]
        return len(self._layouts) < MAX_LAYOUTS

    def __getitem__(self, name: str) -> Layout:
        """One that is known; made when it is first asked for."""
        layout = self._layouts.get(name)
        if layout is None:
            layout = self._layouts[name] = Layout(name, self._alive, time.time)
        return layout

    def inherited_problem(self, record: gms.EpochRecord, descriptors: Sequence[int]) -> str:
        """Why what a predecessor had committed can't be taken over, or ""."""
        if not self.knows(record.layout):
            return "it is none of the layouts that are served here"
        if self[record.layout].committed is not None:
            return "it was handed over twice"
        wanted = [allocation.size for allocation in record.allocations] if record.place != "disk" else []
        found = [os.fstat(descriptor).st_size for descriptor in descriptors]
        return f"its descriptors have {found} bytes instead of {wanted}" if found != wanted else ""

    def figures(self) -> tuple[LayoutFigures, ...]:
        return tuple(_figures_of(layout) for layout in self)


def _figures_of(layout: Layout) -> LayoutFigures:
    committed, building = layout.committed, layout.building
    shown = committed or building
    size = committed.bytes if committed is not None else 0
    place = committed.place if committed is not None else ""
    return LayoutFigures(
        name=layout.name,
        state=layout.state,
        place=place,
        epoch=shown.number if shown is not None else 0,
        layout_hash=committed.layout_hash if committed is not None else "",
        bytes=shown.bytes if shown is not None else 0,
        device_bytes=(size if place == "device" else 0) + (building.bytes if building is not None else 0),
        host_bytes=size if place == "host" else 0,
        disk_bytes=size if place == "disk" else 0,
        allocations=len(shown.sizes) if shown is not None else 0,
        entries=len(shown.entries) if shown is not None else 0,
        moving=layout.moving,
        writer=layout.writer,
        readers=layout.readers,
        waiters=layout.waiters,
        history=tuple(layout.history),
    )
