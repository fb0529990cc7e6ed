"""Who holds the bytes of each device, of the host and of the disks. Pure: one snapshot in, regions out.

Three sources are laid over each other, the most trustworthy outside:

    device or kernel   all in use, what the box holds of it, what others hold    DeviceFigures, DiskInfo
    workers            weights, and the KV pool by used, cached and free blocks  WorkerFigures
    plan               what was set aside by purpose                             DeviceInfo.planned_bytes

They are sampled at different moments and needn't agree. Each region takes what it claims of what those before it left
over, so no region is ever negative and together they are exactly the total. The cpu device and the host are one memory,
and so are one place here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, DeviceFigures, DeviceInfo, DiskInfo, ProcessInfo
from dynamo_box.tui.host import HOST, HOST_KINDS, host_of

DISK = "disk"
WEIGHTS, KV = "weights", "KV"
"""The purposes of planned bytes that have regions of their own; all others are the box's other bytes."""


class Region(enum.StrEnum):
    """What bytes are for, in the order in which they lie side by side.

    CACHED are KV blocks kept for reuse only, POOL what the pool has left. BOX is what the box holds beside weights and
    KV. OTHERS is other processes' (on a disk: other files). UNATTRIBUTED is in use, nobody knows by whom; UNREAD may be
    in use or free: the device doesn't say.
    """

    WEIGHTS = "weights"
    USED = "KV used"
    CACHED = "KV cached"
    POOL = "KV free"
    BOX = "other"
    OTHERS = "others"
    UNATTRIBUTED = "unattributed"
    UNREAD = "not read"
    FREE = "free"


@dataclass(frozen=True)
class Place:
    """`regions` sum to `total`; what can't be told is absent. `total` is None where the size is unknown: then they are
    what is known to be held.

    `measured` is false where nothing reads the place: the regions are what the plan set aside. `planned` is that, by
    purpose, in any case.
    """

    key: str
    name: str
    kind: str
    total: int | None
    regions: dict[Region, int]
    measured: bool = True
    planned: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Holding:
    """What one process says that it holds of one place, in bytes; None is what it doesn't say."""

    process: ProcessInfo
    weights: int | None = None
    kv: int | None = None
    kv_used: int | None = None
    kv_cached: int | None = None


def places(snapshot: BoxSnapshot) -> tuple[Place, ...]:
    """Every device, then the host, then the disks."""
    held = _held(snapshot)
    found = [_device(device, held.get(device.id, [])) for device in snapshot.devices if device.kind not in HOST_KINDS]
    host = _host(snapshot, held[HOST])
    if host is not None:
        found.append(host)
    found.extend(_disk(disk) for disk in snapshot.disks)
    return tuple(found)


def holdings(snapshot: BoxSnapshot, place: str) -> list[Holding]:
    """What each process has of the place with this key, in the order of the snapshot. All that run are on the host."""
    return _held(snapshot).get(place, [])


def held_by_purpose(place: Place) -> dict[str, int]:
    """Bytes in the terms of the plan, to stand beside what it set aside; nothing for a place that isn't measured."""
    if not place.measured:
        return {}
    purposes = {
        WEIGHTS: (Region.WEIGHTS,),
        KV: (Region.USED, Region.CACHED, Region.POOL),
        "overhead": (Region.BOX,),
    }
    return {
        purpose: sum(place.regions.get(region, 0) for region in regions)
        for purpose, regions in purposes.items()
        if any(region in place.regions for region in regions)
    }


# the places


def _device(device: DeviceInfo, held: list[Holding]) -> Place:
    total, planned = _whole(device.memory_bytes), device.planned_bytes
    if device.figures is None:
        regions = _planned(planned, total, held)
    else:
        weights = [each.weights for each in held if each.weights is not None]
        regions = _measured(device.figures, total, _claims(held, sum(weights) if weights else None))
    return Place(device.id, device.name, device.kind, total, regions, device.figures is not None, planned)


def _host(snapshot: BoxSnapshot, held: list[Holding]) -> Place | None:
    """The machine's memory; planned are the cpu device and interpreters together. None if nobody says what it holds."""
    host = host_of(snapshot)
    if host is None or (host.figures is None and not host.ids):
        return None
    total, planned = _whole(host.total), host.planned
    if host.figures is None:
        regions = _planned(planned, total, held)
    else:
        regions = _measured(host.figures, total, _claims(held, _mapped_weights(held, planned.get(WEIGHTS, 0))))
    name = host.name or "memory of the machine"
    return Place(HOST, name, HOST, total, regions, host.figures is not None, planned)


def _disk(disk: DiskInfo) -> Place:
    total = max(disk.total_bytes, 0)
    free = min(max(disk.free_bytes, 0), total)
    regions = {}
    if disk.box_bytes is None:
        regions[Region.UNATTRIBUTED] = total - free
    else:
        regions[Region.BOX] = min(max(disk.box_bytes, 0), total - free)
        regions[Region.OTHERS] = total - free - regions[Region.BOX]
    regions[Region.FREE] = free
    return Place(f"{DISK} {disk.path}", disk.purpose, DISK, total, regions)


# regions, from the outside in

Claims = dict[Region, int]
"""Bytes that are said to be held, in the order in which they are believed."""


def _measured(figures: DeviceFigures, total: int | None, claims: Claims) -> dict[Region, int]:
    """Shares out the extent: what is in use, or all of a place that doesn't say how much that is."""
    used, box, others = (_whole(size) for size in (figures.used_bytes, figures.box_bytes, figures.other_bytes))
    bounds = [size for size in (used, total) if size is not None]
    extent = min(bounds) if bounds else (_sum(claims) if box is None else box) + (others or 0)
    inside = max(extent - (others or 0), 0) if box is None else min(box, extent)
    regions = _granted(claims, inside)
    if box is not None:
        regions[Region.BOX] = inside - sum(regions.values())
    left = extent - sum(regions.values())
    if others is not None:
        regions[Region.OTHERS] = min(others, left)
        left -= regions[Region.OTHERS]
    if used is not None:
        regions[Region.UNATTRIBUTED] = left
        if total is not None:
            regions[Region.FREE] = total - extent
    elif total is not None:
        regions[Region.UNREAD] = left
    return regions


def _planned(planned: dict[str, int], total: int | None, held: list[Holding]) -> dict[Region, int]:
    """What the plan set aside; its KV is divided as the workers' blocks are."""
    claims: Claims = {}
    if WEIGHTS in planned:
        claims[Region.WEIGHTS] = planned[WEIGHTS]
    if KV in planned:
        workers = [each.process.figures for each in held]
        claims |= _divided(planned[KV], [figures for figures in workers if isinstance(figures, WorkerFigures)])
    other = [size for purpose, size in planned.items() if purpose not in (WEIGHTS, KV)]
    if other:
        claims[Region.BOX] = sum(other)
    regions = _granted(claims, _sum(claims) if total is None else total)
    if total is not None:
        regions[Region.FREE] = total - sum(regions.values())
    return regions


def _granted(claims: Claims, room: int) -> dict[Region, int]:
    """Of each claim, in order, as much as those before it left of `room` bytes."""
    regions = {}
    for region, claim in claims.items():
        regions[region] = min(max(claim, 0), room)
        room -= regions[region]
    return regions


def _whole(size: int | None) -> int | None:
    """Nothing is less than none, whatever a recording says."""
    return None if size is None else max(size, 0)


def _sum(claims: Claims) -> int:
    return sum(max(claim, 0) for claim in claims.values())


# what workers say


def _held(snapshot: BoxSnapshot) -> dict[str, list[Holding]]:
    """By place. A worker on several devices holds an even part of its weights and KV on each."""
    on_host = {device.id for device in snapshot.devices if device.kind in HOST_KINDS} | {HOST}
    held: dict[str, list[Holding]] = {HOST: []}
    for process in snapshot.processes:
        devices = process.device.split(",") if process.device else []
        for index, device in enumerate(devices):
            place = HOST if device in on_host else device
            held.setdefault(place, []).append(_holding(process, index, len(devices)))
        if process.rss_bytes is not None and on_host.isdisjoint(devices):
            held[HOST].append(Holding(process))
    return held


def _holding(process: ProcessInfo, index: int, span: int) -> Holding:
    figures = process.figures
    if not isinstance(figures, WorkerFigures):
        return Holding(process)
    weights = None if figures.weights_bytes is None else _part(figures.weights_bytes, index, span)
    pool = None if figures.kv_bytes is None else _part(figures.kv_bytes, index, span)
    if pool is None or figures.kv_blocks_total <= 0:
        return Holding(process, weights, pool)
    regions = _divided(pool, [figures])
    return Holding(process, weights, pool, regions[Region.USED], regions[Region.CACHED])


def _claims(held: list[Holding], weights: int | None) -> Claims:
    """What workers hold together. A pool of unknown use stays with the box's other bytes."""
    claims: Claims = {}
    if weights is not None:
        claims[Region.WEIGHTS] = weights
    pools = [(each.kv, each.kv_used, each.kv_cached) for each in held]
    known = [(kv, used, cached or 0) for kv, used, cached in pools if kv is not None and used is not None]
    if known:
        claims[Region.USED] = sum(used for _, used, _ in known)
        claims[Region.CACHED] = sum(cached for _, _, cached in known)
        claims[Region.POOL] = sum(kv - used - cached for kv, used, cached in known)
    return claims


def _divided(pool: int, workers: Iterable[WorkerFigures]) -> Claims:
    """The bytes of a pool as the blocks in it are used; while no worker says that it has any, all of them are left."""
    total = used = cached = 0
    for figures in workers:
        total += figures.kv_blocks_total
        used += figures.kv_blocks_used
        cached += figures.kv_blocks_cached
    if total <= 0:
        return {Region.POOL: pool}
    used = min(max(used, 0), total)
    cached = min(max(cached, 0), total - used)
    used_bytes, cached_bytes = pool * used // total, pool * cached // total
    return {Region.USED: used_bytes, Region.CACHED: cached_bytes, Region.POOL: pool - used_bytes - cached_bytes}


def _mapped_weights(held: list[Holding], planned: int) -> int | None:
    """Workers of one model map the same file on the host, which is there once; they hold copies only where the plan set
    aside enough for as many.
    """
    weights = [(each.process.model, each.weights) for each in held if each.weights is not None]
    if not weights:
        return None
    copies = sum(size for _, size in weights)
    if copies <= planned:
        return copies
    once: dict[str | None, int] = {}
    for model, size in weights:
        once[model] = max(once.get(model, 0), size)
    return sum(once.values())


def _part(size: int, index: int, span: int) -> int:
    """Part number `index` of `span` parts that sum to `size` and differ by one at most."""
    return size // span + (index < size % span)
