"""KV below the engines' own pools: the box's store, its two tiers, and what is wrong with them. Pure.

The host tier is shared memory that the store and all workers map: it is there once, whoever says how much of it it
touched.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, DiskInfo, ProcessInfo
from dynamo_box.tui.text import one_line

KVSTORE = "kvstore"
"""The kind of the process that holds the tiers."""
HOST_TIER, DISK_TIER = "host", "disk"
CLEAR = "clear"
"""The act that empties a tier, and the setting of the store that does it."""
ON, OFF, SUSPENDED = "on", "off", "suspended"


class Store(NamedTuple):
    process: ProcessInfo
    figures: KvStoreFigures

    @property
    def tiers(self) -> dict[str, TierFigures]:
        return {HOST_TIER: self.figures.host, DISK_TIER: self.figures.disk}


def process_of(snapshot: BoxSnapshot) -> ProcessInfo | None:
    """The store, whether or not it says anything; None in a box without tiers."""
    return next(
        (each for each in snapshot.processes if each.kind == KVSTORE or isinstance(each.figures, KvStoreFigures)), None
    )


def store_of(snapshot: BoxSnapshot) -> Store | None:
    """The store, if it says what it holds."""
    process = process_of(snapshot)
    if process is None or not isinstance(process.figures, KvStoreFigures):
        return None
    return Store(process, process.figures)


def suspended(figures: KvStoreFigures) -> dict[str, str]:
    """Why, by tier."""
    tiers = {HOST_TIER: figures.host, DISK_TIER: figures.disk}
    return {name: one_line(tier.reason) for name, tier in tiers.items() if tier.state == SUSPENDED}


def trouble(snapshot: BoxSnapshot) -> str:
    """`disk tier suspended`; empty if all is well with the tiers."""
    store = store_of(snapshot)
    names = [] if store is None else list(suspended(store.figures))
    return f"{' and '.join(names)} tier suspended" if names else ""


def hit_rate(figures: KvStoreFigures) -> float | None:
    """Of the blocks that were asked for, found in either tier. What isn't in host memory is asked of the disk."""
    asked = max(figures.host.lookups, figures.disk.lookups)
    return min((figures.host.hits + figures.disk.hits) / asked, 1.0) if asked > 0 else None


def disk_of(disks: tuple[DiskInfo, ...], directory: str) -> DiskInfo | None:
    """The file system that the disk tier's directory is on: of those that hold it the innermost, else the one whose
    purpose names KV, else the only one.
    """
    path = PurePath(directory or "/")
    holding = [disk for disk in disks if path.is_relative_to(disk.path)] if directory else []
    if holding:
        return max(holding, key=lambda disk: len(disk.path))
    named = next((disk for disk in disks if "KV" in disk.purpose), None)
    return named or (disks[0] if len(disks) == 1 else None)


def models_of(snapshot: BoxSnapshot, owners: tuple[str, ...]) -> list[str]:
    """The models whose workers these are, each once."""
    wanted = set(owners)
    return list(dict.fromkeys(each.model for each in snapshot.processes if each.model and each.name in wanted))


def workers_with(snapshot: BoxSnapshot) -> list[tuple[ProcessInfo, WorkerFigures]]:
    """Workers that deal with the tiers."""
    return [
        (process, process.figures)
        for process in snapshot.processes
        if isinstance(process.figures, WorkerFigures) and process.figures.tiers is not None
    ]
