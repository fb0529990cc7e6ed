"""Who holds the bytes of each device, of the host and of the disks. Pure: one snapshot in, regions out.

Several sources are laid over each other, the most trustworthy outside:

    device or kernel   all in use, what the box holds of it, what others hold    DeviceFigures, DiskInfo
    gms                layouts: weights that are there once, whoever maps them   GmsFigures
    workers            weights, and the KV pool by used, cached and free blocks  WorkerFigures
    kvstore            KV in host memory and on disk, below the engines' pools   KvStoreFigures
    plan               what was set aside by purpose                             DeviceInfo.planned_bytes

A model that has a layout on a device has its weights in it, and what its workers say of theirs is what they map of it.
While a gms says nothing, the workers of one model still hold one copy: the most that one of them says. The host tier is
shared memory, which is there once, however many workers map it.

They are sampled at different moments and needn't agree. Each region takes what it claims of what those before it left
over, so no region is ever negative and together they are exactly the total. The cpu device and the host are one memory,
and so are one place here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamo_box.protocol.figures import GmsFigures, KvStoreFigures, WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, DeviceInfo, DiskInfo, ProcessInfo
from dynamo_box.tui import layouts, tiers
from dynamo_box.tui.host import HOST, HOST_KINDS, host_of
from dynamo_box.tui.regions import KV, TIER, WEIGHTS, Claims, Region, as_planned, divided, granted, measured, whole

DISK = "disk"


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
    """What one process says that it holds of one place, in bytes; None is what it doesn't say. Weights of a worker that
    maps a layout are the layout's, and those of a gms are all its layouts'. `kv_tier` is the host tier, of its store.
    """

    process: ProcessInfo
    weights: int | None = None
    kv: int | None = None
    kv_used: int | None = None
    kv_cached: int | None = None
    kv_tier: int | None = None


def places(snapshot: BoxSnapshot) -> tuple[Place, ...]:
    """Every device, then the host, then the disks."""
    held = _held(snapshot)
    stored = _stored(snapshot)
    found = [
        _device(device, held.get(device.id, []), stored.get(device.id))
        for device in snapshot.devices
        if device.kind not in HOST_KINDS
    ]
    host = _host(snapshot, held[HOST], stored.get(HOST))
    if host is not None:
        found.append(host)
    with_snapshots = _disk_of_snapshots(snapshot.disks)
    on_disk = sum(max(each.layout.disk_bytes, 0) for each in layouts.held(snapshot))
    store = tiers.store_of(snapshot)
    there = store is not None and not store.figures.simulated
    with_tier = tiers.disk_of(snapshot.disks, store.figures.directory) if store is not None and there else None
    in_files = store.figures.disk.used_bytes if store is not None and there else 0
    found.extend(
        _disk(disk, on_disk if disk is with_snapshots else 0, in_files if disk is with_tier else 0)
        for disk in snapshot.disks
    )
    return tuple(found)


def layouts_at(snapshot: BoxSnapshot, place: str) -> list[tuple[layouts.Held, int]]:
    """The layouts that have bytes at the place with this key, and how many; readers map those on a device only."""
    on_host = _host_ids(snapshot)
    with_snapshots = _disk_of_snapshots(snapshot.disks)
    found = []
    for each in layouts.held(snapshot):
        device = HOST if each.device in on_host else each.device
        here = max(each.layout.device_bytes, 0) if place == device else 0
        here += max(each.layout.host_bytes, 0) if place == HOST else 0
        if with_snapshots is not None and place == _disk_key(with_snapshots):
            here += max(each.layout.disk_bytes, 0)
        if here or (place == device and each.layout.readers):
            found.append((each, here))
    return found


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
        TIER: (Region.TIER,),
        "overhead": (Region.BOX,),
    }
    return {
        purpose: sum(place.regions.get(region, 0) for region in regions)
        for purpose, regions in purposes.items()
        if any(region in place.regions for region in regions)
    }


# the places


def _device(device: DeviceInfo, held: list[Holding], stored: _Stored | None) -> Place:
    total, planned = whole(device.memory_bytes), device.planned_bytes
    if device.figures is None:
        regions = as_planned(planned, total, _workers(held))
    else:
        regions = measured(device.figures, total, _claims(held, _weights(held, stored)))
    return Place(device.id, device.name, device.kind, total, regions, device.figures is not None, planned)


def _host(snapshot: BoxSnapshot, held: list[Holding], stored: _Stored | None) -> Place | None:
    """The machine's memory; planned are the cpu device and interpreters together. None if nobody says what it holds."""
    host = host_of(snapshot)
    if host is None or (host.figures is None and not host.ids):
        return None
    total, planned = whole(host.total), host.planned
    if host.figures is None:
        regions = as_planned(planned, total, _workers(held))
    else:
        weights = _mapped_weights(held, planned.get(WEIGHTS, 0)) if stored is None else _weights(held, stored)
        regions = measured(host.figures, total, _claims(held, weights))
    name = host.name or "memory of the machine"
    return Place(HOST, name, HOST, total, regions, host.figures is not None, planned)


def _disk(disk: DiskInfo, snapshots: int, tier: int) -> Place:
    """`snapshots` are bytes of weights that sleep there, `tier` those of the disk tier: of the box's, if it says how
    much it has.
    """
    total = max(disk.total_bytes, 0)
    free = min(max(disk.free_bytes, 0), total)
    used = total - free
    inside = used if disk.box_bytes is None else min(max(disk.box_bytes, 0), used)
    claims = {Region.WEIGHTS: snapshots, Region.TIER: tier}
    regions = granted({region: size for region, size in claims.items() if size}, inside)
    known = sum(regions.values())
    if disk.box_bytes is None:
        regions[Region.UNATTRIBUTED] = used - known
    else:
        regions[Region.BOX] = inside - known
        regions[Region.OTHERS] = used - inside
    regions[Region.FREE] = free
    return Place(_disk_key(disk), disk.purpose, DISK, total, regions)


def _disk_key(disk: DiskInfo) -> str:
    return f"{DISK} {disk.path}"


def _disk_of_snapshots(disks: tuple[DiskInfo, ...]) -> DiskInfo | None:
    """The disk whose purpose names weights, else models, which lie in the same home; else the only one."""
    for purpose in (WEIGHTS, "models"):
        for disk in disks:
            if purpose in disk.purpose:
                return disk
    return disks[0] if len(disks) == 1 else None


# what gms says


@dataclass(frozen=True)
class _Stored:
    """Of one place: bytes of weights in layouts, and the models whose weights on it are these and no others."""

    weights: int = 0
    models: frozenset[str] = frozenset()

    def __add__(self, other: _Stored) -> _Stored:
        return _Stored(self.weights + other.weights, self.models | other.models)


def _stored(snapshot: BoxSnapshot) -> dict[str, _Stored]:
    """By place, for each on which a gms is at home, even if it says nothing, or where layouts sleep."""
    on_host = _host_ids(snapshot)
    found: dict[str, _Stored] = {}

    def store(place: str, more: _Stored) -> None:
        found[place] = found.get(place, _Stored()) + more

    for process in layouts.services(snapshot):
        for device in process.device.split(",") if process.device else []:
            store(HOST if device in on_host else device, _Stored())
    for each in layouts.held(snapshot):
        if each.is_there:
            here = _Stored(max(each.layout.device_bytes, 0), frozenset({each.layout.name}))
            store(HOST if each.device in on_host else each.device, here)
            if each.layout.host_bytes > 0:
                store(HOST, _Stored(each.layout.host_bytes))
    return found


def _host_ids(snapshot: BoxSnapshot) -> set[str]:
    return {device.id for device in snapshot.devices if device.kind in HOST_KINDS} | {HOST}


# what workers say


def _held(snapshot: BoxSnapshot) -> dict[str, list[Holding]]:
    """By place. A worker on several devices holds an even part of its weights and KV on each."""
    on_host = _host_ids(snapshot)
    held: dict[str, list[Holding]] = {HOST: []}
    for process in snapshot.processes:
        devices = process.device.split(",") if process.device else []
        for index, device in enumerate(devices):
            place = HOST if device in on_host else device
            held.setdefault(place, []).append(_holding(process, index, len(devices)))
        if process.rss_bytes is not None and on_host.isdisjoint(devices):
            held[HOST].append(Holding(process, kv_tier=_host_tier(process)))
    return held


def _holding(process: ProcessInfo, index: int, span: int) -> Holding:
    figures = process.figures
    if isinstance(figures, GmsFigures):
        return Holding(process, _part(sum(max(each.device_bytes, 0) for each in figures.layouts), index, span))
    if not isinstance(figures, WorkerFigures):
        return Holding(process, kv_tier=_host_tier(process))
    weights = None if figures.weights_bytes is None else _part(figures.weights_bytes, index, span)
    pool = None if figures.kv_bytes is None else _part(figures.kv_bytes, index, span)
    if pool is None or figures.kv_blocks_total <= 0:
        return Holding(process, weights, pool)
    regions = divided(pool, [figures])
    return Holding(process, weights, pool, regions[Region.USED], regions[Region.CACHED])


def _host_tier(process: ProcessInfo) -> int | None:
    """What the store says that lies in its arenas, in a rehearsal nothing; those who map them say nothing of it."""
    figures = process.figures
    return figures.host.used_bytes if isinstance(figures, KvStoreFigures) and not figures.simulated else None


def _workers(held: list[Holding]) -> list[WorkerFigures]:
    """What those say that are workers."""
    found = [each.process.figures for each in held]
    return [figures for figures in found if isinstance(figures, WorkerFigures)]


def _claims(held: list[Holding], weights: int | None) -> Claims:
    """What is held together. A pool of unknown use stays with the box's other bytes."""
    claims: Claims = {}
    if weights is not None:
        claims[Region.WEIGHTS] = weights
    pools = [(each.kv, each.kv_used, each.kv_cached) for each in held]
    known = [(kv, used, cached or 0) for kv, used, cached in pools if kv is not None and used is not None]
    if known:
        claims[Region.USED] = sum(used for _, used, _ in known)
        claims[Region.CACHED] = sum(cached for _, _, cached in known)
    stored = [each.kv_tier for each in held if each.kv_tier is not None]
    if stored:
        claims[Region.TIER] = sum(stored)
    if known:
        claims[Region.POOL] = sum(kv - used - cached for kv, used, cached in known)
    return claims


def _weights(held: list[Holding], stored: _Stored | None) -> int | None:
    """On a device: the layouts and, of models that have none, what their workers say: copies where there is no gms."""
    said = _said(held)
    if stored is None:
        return sum(size for _, size in said) if said else None
    beside = _once((model, size) for model, size in said if model not in stored.models)
    return stored.weights + beside if stored.models or stored.weights or said else None


def _mapped_weights(held: list[Holding], planned: int) -> int | None:
    """Workers of one model map the same file on the host, which is there once; they hold copies only where the plan set
    aside enough for as many.
    """
    weights = _said(held)
    if not weights:
        return None
    copies = sum(size for _, size in weights)
    return copies if copies <= planned else _once(weights)


def _said(held: list[Holding]) -> list[tuple[str | None, int]]:
    """Weights as workers say it, with the model that each is of."""
    return [
        (each.process.model, each.weights)
        for each in held
        if each.weights is not None and isinstance(each.process.figures, WorkerFigures)
    ]


def _once(weights: Iterable[tuple[str | None, int]]) -> int:
    """Of each model as much as one worker has at most."""
    once: dict[str | None, int] = {}
    for model, size in weights:
        once[model] = max(once.get(model, 0), size)
    return sum(once.values())


def _part(size: int, index: int, span: int) -> int:
    """Part number `index` of `span` parts that sum to `size` and differ by one at most."""
    return size // span + (index < size % span)
