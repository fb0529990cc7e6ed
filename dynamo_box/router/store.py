"""The link to the process that owns the box's KV tiers."""

from __future__ import annotations

from dynamo_box.paths import RunDir
from dynamo_box.protocol.spec import EVENTS_SUFFIX
from dynamo_box.router.link import Link, Notify
from dynamo_box.router.placement import Placement
from dynamo_box.router.slices import Slices


class StoreLink(Link):
    """It is no worker: what it holds is every worker's to load. Without it, all goes on without that credit."""

    def __init__(self, run_dir: RunDir, placement: Placement, slices: Slices, notify: Notify) -> None:
        tiers = placement.tiers
        socket = run_dir.worker_socket(tiers.holder + EVENTS_SUFFIX)
        super().__init__(tiers.holder, socket, tiers.index, placement, slices, notify, chains=False)

    def on_connected(self) -> None:
        self._placement.tiers.connected = True

    def on_disconnected(self) -> None:
        self._placement.tiers.connected = False
