"""What devices gave back when a model went to sleep: measured, not assumed."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_box.protocol import control
from dynamo_box.supervisor import meter

SHORTFALL_BYTES = 16 << 20
SHORTFALL_SHARE = 0.02
"""What may be missing of what was to be freed before it counts: allocators keep some."""


def freed_between(
    before: meter.Reading, after: meter.Reading, expected: Mapping[str, int], *, layout: str | None
) -> tuple[control.Freed, ...]:
    """Of each device in `expected` (bytes). Who still holds weights of `layout`, which were to go, is named."""
    return tuple(_freed(before, after, device, wanted, layout) for device, wanted in expected.items())


def _freed(before: meter.Reading, after: meter.Reading, device: str, wanted: int, layout: str | None) -> control.Freed:
    freed = before.on_device(device) - after.on_device(device)
    holders: dict[str, None] = {}
    for inode, one in before.of_layout(layout).items() if layout is not None else ():
        if one.device == device and inode in after.files:
            holders.update(dict.fromkeys(meter.who(pid) for pid in sorted(after.files[inode].holders)))
    if not holders and wanted - freed > max(SHORTFALL_BYTES, int(wanted * SHORTFALL_SHARE)):
        holders["nobody that can be seen"] = None
    return control.Freed(device, wanted, max(freed, 0), tuple(holders))
