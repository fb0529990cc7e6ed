"""What is wrong with the KV tiers, in words for people: one line for each tier that is suspended and each worker that
goes without. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_box import wording
from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, WorkerFigures, WorkerTiers
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

KVSTORE = "kvstore"


def store_of(snapshot: BoxSnapshot) -> ProcessInfo | None:
    """The process that holds the tiers, whether or not it says anything."""
    return next((process for process in snapshot.processes if process.kind == KVSTORE), None)


def tiers_of(figures: KvStoreFigures) -> dict[str, TierFigures]:
    return {"host": figures.host, "disk": figures.disk}


def workers_of(snapshot: BoxSnapshot) -> dict[str, WorkerTiers]:
    """What workers say of their dealings with the tiers, by name."""
    return {
        process.name: process.figures.tiers
        for process in snapshot.processes
        if isinstance(process.figures, WorkerFigures) and process.figures.tiers is not None
    }


def tier_troubles(snapshot: BoxSnapshot) -> Iterator[str]:
    store = store_of(snapshot)
    if store is None:
        return
    if isinstance(store.figures, KvStoreFigures):
        for name, tier in tiers_of(store.figures).items():
            if tier.reason:
                yield f"the {name} tier of KV is {tier.state}: {wording.printable(tier.reason)}"
    for worker, tiers in workers_of(snapshot).items():
        if tiers.connected:
            yield f"{worker} goes without KV tiers: {wording.printable(tiers.connected)}"
